import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from lskd.analysis.by_sample import Softmax, by_sample
from lskd.analysis.selective import aurc_pseudo_values, largest_normalised

pytestmark = pytest.mark.unit

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
# Few different values of confidence, so that many are equal.
answers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=3, max_size=25).map(
    lambda rows: np.array(rows, dtype=float).T
)


def confidence(logits):
    return by_sample(lambda z: Softmax(z).log_largest, logits)


def normalised(logits):
    return by_sample(lambda z: largest_normalised(torch.from_numpy(z)), logits)


def aurc(sure, correct):
    return aurc_pseudo_values(sure, correct).mean()


def in_order(correct):
    """The definition: over thresholds, the error among those that are answered."""
    return np.mean([np.mean(1 - correct[: k + 1]) for k in range(len(correct))])


def over_orders(confidence, correct):
    """The mean of the definition over every order of the samples that confidence allows."""
    found = []
    for order in itertools.permutations(range(len(correct))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            found.append(in_order(correct[list(order)]))
    return np.mean(found)


# The area


def test_no_equal_confidence_is_the_definition():
    rng = np.random.default_rng(0)
    sure, correct = rng.random(500), (rng.random(500) < 0.7).astype(float)
    assert aurc(sure, correct) == pytest.approx(in_order(correct[np.argsort(-sure)]), rel=1e-12)


@pytest.mark.parametrize(
    ("sure", "correct"),
    [
        ([1, 1, 1, 1, 1], [1, 0, 1, 1, 0]),
        ([3, 2, 2, 2, 1, 1], [1, 0, 1, 1, 0, 1]),
        ([0, 0, 5, 5, 5, 7, 7], [1, 0, 0, 1, 1, 0, 1]),
    ],
)
def test_equal_confidence_is_the_mean_over_all_orders(sure, correct):
    sure, correct = np.array(sure, float), np.array(correct, float)
    assert aurc(sure, correct) == pytest.approx(over_orders(sure, correct), rel=1e-12)


def test_best_worst_and_uninformed_confidence():
    correct = np.array([1.0] * 70 + [0.0] * 30)
    best, worst = aurc(correct, correct), aurc(-correct, correct)
    assert best == pytest.approx(in_order(correct))
    assert worst == pytest.approx(in_order(correct[::-1]))
    assert aurc(np.zeros(100), correct) == pytest.approx(0.3)
    many = np.repeat(correct, 100)  # the formula for many samples: r + (1 - r) ln(1 - r)
    assert aurc(many, many) == pytest.approx(0.3 + 0.7 * np.log(0.7), abs=1e-4)


@PROPERTY
@given(answers)
def test_only_the_order_of_confidence_counts(rows):
    sure, correct = rows
    value = aurc(sure, correct)
    assert aurc(np.exp(3 * sure) - 7, correct) == pytest.approx(value, rel=1e-12)
    assert aurc(sure / 1e9, correct) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(aurc_pseudo_values(sure**3, correct), aurc_pseudo_values(sure, correct))


@PROPERTY
@given(answers, st.integers(0, 2**32 - 1))
def test_the_order_of_the_samples_does_not_count(rows, seed):
    sure, correct = rows
    order = np.random.default_rng(seed).permutation(len(sure))
    assert aurc(sure[order], correct[order]) == pytest.approx(aurc(sure, correct), rel=1e-12)
    moved = aurc_pseudo_values(sure[order], correct[order])
    np.testing.assert_allclose(moved, aurc_pseudo_values(sure, correct)[order], atol=1e-12)


@PROPERTY
@given(answers)
def test_no_confidence_gives_less_than_the_smallest_area(rows):
    sure, correct = rows
    assert aurc(correct, correct) - 1e-12 <= aurc(sure, correct) <= 1 + 1e-12


# Its pseudo-values


@PROPERTY
@given(rows=answers)
def test_pseudo_values_are_the_jackknife_spelled_out(rows):
    sure, correct = rows
    n, whole = len(sure), aurc(sure, correct)
    without = np.array([aurc(np.delete(sure, i), np.delete(correct, i)) for i in range(n)])
    pseudo = n * whole - (n - 1) * without
    found = aurc_pseudo_values(sure, correct)
    assert found.mean() == pytest.approx(whole, abs=1e-12)
    np.testing.assert_allclose(found, pseudo - pseudo.mean() + whole, atol=1e-10)


def test_the_jackknife_error_is_the_error_of_new_samples():
    rng = np.random.default_rng(0)

    def draw(samples):
        sure = rng.random(samples)
        return sure, (rng.random(samples) < 0.5 + 0.5 * sure).astype(float)

    drawn = np.std([aurc(*draw(300)) for _ in range(2000)])
    errors = [aurc_pseudo_values(*draw(300)).std(ddof=1) / 300**0.5 for _ in range(100)]
    assert np.mean(errors) == pytest.approx(drawn, rel=0.08)


# Confidence


def test_confidence_is_the_logarithm_of_the_largest_probability(monkeypatch):
    logits = np.random.default_rng(0).normal(scale=4, size=(50, 7)).astype(np.float32)
    expected = special.log_softmax(logits.astype(np.float64), axis=1).max(1)
    found = confidence(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    monkeypatch.setattr("lskd.base.tensors.BLOCK", 20)
    np.testing.assert_array_equal(confidence(logits), found)


def test_a_sample_is_named_wherever_its_block_lies(monkeypatch):
    logits = np.zeros((50, 7))
    logits[31, 2] = np.nan
    monkeypatch.setattr("lskd.base.tensors.BLOCK", 20)
    with pytest.raises(ValueError, match="the logits of sample 31 are not all finite"):
        confidence(logits)


def test_probabilities_that_round_to_one_keep_their_order():
    logits = np.array([[40.0, 0, 0], [80.0, 0, 0], [60.0, 0, 0]])
    assert (special.softmax(logits, axis=1).max(1) == 1).all()
    assert confidence(logits).argsort().tolist() == [0, 2, 1]


def test_normalised_logits_are_their_definition():
    logits = np.random.default_rng(1).normal(3, 4, size=(30, 6))
    for row, found in zip(logits, normalised(logits), strict=True):
        centred = row - row.mean()
        assert found == pytest.approx((centred / np.linalg.norm(centred, 5)).max(), rel=1e-12)


@pytest.mark.parametrize("sure", [confidence, normalised])
def test_confidence_does_not_see_a_shift_and_normalised_not_the_scale_either(sure):
    logits = np.random.default_rng(2).normal(size=(20, 5))
    np.testing.assert_allclose(sure(logits + 30), sure(logits), rtol=1e-9)
    assert np.allclose(sure(logits * 1e80), sure(logits)) == (sure is normalised)


@pytest.mark.parametrize("sure", [confidence, normalised])
def test_the_same_logits_in_another_order_are_as_sure(sure):
    rng = np.random.default_rng(0)
    for row in (rng.integers(-6, 6, size=101), rng.normal(size=101) * 3, rng.normal(size=101) * 1e307):
        assert len(np.unique(sure([rng.permutation(row) for _ in range(99)]))) == 1


def test_normalisation_can_change_the_order_and_equal_logits_come_last():
    logits = np.array([[9.0, 8.0, -9.0], [4.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert confidence(logits).argsort().tolist() == [2, 0, 1]
    assert normalised([[9.0, 0.0, 0.0], [9.0, 8.0, 0.0]]).argsort().tolist() == [1, 0]
    assert normalised(logits)[2] == 0.0 == normalised(logits).min()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confidence([[0.0]]), "1 classes; this measure needs at least 2"),
        (lambda: confidence([0.0, 1.0]), r"logits have shape \(2,\)"),
        (lambda: confidence(np.zeros((0, 3))), "with samples"),
        (lambda: confidence([[0.0, 1.0], [0.0, np.inf]]), "the logits of sample 1 are not all finite"),
        (lambda: aurc([0.1, 0.2], [1]), r"shape \(2,\) and correct \(1,\)"),
        (lambda: aurc([], []), "with samples"),
        (lambda: aurc([0.1, np.nan], [1, 0]), "the confidence of sample 1 is not a number"),
        (lambda: aurc([0.1, 0.2], [1, 0.5]), "1 where the answer is right"),
        (lambda: aurc_pseudo_values([0.1], [1]), "at least 2"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
