import copy
import math
import pickle
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import special
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.classification import multiclass_calibration_error

from draws import DEFINITIONS, PROPERTY, draw_samples, every_definition
from lskd import Stability, measure_teacher, smooth_targets
from lskd.analysis import calibration as _calibration
from lskd.analysis import measures as _measures
from lskd.analysis.by_sample import Softmax, by_sample
from lskd.analysis.classes import class_mean_probabilities, class_separation

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:stability leaves out:UserWarning")]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
draw = partial(draw_samples, lead=0.3)


@dataclass
class Plain:
    """The numbers of each sample, from their definitions."""

    nll: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    rank: np.ndarray
    distance: np.ndarray

    @classmethod
    def of(cls, logits, labels):
        logits, labels = logits.double().numpy(), labels.numpy()
        log_p = special.log_softmax(logits, axis=1)
        order = np.argsort(-logits, axis=1, kind="stable")
        p = np.exp(log_p)
        means = {c: p[labels == c].mean(0) for c in np.unique(labels)}
        return cls(
            nll=-log_p[np.arange(len(labels)), labels],
            entropy=special.entr(p).sum(1),
            confidence=p.max(1),
            rank=(order == labels[:, None]).argmax(1),
            distance=np.array([np.linalg.norm(row - means[c]) for row, c in zip(p, labels, strict=True)]),
        )


def same(first, second, atol=1e-7):
    for name in ("nll", "entropy", "confidence", "rank", "distance", "between_distance"):
        one, two = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(one, two, atol=atol, rtol=atol, equal_nan=True, msg=name)
    if first.mean_influence is not None:
        torch.testing.assert_close(first.mean_influence, second.mean_influence, atol=10 * atol, rtol=0)
    assert first.calibrated.temperature == pytest.approx(second.calibrated.temperature, rel=1e-5)


# Against the definitions


@PROPERTY
@given(
    num_classes=st.integers(1, 9),
    samples=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1.0, 8.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    in_order=st.booleans(),
    seed=st.integers(0, 99),
)
@example(2, 1, 1.0, torch.float32, False, True, 0)
@example(2, 60, 1e4, torch.float16, True, False, 1)
@example(9, 60, 1.0, torch.float16, True, False, 2)
def test_definitions(reference, num_classes, samples, scale, dtype, ties, in_order, seed):
    logits, labels = draw(samples, num_classes, seed, scale, dtype)
    if ties:
        logits = logits.round()
    if in_order:
        labels = labels.sort().values
    before = logits.clone(), labels.clone()
    measures = measure_teacher(logits, labels, influence=seed % 2 == 0)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
    plain = Plain.of(logits, labels)
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    for name in ("nll", "entropy", "confidence", "distance"):
        found = getattr(measures, name)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), getattr(plain, name), atol=atol, rtol=atol, err_msg=name)
    np.testing.assert_array_equal(measures.rank.numpy(), plain.rank)
    np.testing.assert_array_equal(measures.correct.numpy(), plain.rank == 0)
    np.testing.assert_allclose(measures.target_probability.numpy(), np.exp(-plain.nll), atol=2e-6)
    assert measures.samples == samples
    assert measures.counts.tolist() == labels.bincount(minlength=num_classes).tolist()
    for k in (1, 2, 5, num_classes):
        assert measures.topk(k) == pytest.approx((plain.rank < k).mean(), abs=1e-12)
    for definition in DEFINITIONS:
        np.testing.assert_allclose(
            measures.class_values(definition).numpy(),
            reference.every_class(logits, labels, num_classes, definition),
            atol=atol,
        )
        expected = reference.stability(logits.double().numpy(), labels.numpy(), num_classes, definition)
        np.testing.assert_allclose(1 - measures.one_minus_stability(definition), expected, atol=atol)
        metric = Stability(num_classes, definition)
        metric.update(logits, labels)
        np.testing.assert_allclose(
            1 - measures.one_minus_stability(definition), float(metric.compute()), atol=2e-6
        )


