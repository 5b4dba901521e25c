import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special
from torchmetrics.functional.classification import binary_calibration_error

from draws import PROPERTY
from lskd import fit_temperature
from lskd.analysis.calibration import BINS, LIMITS, calibration_contributions, confidence_and_correct

pytestmark = pytest.mark.unit


def draw(samples, num_classes, seed=0, scale=2.0, truth=1.0, dtype=torch.float32):
    """Logits, and labels drawn at temperature ``truth``, so that about that is the best temperature."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(samples, num_classes)) * scale
    noise = generator.gumbel(size=logits.shape)
    labels = (logits / truth + noise).argmax(1)
    return torch.from_numpy(logits).to(dtype), torch.from_numpy(labels)


def reference(logits, labels):
    """Best temperature between the limits, cross-entropies and largest probabilities there; in float64."""
    logits, labels = logits.double().numpy(), labels.numpy()

    def at(log_t):
        log_p = special.log_softmax(logits / np.exp(log_t), axis=1)
        return -log_p[np.arange(len(labels)), labels], np.exp(log_p.max(1))

    best = optimize.minimize_scalar(
        lambda log_t: at(log_t)[0].mean(),
        bounds=np.log(LIMITS),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return np.exp(best.x), *at(best.x)


def one_kind(samples, num_classes, gap, wrong=0):
    """The label's logit stands out by ``gap``; in the first ``wrong`` samples another's."""
    labels = torch.arange(samples) % num_classes
    logits = torch.zeros(samples, num_classes)
    places = torch.where(torch.arange(samples) < wrong, (labels + 1) % num_classes, labels)
    logits[torch.arange(samples), places] = gap
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidence_and_whether_it_is_right(dtype):
    logits, labels = draw(300, 1000, dtype=dtype)
    logits[0, [3, 7]] = 50.0  # the lower class of equal ones has it
    labels[0] = 7
    confidence, correct = confidence_and_correct(logits, labels)
    p = special.softmax(logits.double().numpy(), axis=1)
    np.testing.assert_allclose(confidence, p.max(1), rtol=1e-12)
    np.testing.assert_array_equal(correct, p.argmax(1) == labels.numpy())
    assert (float(correct[0]), float(confidence[0])) == (0, pytest.approx(0.5))
    with pytest.raises(ValueError, match="not all finite"):
        confidence_and_correct(torch.tensor([[0.0, math.inf]]), torch.tensor([0]))


# The temperature


@PROPERTY
@given(
    samples=st.sampled_from([30, 300, 1025, 1500]),
    num_classes=st.integers(2, 6),
    scale=st.sampled_from([0.3, 2.0, 10.0]),
    truth=st.sampled_from([0.3, 1.0, 5.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_temperature_is_the_best(samples, num_classes, scale, truth, dtype, seed):
    logits, labels = draw(samples, num_classes, seed, scale, truth, dtype)
    fit = fit_temperature(logits, labels)
    if fit.at_limit:  # few samples, by luck all right or worse than chance
        assert fit.temperature in (pytest.approx(LIMITS[0]), pytest.approx(LIMITS[1]))
        return
    temperature, nll, confidence = reference(logits, labels)
    assert fit.temperature == pytest.approx(temperature, rel=1e-4)
    assert float(fit.nll.mean()) == pytest.approx(nll.mean(), abs=1e-6)
    np.testing.assert_allclose(fit.confidence.numpy(), confidence, atol=1e-5)
    np.testing.assert_allclose(fit.nll.numpy(), nll, atol=2e-4, rtol=1e-4)
    assert fit.nll.dtype == fit.confidence.dtype == torch.float64


def shifted(samples, truth):
    logits, labels = draw(samples, 3, 1, truth=truth)
    return logits + 50, labels.int()  # a shift of a row says nothing


def misleading(samples):
    """Every second sample is what the search begins on; the others say the opposite."""
    logits, labels = draw(samples, 3, truth=0.2)
    logits[1::2], labels[1::2] = draw(samples // 2, 3, seed=1, scale=6.0, truth=8.0)
    return logits, labels


def large():
    logits, labels = draw(400, 5, scale=3e3, truth=40.0)
    return logits + 1e4, labels


@pytest.mark.parametrize(
    "given",
    [
        # From 1,025 and from 8,193 samples on the search begins on a part of them.
        *[shifted(samples, truth) for samples in (1024, 1500, 8192, 10_000) for truth in (0.4, 1.0, 3.0)],
        *[misleading(samples) for samples in (1500, 10_000)],
        large(),
    ],
)
def test_temperature_whatever_the_search_begins_on(given):
    temperature, nll, confidence = reference(*given)
    fit = fit_temperature(*given)
    assert not fit.at_limit
    assert fit.temperature == pytest.approx(temperature, rel=1e-4)
    assert float(fit.nll.mean()) == pytest.approx(nll.mean(), abs=1e-6, rel=1e-5 if nll.mean() > 10 else 0)
    np.testing.assert_allclose(fit.confidence.numpy(), confidence, atol=1e-5)


@pytest.mark.parametrize("samples", [300, 1500, 10_000])
def test_few_errors_in_a_part_that_has_none(samples):
    """The part is never wrong, so the search begins at the limit and must come back."""
    logits, labels = one_kind(samples, 3, gap=2.0)
    labels[1::100] = (labels[1::100] + 1) % 3
    fit = fit_temperature(logits, labels)
    # p / (1 - p) of the largest class is 99, and e^(2 / T) twice that of one of the two others.
    assert fit.temperature == pytest.approx(2 / math.log(2 * 99), rel=1e-5)
    assert not fit.at_limit


@pytest.mark.parametrize("factor", [0.2, 7.0])
@pytest.mark.parametrize("samples", [200, 1500])
def test_scaled_logits_scale_the_temperature(factor, samples):
    logits, labels = draw(samples, 4, dtype=torch.float64)
    plain, scaled = fit_temperature(logits, labels), fit_temperature(logits * factor, labels)
    assert scaled.temperature == pytest.approx(plain.temperature * factor, rel=2e-5)
    torch.testing.assert_close(scaled.nll, plain.nll, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("best", [0.9925, 1.0075])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_last_small_step_is_exact(best, num_classes):
    """To second order, without another look."""
    logits, labels = draw(300, num_classes, scale=3.0, truth=1.7, dtype=torch.float64)
    logits *= best / reference(logits, labels)[0]
    looks = []
    fit = fit_temperature(logits, labels, looks.append)
    assert sum(looks) == 300
    assert fit.temperature == pytest.approx(best, rel=1e-6)
    expected = special.log_softmax(logits.numpy() / best, axis=1)
    np.testing.assert_allclose(fit.confidence.numpy(), np.exp(expected.max(1)), atol=2e-7)


def test_confidence_is_at_most_one():
    """Where the others round away beside the largest, a step to a smaller temperature leads no further."""
    logits, labels = one_kind(400, 2, gap=0.995 * math.log(3), wrong=100)
    sure, right = one_kind(10, 2, gap=17.0)
    fit = fit_temperature(torch.cat([logits, sure]), torch.cat([labels, right]))
    assert fit.temperature == pytest.approx(0.995, rel=1e-5)
    assert float(fit.confidence.max()) <= 1


# At the limits


@pytest.mark.parametrize("gap", [1e-3, 0.5, 2.0, 10.0, 200.0, 1e4])
@pytest.mark.parametrize("samples", [1, 300, 3000])
@pytest.mark.parametrize("wrong", [False, True])
def test_never_wrong_and_worse_than_chance_go_to_a_limit(gap, samples, wrong):
    """However confident it is: the cross-entropy falls on and on towards temperature 0, or infinity."""
    looks, limit = [], LIMITS[wrong]
    logits, labels = one_kind(samples, 3, gap, wrong * samples)
    fit = fit_temperature(logits, labels, looks.append)
    assert fit.temperature == pytest.approx(limit, rel=1e-12)
    assert fit.at_limit
    expected = special.logsumexp([0, 0, gap / limit]) - (0 if wrong else gap / limit)
    np.testing.assert_allclose(fit.nll.numpy(), expected, rtol=1e-5, atol=0 if wrong else 1e-5)
    assert sum(looks) <= 3 * samples


@pytest.mark.parametrize(
    ("truth", "best"),
    [(0.004, 0.01), (0.00995, 0.01), (0.0103, 0.0103), (97.0, 97.0), (100.5, 100.0), (400.0, 100.0)],
)
def test_best_about_a_limit(truth, best):
    """Right often enough for a finite temperature, but beyond the limits it is not looked for."""
    logits, labels = one_kind(1000, 2, gap=truth * math.log(3), wrong=250)
    fit = fit_temperature(logits, labels)
    assert fit.temperature == pytest.approx(best, rel=1e-5 if best == truth else 1e-12)
    assert fit.at_limit == (best != truth)


@pytest.mark.parametrize("constant", [0.0, -3.0, 1e4])
@pytest.mark.parametrize("num_classes", [1, 2, 1000])
def test_equal_logits_have_no_slope(constant, num_classes):
    fit = fit_temperature(torch.full((10, num_classes), constant), torch.arange(10) % num_classes)
    assert fit.temperature == 1
    assert not fit.at_limit
    np.testing.assert_allclose(fit.nll.numpy(), math.log(num_classes), atol=1e-6)
    np.testing.assert_allclose(fit.confidence.numpy(), 1 / num_classes, atol=1e-6)


# How it looks at the data


def test_temperature_one_takes_one_look():
    looks = []
    logits, labels = one_kind(3000, 2, gap=math.log(3))
    labels[::4] = 1 - labels[::4]  # a quarter is wrong, of any part as well
    fit = fit_temperature(logits, labels, looks.append)
    assert fit.temperature == pytest.approx(1, rel=1e-5)
    assert sum(looks) == 3000


@pytest.mark.parametrize("samples", [7, 1500, 9000])
def test_small_blocks_change_nothing(monkeypatch, samples):
    logits, labels = draw(samples, 3, truth=2.5)
    looks = []
    whole = fit_temperature(logits, labels, looks.append)
    assert sum(looks) % samples == 0
    assert sum(looks) <= 5 * samples
    blocks = []
    monkeypatch.setattr("lskd.base.tensors.BLOCK", 32)
    fit = fit_temperature(logits, labels, blocks.append)
    assert max(blocks) <= 10
    assert sum(blocks) == sum(looks)
    assert fit.temperature == pytest.approx(whole.temperature, rel=1e-6)
    torch.testing.assert_close(fit.nll, whole.nll, atol=1e-6, rtol=1e-6)
    monkeypatch.setattr("lskd.base.tensors.BLOCK", 1)
    if samples < 100:
        assert fit_temperature(logits, labels).temperature == pytest.approx(whole.temperature, rel=1e-6)


def test_logits_stay_as_they_are():
    logits, labels = draw(1500, 3)
    before = logits.clone()
    fit = fit_temperature(logits.requires_grad_(), labels)
    assert torch.equal(logits, before)
    assert not fit.nll.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("samples", [20, 1500])
def test_logits_that_are_not_finite_are_refused(bad, samples):
    logits, labels = draw(samples, 3)
    logits[13, 1] = bad
    with pytest.raises(ValueError, match="not all finite"):
        fit_temperature(logits, labels)


# The expected calibration error


@PROPERTY
@given(
    samples=st.integers(1, 200),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["any", "edges", "near one", "extremes"]),
)
def test_contributions_to_the_calibration_error(samples, seed, kind):
    generator = np.random.default_rng(seed)
    confidence = {
        "any": generator.uniform(size=samples),
        "edges": generator.integers(0, BINS + 1, samples) / BINS,
        "near one": 1 - generator.exponential(1e-6, samples).clip(max=1),
        "extremes": generator.integers(0, 2, samples) * 1.0,
    }[kind]
    confidence = torch.from_numpy(confidence).float().double()
    correct = torch.from_numpy(generator.integers(0, 2, samples)).double()
    contributions = calibration_contributions(confidence, correct)
    expected = binary_calibration_error(confidence.float(), correct.long(), n_bins=15, norm="l1")
    assert float(contributions.mean()) == pytest.approx(float(expected), abs=1e-6)
    assert contributions.dtype == torch.float64
    np.testing.assert_allclose(contributions.abs().numpy(), (correct - confidence).abs().numpy(), atol=1e-12)


def test_calibration_error_by_hand():
    """Two bins; in the second the errors of both signs cancel."""
    confidence = torch.tensor([0.5, 0.5, 0.9, 0.9], dtype=torch.float64)
    contributions = calibration_contributions(confidence, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    np.testing.assert_allclose(contributions.numpy(), [0.5, 0.5, 0.1, 0.1], atol=1e-12)
    contributions = calibration_contributions(confidence, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    np.testing.assert_allclose(contributions.numpy(), [0, 0, -0.1, 0.9], atol=1e-12)
