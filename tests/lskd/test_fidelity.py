import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from lskd.analysis.by_sample import Softmax, by_sample

pytestmark = pytest.mark.unit

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def draw(samples, classes, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(2, samples, classes))


def divergence(teacher, student):
    return by_sample(lambda z, other: Softmax(z).divergence(Softmax(other)), teacher, student)


@PROPERTY
@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_it_is_its_definition(classes, seed):
    teacher, student = draw(25, classes, seed)
    p, q = (special.softmax(z, axis=1) for z in (teacher, student))
    expected = [sum(special.rel_entr(*row)) for row in zip(p, q, strict=True)]
    np.testing.assert_allclose(divergence(teacher, student), expected, rtol=1e-9, atol=1e-12)


def test_a_teacher_is_no_way_from_itself_however_its_logits_are_shifted():
    teacher, _ = draw(40, 6)
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


def test_logits_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 2\) and \(1, 3\)"):
        divergence([[0.0, 1.0]], [[0.0, 1.0, 2.0]])


def test_float32_and_blocks_of_rows_change_nothing(monkeypatch):
    teacher, student = draw(30, 5).astype(np.float32)
    before = divergence(teacher, student)
    np.testing.assert_array_equal(divergence(teacher.astype(np.float64), student.astype(np.float64)), before)
    monkeypatch.setattr("lskd.base.tensors.BLOCK", 20)
    np.testing.assert_allclose(divergence(teacher, student), before, rtol=1e-12)


def test_of_equal_logits_the_first_class_is_the_answer():
    assert Softmax(np.array([[1.0, 1.0], [0.0, 2.0]])).answer.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ([[0.0, np.nan]], "the logits of sample 0 are not all finite"),
        (np.zeros((0, 2)), "with samples"),
    ],
)
def test_students_logits_that_say_nothing_are_refused(student, message):
    with pytest.raises(ValueError, match=message):
        divergence(np.zeros((len(student), 2)), student)