@PROPERTY
@given(
    num_classes=st.integers(2, 9),
    samples=st.integers(1, 200),
    scale=st.sampled_from([0.3, 2.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_calibration_error(num_classes, samples, scale, dtype, ties, seed):
    logits, labels = draw(samples, num_classes, seed, scale, dtype)
    if ties:
        logits = logits.round()
    measures = measure_teacher(logits, labels)

    def expected(probabilities):
        # Of equal ones torch's argmax may take any: lower all but the first by less than a bin's edge.
        first = torch.nn.functional.one_hot(logits.double().argmax(1), num_classes).bool()
        lowered = torch.where(first, probabilities, probabilities * (1 - 1e-6)).float()
        return float(multiclass_calibration_error(lowered, labels, num_classes, n_bins=15, norm="l1"))

    assert measures.calibration_error == pytest.approx(expected(logits.double().softmax(1)), abs=2e-6)
    calibrated = (logits.double() / measures.calibrated.temperature).softmax(1)
    np.testing.assert_allclose(measures.calibrated.confidence.numpy(), calibrated.amax(1), atol=1e-5)
    if scale == 2.0 and not ties:
        assert measures.calibrated_error == pytest.approx(expected(calibrated), abs=2e-5)
        assert float(measures.calibrated.nll.mean()) <= float(measures.nll.mean()) + 1e-7


def test_temperature_is_that_of_all_samples():
    logits, labels = draw(1500, 4)
    fit = measure_teacher(logits, labels).calibrated
    assert fit.temperature == pytest.approx(_calibration.fit_temperature(logits, labels).temperature)
    assert fit.nll.shape == fit.confidence.shape == (1500,)


def test_equal_logits_the_lower_class_comes_first():
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0, 2.0]]).repeat(5, 1)
    measures = measure_teacher(logits, torch.arange(5))
    assert measures.rank.tolist() == [1, 2, 4, 3, 0]
    assert logits[0].argsort(descending=True, stable=True).tolist() == [4, 0, 1, 3, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -7.5, 1e4])
def test_equal_rows(dtype, value):
    """Nothing varies: neither within classes nor between them, and not by rounding either."""
    logits = torch.full((40, 3), value, dtype=dtype)
    logits[:, 1] += 1
    measures = measure_teacher(logits, torch.arange(40) % 3, influence=True)
    for definition in ("target_std", "vector_l2", "between_vector_l2"):
        assert measures.one_minus_stability(definition) == pytest.approx(0, abs=1e-7)
        np.testing.assert_allclose(measures.contributions(definition).numpy(), 0, atol=1e-6)


def test_one_sample():
    measures = measure_teacher(torch.tensor([[1.0, 3.0]]), torch.tensor([1]), influence=True)
    assert measures.topk(1) == 1
    assert measures.nll.tolist() == pytest.approx([math.log1p(math.exp(-2))], abs=1e-7)
    assert measures.one_minus_stability("between_vector_l2") == pytest.approx(0, abs=1e-7)
    for definition in ("target_std", "vector_l2", "between_target_std"):
        assert math.isnan(measures.one_minus_stability(definition))
        assert measures.contributions(definition).isnan().all()


@every_definition
def test_classes_of_no_and_of_one_sample(reference, definition):
    logits, labels = draw(60, 7)
    labels[(labels == 2) | (labels == 5) | (labels == 6)] = 0
    labels[11] = 6
    measures = measure_teacher(logits, labels, influence=True)
    values = measures.class_values(definition)
    within = definition in ("target_std", "vector_l2")
    assert values.isnan().nonzero().flatten().tolist() == ([2, 5, 6] if within else [2, 5])
    expected = reference.stability(logits.double().numpy(), labels.numpy(), 7, definition)
    assert 1 - measures.one_minus_stability(definition) == pytest.approx(expected, abs=1e-6)
    contributions = measures.contributions(definition)
    assert float(contributions[11]) == pytest.approx(1 - expected, abs=1e-6)


def test_unknown_definition():
    measures = measure_teacher(*draw(20, 3))
    for ask in (measures.class_values, measures.one_minus_stability):
        with pytest.raises(ValueError, match=r"eq2.*target_std.*between_target_std"):
            ask("eq2")


# Smoothing


@pytest.mark.parametrize("num_classes", [2, 10])
def test_equivalent_smoothing(num_classes):
    """Mueller et al.: the mean over samples of sum_k (1 - y_k) p_k K / (K - 1)."""
    logits, labels = draw(100, num_classes)
    p, one_hot = special.softmax(logits.double().numpy(), axis=1), np.eye(num_classes)[labels]
    expected = ((1 - one_hot) * p * num_classes / (num_classes - 1)).sum(1).mean()
    measures = measure_teacher(logits, labels)
    assert measures.equivalent_smoothing() == pytest.approx(expected, abs=1e-6)
    assert measures.equivalent_smoothing("uniform") == measures.equivalent_smoothing()
    # Smoothed by the paper's convention, 1 - alpha is on the label.
    expected = 1 - (one_hot * p).sum(1).mean()
    assert measures.equivalent_smoothing("paper") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("convention", ["paper", "uniform"])
