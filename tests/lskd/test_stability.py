import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection
from torchmetrics.utilities.data import dim_zero_cat

from draws import DEFINITIONS, PROPERTY, every_definition
from draws import draw_samples as draw
from lskd import Stability
from lskd.stability import small_class_factor

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("ignore:stability leaves out:UserWarning"),
    pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning"),
]


def value(metric):
    return float(metric.compute())


# The four definitions


@PROPERTY
@given(
    definition=st.sampled_from(DEFINITIONS),
    num_classes=st.integers(1, 8),
    samples=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 8.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_definitions(reference, definition, num_classes, samples, scale, dtype, seed):
    logits, labels = draw(samples, num_classes, seed, scale, dtype)
    expected = reference.stability(logits.double().numpy(), labels.numpy(), num_classes, definition)
    result = Stability(num_classes, definition)(logits, labels)
    assert result.shape == ()
    np.testing.assert_allclose(float(result), expected, atol=2e-6)


@every_definition
def test_each_class_has_its_own_value(reference, definition):
    logits, labels = draw(60, 5)
    metric = Stability(5, definition)
    metric.update(logits, labels)
    expected = reference.every_class(logits, labels, 5, definition)
    np.testing.assert_allclose(metric.class_values().numpy(), expected, atol=1e-6)


def test_algorithm_1_as_printed():
    """The paper's own listing: sorted loader, 50 samples for each class, one class to a batch."""
    num_classes, per_class = 10, 50
    logits, _ = draw(num_classes * per_class, num_classes)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    all_std = 0
    for output, target in zip(logits.split(per_class), labels.split(per_class), strict=True):
        softmax_p = torch.nn.functional.softmax(output, dim=1)
        predict = softmax_p[:, target[0]]
        all_std += predict.std(dim=0)
    printed = 1 - all_std / num_classes
    for metric in (Stability(num_classes), Stability(num_classes, "target_std")):
        assert float(metric(logits, labels)) == pytest.approx(float(printed), abs=1e-6)


@every_definition
def test_identical_predictions_are_perfectly_stable(definition):
    metric = Stability(4, definition)
    metric.update(torch.zeros(12, 4), torch.arange(12) % 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # full classes give none
        assert value(metric) == pytest.approx(1, abs=1e-7)


def test_small_deviation_of_a_large_mean():
    """Sums of squares less the square of the sum would lose a deviation of 1e-7 beside a mean of 0.5."""
    logits = torch.zeros(3, 2, dtype=torch.float64)
    logits[:, 0] = torch.tensor([0.0, 4e-7, 8e-7])
    metric = Stability(2)
    for row in logits:
        metric.update(row.unsqueeze(0), torch.tensor([0]))
    assert float(metric.class_values()[0]) == pytest.approx(1e-7, rel=1e-4)


# What every metric must do, whatever it measures


class MetricTester:
    """The same samples in any order, split and number of parts give one value, which copies keep."""

    def __init__(self, make, reference, logits, labels):
        self.make, self.reference, self.logits, self.labels = make, reference, logits, labels

    def expected(self, rows=slice(None)):
        return self.reference(self.logits[rows].double().numpy(), self.labels[rows].numpy())

    def updated(self, *parts):
        metric = self.make()
        for rows in parts:
            metric.update(self.logits[rows], self.labels[rows])
        return metric

    def assert_has(self, metric, rows=slice(None), atol=2e-6):
        assert value(metric) == pytest.approx(self.expected(rows), abs=atol)
        assert metric.counts.dtype == torch.int64
        assert metric.counts.tolist() == self.labels[rows].bincount(minlength=metric.num_classes).tolist()

    def split(self):
        samples = len(self.labels)
        in_order = self.labels.argsort()
        shuffled = torch.randperm(samples, generator=torch.Generator().manual_seed(1))
        for order in (torch.arange(samples), in_order, shuffled):
            self.assert_has(self.updated(order))
            self.assert_has(self.updated(*order.split(max(samples // 7, 1)), order[:0]))

    def merged(self):
        """Also of disjoint classes: nobody invents a deviation for a class that only one side has seen."""
        for first in (torch.arange(len(self.labels)) < 13, self.labels < 2):
            metric = self.updated(first)
            metric.merge_state(self.updated(~first))
            self.assert_has(metric)

    def forward_is_the_batch(self):
        metric, middle = self.make(), len(self.labels) // 2
        for rows in (slice(0, middle), slice(middle, None)):
            batch = metric(self.logits[rows], self.labels[rows])
            assert float(batch) == pytest.approx(self.expected(rows), abs=2e-6)
        self.assert_has(metric)

    def copied(self):
        middle = len(self.labels) // 2
        metric = self.updated(slice(0, middle))
        for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):  # noqa: S301
            assert (type(copy), copy.definition) == (type(metric), metric.definition)
            assert value(copy) == value(metric)
            copy.update(self.logits[middle:], self.labels[middle:])
            self.assert_has(copy)
        self.assert_has(metric, slice(0, middle))
        metric.reset()
        assert not metric.counts.any()
        metric.update(self.logits, self.labels)
        self.assert_has(metric)

    def independent_of_the_model(self):
        """Which may reuse its memory, train, or run in inference mode."""
        metric, expected = self.make(), self.expected()
        middle = len(self.labels) // 2
        first, labels = self.logits[:middle].clone().requires_grad_(), self.labels[:middle].to(torch.int32)
        metric.update(first, labels)
        first.detach().zero_()
        labels.zero_()
        with torch.inference_mode():
            metric.update(self.logits[middle:] * 1, self.labels[middle:])
        assert not metric.compute().requires_grad
        assert value(metric) == pytest.approx(expected, abs=2e-6)


@every_definition
@pytest.mark.parametrize(
    ("samples", "dtype"),
    [
        (60, torch.float64),
        (60, torch.float32),
        (60, torch.float16),
        (60, torch.bfloat16),
        (9000, torch.float32),
    ],
)
@pytest.mark.parametrize(
    "check", ["split", "merged", "forward_is_the_batch", "copied", "independent_of_the_model"]
)
def test_metric(reference, definition, samples, dtype, check):
    tester = MetricTester(
        lambda: Stability(4, definition),
        lambda logits, labels: reference.stability(logits, labels, 4, definition),
        *draw(samples, 4, dtype=dtype),
    )
    getattr(tester, check)()


@every_definition
@pytest.mark.parametrize("own", [20, 0])
def test_what_ranks_exchange_makes_one(reference, definition, own):
    """One rank, which may have seen none; with processes: test_stability_distributed."""
    logits, labels = draw(60, 5)
    other = Stability(5, definition)
    other.update(logits[own:], labels[own:])
    states = [dim_zero_cat(getattr(other, name)) for name in other._reductions]
    metric = Stability(5, definition, distributed_available_fn=lambda: True)
    for rows in torch.arange(own).split(8) if own else ():  # more batches than the other rank's
        metric.update(logits[rows], labels[rows])
    with metric.sync_context(dist_sync_fn=lambda state, group: [state, states.pop(0)]):
        assert metric.counts.tolist() == labels.bincount(minlength=5).tolist()
        expected = reference.every_class(logits, labels, 5, definition)
        np.testing.assert_allclose(metric.class_values().numpy(), expected, atol=1e-6)
    assert metric.counts.sum() == own
    assert states == []


def test_a_rank_that_has_seen_none_takes_part_on_its_device():
    metric = Stability(3, "vector_l2").to("meta")
    metric.sync(distributed_available=lambda: False)
    assert [one.device.type for one in (*metric.logits, *metric.labels)] == ["meta"] * 2


@pytest.mark.parametrize("definition", [one for one in DEFINITIONS if one != "vector_l2"])
def test_more_samples_than_float32_can_count(definition):
    logits, labels = draw(3, 2)
    metric = Stability(2, definition)
    count = metric.samples if definition == "between_vector_l2" else metric.moments[0]
    count += 2**24
    metric.update(logits, labels * 0)
    assert metric.counts.tolist() == [2**24 + 3, 2**24]


def test_collection_of_all_definitions():
    logits, labels = draw(40, 3)
    collection = MetricCollection({definition: Stability(3, definition) for definition in DEFINITIONS})
    for rows in (slice(0, 15), slice(15, 30), slice(30, 40)):
        collection.update(logits[rows], labels[rows])
    for definition, result in collection.compute().items():
        torch.testing.assert_close(result, Stability(3, definition)(logits, labels))


def test_as_many_classes_as_imagenet_21k(reference):
    logits, labels = draw(200, 21_843, dtype=torch.float16)
    labels %= 3
    metric = Stability(21_843)
    for rows in torch.arange(200).split(64):
        metric.update(logits[rows], labels[rows])
    with pytest.warns(UserWarning, match="more") as caught:
        result = value(metric)
    assert result == pytest.approx(
        reference.stability(logits.double().numpy(), labels.numpy(), 21_843, "target_std"), abs=1e-6
    )
    assert str(caught[0].message).endswith(", 21, 22 and 21820 more")
    assert metric.counts.shape == (21_843,)


# Classes that cannot count


@every_definition
@pytest.mark.parametrize("single", [False, True])
def test_classes_that_cannot_count_are_named_and_left_out(reference, definition, single):
    """One sample has no deviation and no distance from its mean; between classes it counts."""
    logits, labels = draw(60, 7)
    labels[(labels == 2) | (labels == 5)] = 0
    if single:
        labels[labels == 6] = 0
        labels[7] = 6
    metric = Stability(7, definition)
    metric.update(logits, labels)
    left_out = single and definition in ("target_std", "vector_l2")
    message = r"without samples: 2, 5" + (r"; with one sample, .*: 6$" if left_out else "$")
    with pytest.warns(UserWarning, match=message):
        result = value(metric)
    expected = reference.stability(logits.numpy(), labels.numpy(), 7, definition)
    assert result == pytest.approx(expected, abs=1e-6)
    assert metric.class_values().isnan().nonzero().flatten().tolist() == [2, 5, *[6] * left_out]


@every_definition
def test_nothing_seen_is_nan(definition):
    metric = Stability(3, definition)
    assert metric.counts.tolist() == [0, 0, 0]
    with pytest.warns(UserWarning, match="without samples: 0, 1, 2"):
        assert metric.compute().isnan()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.warns(UserWarning, match="without samples: 0, 1, 2"):
        assert metric.compute().isnan()


def test_spread_over_one_class_is_nan():
    logits, labels = draw(10, 3)
    assert Stability(3, "between_target_std")(logits, labels * 0).isnan()


# What does not fit is refused, before anything is counted


@every_definition
@pytest.mark.parametrize("logit", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("label", [-1, 3, -100])
def test_the_wrong_sample_is_named(definition, logit, label):
    metric, (logits, labels) = Stability(3, definition), draw(20, 3)
    broken, wrong = logits.clone(), labels.clone()
    broken[13, 1], wrong[13] = logit, label
    with pytest.raises(ValueError, match="logits of sample 13 of this batch are not"):
        metric.update(broken, labels)
    with pytest.raises(ValueError, match=rf"\b13\b.*{label}\b"):
        metric.update(logits, wrong)
    assert metric.counts.tolist() == [0, 0, 0]


def test_labels_are_looked_at_on_every_device(monkeypatch):
    """As the logits are afterwards. A tensor of the device "meta" has no values that could be."""
    monkeypatch.setattr("lskd.stability.check_finite", None)
    with pytest.raises(RuntimeError, match="meta"):
        Stability(3).update(torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"))


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"target_std.*vector_l2.*between_vector_l2.*between_target_std"):
        Stability(3, "std")
    with pytest.raises(ValueError, match="num_classes"):
        Stability(0)
    with pytest.raises(ValueError, match="definition"):
        Stability(3, "eq2")


def test_settings_by_name_and_by_position():
    for metric in (Stability(3, "vector_l2"), Stability(num_classes=3, definition="vector_l2")):
        assert isinstance(metric, Stability)
        assert metric.definition == "vector_l2"
        assert metric.num_classes == 3
    assert Stability(3).definition == "target_std"
    assert Stability(3).higher_is_better
    assert not Stability(3).is_differentiable
    assert not Stability(3, compute_on_cpu=True, sync_on_compute=False).sync_on_compute


@every_definition
@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_an_offset_of_the_logits_costs_nothing(reference, definition, offset):
    logits, labels = draw(400, 8, dtype=torch.float64)
    expected = reference.stability(logits.numpy(), labels.numpy(), 8, definition)
    np.testing.assert_allclose(float(Stability(8, definition)(logits + offset, labels)), expected, atol=5e-8)
    rounded = (logits + offset).float()  # what float32 cannot express is lost before we see it, and no more
    expected = reference.stability(rounded.double().numpy(), labels.numpy(), 8, definition)
    np.testing.assert_allclose(float(Stability(8, definition)(rounded, labels)), expected, atol=5e-8)


@every_definition
def test_a_device_without_float64(definition, without_float64):
    logits, labels = draw(60, 5)
    expected = Stability(5, definition)(logits, labels).double()
    metric = Stability(5, definition)
    with without_float64():
        metric.to(torch.device("cpu"))
        for part in (slice(0, 20), slice(20, 60)):
            metric.update(logits[part], labels[part])
        found, counts = metric.compute(), metric.counts
        small_class_factor(counts, definition)
        metric.reset()
        metric.update(logits, labels)
        again = metric.compute()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(again.double(), expected, rtol=0, atol=1e-6)
    assert counts.tolist() == torch.bincount(labels).tolist()
