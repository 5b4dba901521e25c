import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from lskd.analysis import by_sample
from lskd.analysis.fidelity import agreement, divergence

pytestmark = pytest.mark.unit

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def draw(samples, classes, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(2, samples, classes))


@PROPERTY
@given(st.integers(2, 9), st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 2**32 - 1))
def test_both_are_their_definitions(classes, temperature, seed):
    teacher, student = draw(25, classes, seed)
    p, q = (special.softmax(z / temperature, axis=1) for z in (teacher, student))
    expected = [sum(special.rel_entr(*row)) for row in zip(p, q, strict=True)]
    np.testing.assert_allclose(divergence(teacher, student, temperature), expected, rtol=1e-9, atol=1e-12)
    same = [float(np.argmax(a) == np.argmax(b)) for a, b in zip(p, q, strict=True)]
    np.testing.assert_array_equal(agreement(teacher, student), same)


def test_a_teacher_agrees_with_itself_however_its_logits_are_shifted():
    teacher, _ = draw(40, 6)
    assert (agreement(teacher, teacher + 5) == 1).all()
    found = divergence(teacher, teacher + 5)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, 0, atol=1e-12)


def test_the_divergence_is_not_symmetric_and_stays_finite_where_the_student_is_certain():
    teacher, student = np.array([[2.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 0.0]])
    assert divergence(teacher, student)[0] != pytest.approx(divergence(student, teacher)[0])
    assert divergence([[0.0, 0.0]], [[2000.0, 0.0]])[0] == pytest.approx(1000 - np.log(2))


def test_logits_further_apart_than_the_largest_number():
    far = np.array([[0.0, -1.7e308, 1.7e308]])
    np.testing.assert_array_equal(divergence(far, far), [0])
    np.testing.assert_array_equal(divergence(far, [[0.0, -1.0, 1000.0]]), [0])


def test_of_equal_logits_the_first_class_is_the_answer():
    np.testing.assert_array_equal(agreement([[1.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 2.0]]), [1, 0])


def test_float32_and_blocks_of_rows_change_nothing(monkeypatch):
    teacher, student = draw(30, 5).astype(np.float32)
    before = divergence(teacher, student), agreement(teacher, student)
    wide = teacher.astype(np.float64), student.astype(np.float64)
    np.testing.assert_array_equal(divergence(*wide), before[0])
    monkeypatch.setattr(by_sample, "_BLOCK", 20)
    np.testing.assert_allclose(divergence(teacher, student), before[0], rtol=1e-12)
    np.testing.assert_array_equal(agreement(teacher, student), before[1])


@pytest.mark.parametrize("measure", [agreement, divergence])
@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ([[0.0, 1.0]], [[0.0, 1.0, 2.0]], r"shape \(1, 2\) and \(1, 3\)"),
        ([[0.0, 1.0]], [[0.0, np.nan]], "the logits of sample 0 are not all finite"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "with samples"),
    ],
)
def test_bad_input_is_refused(measure, teacher, student, message):
    with pytest.raises(ValueError, match=message):
        measure(teacher, student)


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="temperature is -1"):
        divergence([[0.0, 1.0]], [[0.0, 1.0]], -1)