def test_equivalent_smoothing_of_an_ideal_teacher(convention):
    targets = smooth_targets(torch.arange(10), 10, 0.1, convention, torch.float64)
    measures = measure_teacher(targets.log(), torch.arange(10))
    assert measures.equivalent_smoothing(convention) == pytest.approx(0.1, abs=1e-9)


def test_equivalent_smoothing_refuses():
    with pytest.raises(ValueError, match=r"'szegedy'.*'paper' or 'uniform'"):
        measure_teacher(*draw(20, 3)).equivalent_smoothing("szegedy")
    with pytest.raises(ValueError, match="at least 2"):
        measure_teacher(*draw(20, 1)).equivalent_smoothing()


# Any order, kind of memory and size


def test_shuffled_is_sorted():
    logits, labels = draw(300, 6)
    shuffled = measure_teacher(logits, labels, influence=True)
    order = labels.argsort(stable=True)
    in_order = measure_teacher(logits[order], labels[order], influence=True)
    for name in ("nll", "entropy", "confidence", "rank", "distance"):
        torch.testing.assert_close(getattr(shuffled, name)[order], getattr(in_order, name), msg=name)
    torch.testing.assert_close(shuffled.mean_influence[:, order], in_order.mean_influence, atol=1e-7, rtol=0)
    torch.testing.assert_close(shuffled.between_distance, in_order.between_distance)
    for definition in DEFINITIONS:
        torch.testing.assert_close(
            shuffled.contributions(definition)[order], in_order.contributions(definition), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("chunk", [1, 35])
@pytest.mark.parametrize("in_order", [True, False])
def test_small_blocks_change_nothing(monkeypatch, reference, in_order, chunk, kept):
    logits, labels = draw(120, 7)
    labels[labels == 3] = 2
    if in_order:
        labels = labels.sort().values
    whole = measure_teacher(logits, labels, influence=True)
    monkeypatch.setattr("lskd.base.tensors.BLOCK", chunk)
    monkeypatch.setattr(_measures, "_KEPT", kept)
    blocks = measure_teacher(logits, labels, influence=True)
    same(blocks, whole)
    expected = reference.stability(logits.double().numpy(), labels.numpy(), 7, "vector_l2")
    assert 1 - blocks.one_minus_stability("vector_l2") == pytest.approx(expected, abs=1e-6)


def test_one_large_class():
    """Two blocks, each of more rows than a float32 sum in a row could bear."""
    samples = 200_000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, 2, generator=generator) * 0.01
    logits[:, 0] += 2
    measures = measure_teacher(logits, torch.zeros(samples).long())
    p = logits.double().softmax(1)
    distance = (p - p.mean(0)).norm(dim=1)
    torch.testing.assert_close(measures.distance, distance, atol=3e-7, rtol=0)
    assert measures.class_values("between_vector_l2")[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_logits_mapped_from_a_file(tmp_path, in_order, dtype, mode):
    logits, labels = draw(200, 5, dtype=getattr(torch, dtype))
    if in_order:
        labels = labels.sort().values
    path = tmp_path / "logits.bin"
    logits.numpy().tofile(path)
    before = path.read_bytes()
    mapped = torch.from_numpy(np.memmap(path, dtype=dtype, mode=mode, shape=(200, 5)))
    same(measure_teacher(mapped, labels, influence=True), measure_teacher(logits, labels, influence=True))
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_other_integers_and_layouts(dtype):
    logits, labels = draw(80, 5)
    measures = measure_teacher(logits.T.contiguous().T.requires_grad_(), labels.to(dtype), influence=True)
    assert measures.labels.dtype == torch.int64
    assert not measures.nll.requires_grad
    same(measures, measure_teacher(logits, labels, influence=True))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_as_many_classes_as_imagenet_21k(reference):
    """Means of all 21,843 classes would be 477 million numbers; few classes have samples here."""
    num_classes, samples = 21_843, 60
    logits, labels = draw(samples, num_classes, dtype=torch.float16)
    labels = labels[torch.arange(samples) // 3]
    with Largest() as largest:
        measures = measure_teacher(logits, labels, influence=True)
    assert largest.numbers <= samples * num_classes
    plain = Plain.of(logits, labels)
    for name in ("nll", "entropy", "confidence", "distance"):
        np.testing.assert_allclose(getattr(measures, name).numpy(), getattr(plain, name), atol=1e-5)
    np.testing.assert_array_equal(measures.rank.numpy(), plain.rank)
    present, dense = labels.unique(return_inverse=True)
    for definition in DEFINITIONS:
        values = measures.class_values(definition)
        assert values.shape == (num_classes,)
        assert (~values.isnan()).nonzero().flatten().tolist() == present.tolist()
        assert len(measures.contributions(definition)) == samples
    p = logits.double().softmax(1).numpy()
    expected = [np.linalg.norm(p[dense == i].mean(0) - p.mean(0)) for i in range(len(present))]
    np.testing.assert_allclose(measures.between_distance[present].numpy(), expected, atol=1e-7)


def test_copies_and_pickles():
    measures = measure_teacher(*draw(40, 4), influence=True)
    for other in (copy.deepcopy(measures), pickle.loads(pickle.dumps(measures))):  # noqa: S301
        same(other, measures)
        assert torch.equal(other.contributions("vector_l2"), measures.contributions("vector_l2"))


@pytest.mark.parametrize("influence", [False, True])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_progress(influence, scale):
    """However often the search for a temperature looks: a bar of this length is full at the end."""
    logits, labels = draw(1500, 4, scale=scale)
    seen, looks = [], []
    measures = measure_teacher(logits, labels, influence=influence, progress=seen.append)
    _calibration.fit_temperature(logits, labels, looks.append)
    assert sum(looks) > 1500
    assert sum(seen) == 1500 * (2 + influence)
    assert min(seen) > 0
    assert (measures.mean_influence is not None) == influence


# What does not fit is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_not_finite_are_named_by_the_lowest_sample(bad, dtype):
    logits, labels = draw(40, 3, dtype=dtype)
    labels[7], labels[23] = 2, 0  # class 0 is looked at before class 2
    logits[7, 1] = logits[23, 0] = bad
    with pytest.raises(ValueError, match=r"sample 7 are not all finite; \w+"):
        measure_teacher(logits, labels)
    logits[7, 1] = 0
    with pytest.raises(ValueError, match=r"sample 23\b"):
        measure_teacher(logits, labels.sort().values)
    with pytest.raises(ValueError, match=r"sample 2543\b"):  # far in
        measure_teacher(torch.cat([draw(2520, 3)[0].to(dtype), logits]), torch.arange(2560) % 3)


def test_logits_too_large_for_their_difference():
    with pytest.raises(ValueError, match="too large"):
        measure_teacher(torch.tensor([[3e38, -3e38], [0.0, 0.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_offset_of_the_logits_changes_no_measure(dtype):
    logits, labels = draw(300, 8, dtype=torch.float64)
    shifted = (logits + 1e6).to(dtype)
    logits = shifted.double() - 1e6  # float32 has rounded by now
    plain, found = (measure_teacher(z, labels, influence=True) for z in (logits, shifted))
    tolerance = {torch.float64: 1e-8, torch.float32: 2e-6}[dtype]
    for name in ("top1", "top5", "nll", "entropy", "ece", "calibrated_nll", "calibrated_ece", *DEFINITIONS):
        one, other = found.contributions(name), plain.contributions(name)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance, msg=name)
    for name in DEFINITIONS:
        assert found.one_minus_stability(name) == pytest.approx(
            plain.one_minus_stability(name), abs=tolerance
        )
    assert found.calibrated.temperature == pytest.approx(plain.calibrated.temperature, rel=10 * tolerance)
    for temperature in (0.5, 4.0):
        one, other = (
            by_sample(lambda z, own, t=temperature: Softmax(z / t).of(own).exp(), rows, labels=labels)
            for rows in (shifted, logits)
        )
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    one, other = (class_mean_probabilities(z, labels, 8) for z in (shifted, logits))
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    one, other = (class_separation(z, labels, [(0, 1), (2, 3)]) for z in (shifted, logits))
    torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)
