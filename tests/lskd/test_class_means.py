import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from draws import PROPERTY
from draws import draw_samples as draw
from lskd import LskdError
from lskd.analysis.classes import (
    class_confusion,
    class_mean_probabilities,
    minor_probabilities,
    propose_classes,
)

pytestmark = pytest.mark.unit


@PROPERTY
@given(
    samples=st.integers(1, 60),
    num_classes=st.integers(1, 9),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_means(samples, num_classes, seed, dtype, data):
    logits, labels = draw(samples, num_classes, seed, dtype=dtype)
    classes = data.draw(st.none() | st.permutations(range(num_classes)).map(lambda c: c[: len(c) // 2 + 1]))
    found = class_mean_probabilities(logits, labels, num_classes, classes)
    p, y = softmax(logits.double().numpy(), axis=1), labels.numpy()
    for row, c in zip(found.numpy(), range(num_classes) if classes is None else classes, strict=True):
        expected = p[y == c].mean(0) if (y == c).any() else np.full(num_classes, np.nan)
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_blocks_give_what_one_look_gives(monkeypatch):
    logits, labels = draw(200, 5)
    whole = class_mean_probabilities(logits, labels, 5, [3, 0])
    monkeypatch.setattr("lskd.base.tensors.BLOCK", 35)
    torch.testing.assert_close(class_mean_probabilities(logits, labels, 5, [3, 0]), whole)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(class_mean_probabilities(logits[order], labels[order], 5, [3, 0]), whole)


def test_other_classes_are_not_even_looked_at():
    logits, labels = draw(50, 4)
    logits[labels != 2] = torch.nan
    assert bool(torch.isfinite(class_mean_probabilities(logits, labels, 4, [2])).all())


def test_memory_does_not_grow_with_the_samples(tmp_path):
    """Logits mapped from a file: what numpy maps, torch reads in blocks."""
    peaks = []
    for samples in (20_000, 80_000):
        file = np.lib.format.open_memmap(tmp_path / f"{samples}.npy", "w+", np.float16, (samples, 100))
        file[:] = 1
        file.flush()
        logits = torch.from_numpy(np.load(tmp_path / f"{samples}.npy", mmap_mode="r+"))
        labels = torch.arange(samples) % 100
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            class_mean_probabilities(logits, labels, 100)
        peaks.append(max(event.self_cpu_memory_usage for event in profiled.events()))
    assert peaks[1] < 2 * peaks[0]
    assert peaks[1] < 80_000 * 100 * 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_named(bad):
    logits, labels = draw(50, 4)
    logits[37, 1] = bad
    with pytest.raises(ValueError, match="sample 37"):
        class_mean_probabilities(logits, labels, 4)


@pytest.mark.parametrize("classes", [[3], [-1], [1, 1]])
def test_classes_that_there_are_not_or_named_twice(classes):
    with pytest.raises(ValueError, match="classes"):
        class_mean_probabilities(*draw(6, 3), 3, classes)


def test_minor_probabilities():
    logits, labels = draw(80, 6)
    means = class_mean_probabilities(logits, labels, 6, [4, 1])
    minor = minor_probabilities(means, [4, 1]).numpy()
    expected = [np.delete(means[0].numpy(), 4), np.delete(means[1].numpy(), 1)]
    np.testing.assert_array_equal(minor, expected)
    np.testing.assert_allclose(minor.sum(1) + means[[0, 1], [4, 1]].numpy(), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="go with"):
        minor_probabilities(means)
    with pytest.raises(ValueError, match="classes"):
        minor_probabilities(means, [6, 1])


def test_confusion_and_choice_against_a_search_of_all():
    for seed in range(20):
        means = [class_mean_probabilities(*draw(300, 7, seed + 50 * t), 7) for t in range(3)]
        stacked = np.mean([m.numpy() for m in means], axis=0)
        confusion = class_confusion(means)
        both = {(a, b): (stacked[a, b] + stacked[b, a]) / 2 for a in range(7) for b in range(7) if a != b}
        for pair, value in both.items():
            assert float(confusion[pair]) == pytest.approx(value, rel=1e-9)
        a, b, c = propose_classes(confusion)
        assert both[a, b] == max(both.values())
        others = [k for k in range(7) if k not in (a, b)]
        assert c == min(others, key=lambda k: both[a, k] + both[b, k])


@pytest.mark.parametrize("shapes", [[(2,)], [(2, 3)], [(2, 2), (3, 3)], []])
def test_means_of_other_shapes_have_no_confusion(shapes):
    with pytest.raises(ValueError, match=r"must be \(K, K\)"):
        class_confusion(torch.zeros(shape) for shape in shapes)


def test_absent_classes_are_never_chosen():
    logits, labels = draw(100, 6)
    labels[labels == 2] = 3
    confusion = class_confusion([class_mean_probabilities(logits, labels, 6)])
    assert bool(confusion[2].isnan().all())
    assert 2 not in propose_classes(confusion)


def test_too_few_classes():
    with pytest.raises(LskdError, match="needs three"):
        propose_classes(class_confusion([class_mean_probabilities(*draw(30, 2), 2)]))
    with pytest.raises(ValueError, match="K, K"):
        class_confusion([])
