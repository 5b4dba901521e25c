"""The separation of classes against NumPy, contributions against weighted samples, and Fig. 1's axis."""

import numpy as np
import pytest
import torch

from lskd import LskdError
from lskd.analysis.classes import class_separation, nearest_classes
from lskd.analysis.projection import project

pytestmark = pytest.mark.unit


def examples(sizes=(9, 14, 6), shift=2.0, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    generator.shuffle(labels)
    logits = generator.normal(size=(len(labels), len(sizes))) + shift * np.eye(len(sizes))[labels]
    return logits, labels


def directly(logits, labels, a, b):
    u = logits[:, a] - logits[:, b]
    first, second = u[labels == a], u[labels == b]
    within = np.concatenate([first - first.mean(), second - second.mean()])
    return (first.mean() - second.mean()) / np.sqrt((within**2).sum() / (len(within) - 2))


def test_it_is_the_distance_of_means_in_pooled_standard_deviations():
    logits, labels = examples()
    pairs = [(0, 1), (2, 1)]
    for some in (pairs[:1], pairs[1:], pairs):
        found = class_separation(torch.from_numpy(logits), torch.from_numpy(labels), some)
        expected = np.mean([directly(logits, labels, *pair) for pair in some])
        assert float(found.mean()) == pytest.approx(expected)


def test_contributions_are_the_samples_influence():
    """Repeating one sample moves the separation as its contribution says, to first order."""
    logits, labels = examples(sizes=(300, 400, 350))
    pairs = [(0, 1), (1, 2)]
    found = class_separation(torch.from_numpy(logits), torch.from_numpy(labels), pairs)
    n = len(labels)

    def plugged(weights):
        """The separation of a weighted sample, its variance as a function of weights alone."""
        values = []
        for a, b in pairs:
            u = logits[:, a] - logits[:, b]
            size = {c: (labels == c).sum() for c in (a, b)}
            squares, means = 0.0, {}
            for c in (a, b):
                w = weights * (labels == c)
                means[c] = (w * u).sum() / w.sum()
                # Classes are fixed: their share stays whatever the weights of single samples.
                squares += size[c] * (w * (u - means[c]) ** 2).sum() / w.sum()
            values.append((means[a] - means[b]) / np.sqrt(squares / (size[a] + size[b] - 2)))
        return np.mean(values)

    step = 1e-6
    for i in (0, 17, 500):
        weights = np.full(n, 1 / n)
        weights[i] += step
        numeric = (plugged(weights) - plugged(np.full(n, 1 / n))) / step
        assert float(found[i] - found.mean()) == pytest.approx(numeric, rel=1e-3, abs=1e-4)


def test_scale_and_bias_of_the_logits_change_nothing():
    logits, labels = (torch.from_numpy(array) for array in examples())
    before = class_separation(logits, labels, [(0, 2)])
    after = class_separation(0.3 * logits + torch.tensor([5.0, -1.0, 2.0]), labels, [(0, 2)])
    torch.testing.assert_close(after, before)


def test_it_is_the_first_axis_of_the_projection():
    """The two logits' difference is the coordinate between the templates, up to scale and origin."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    features = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    labels = torch.arange(40) % 3
    logits = features @ weight.T
    x = project(features, weight)[:, 0]
    first, second = x[labels == 0], x[labels == 1]
    within = torch.cat([first - first.mean(), second - second.mean()])
    expected = (second.mean() - first.mean()) / (within.square().sum() / (len(within) - 2)).sqrt()
    found = class_separation(logits, labels, [(0, 1)])
    # The first axis points from the first template to the second, the difference of logits back; and the
    # separation counts from the first class to the second there.
    torch.testing.assert_close(found.mean(), expected)


def test_what_cannot_be_measured_is_refused_in_one_line():
    logits, labels = (torch.from_numpy(array) for array in examples(sizes=(5, 5, 2)))
    with pytest.raises(LskdError, match="class 2 has 2 examples"):
        class_separation(logits, labels, [(0, 1), (1, 2)])
    with pytest.raises(LskdError, match="do not differ"):
        class_separation(torch.zeros(12, 3), labels, [(0, 1)])
    with pytest.raises(LskdError, match="not all finite"):
        class_separation(torch.full((12, 3), torch.nan), labels, [(0, 1)])
    for pairs in ([], [(1, 1)], [(0, 3)]):
        with pytest.raises(ValueError, match="pair"):
            class_separation(logits, labels, pairs)


def test_nearest_classes_leave_out_a_class_without_examples():
    nan = torch.nan
    confusion = torch.tensor([[nan, 0.1, nan, 0.3], [0.1, nan, nan, 0.2], [nan] * 4, [0.3, 0.2, nan, nan]])
    assert nearest_classes(confusion) == [(0, 3), (1, 3)]
