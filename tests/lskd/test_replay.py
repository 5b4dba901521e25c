"""Seeds of samples, replayed generators and mixing that follows from a seed alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lskd.teachers.replay import (
    MixingPolicy,
    augmentation_seed,
    generator_seeds,
    mixed_image,
    mixed_targets,
    replayed,
    seed_generators,
)

pytestmark = pytest.mark.unit
BOTH = MixingPolicy(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.9, switch_probability=0.3)


def splitmix(value):
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**31), st.lists(st.integers(0, 2**40), min_size=1))
def test_seed_is_the_documented_hash_in_plain_integers(base, epoch, samples):
    expected = [splitmix(splitmix(splitmix(base) ^ epoch) ^ sample) >> 32 for sample in samples]
    assert augmentation_seed(base, epoch, np.array(samples)).tolist() == expected
    assert [augmentation_seed(base, epoch, sample) for sample in samples] == expected
    epochs = np.full(len(samples), epoch)
    assert augmentation_seed(base, epochs, np.array(samples)).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_replayed_seeds_the_generators_with_these_words(seed):
    (words,) = generator_seeds(np.array([seed], np.uint32))
    with replayed(seed):
        seeded = random.random(), np.random.rand(), torch.rand(1).item()
        seed_generators(words)
        assert seeded == (random.random(), np.random.rand(), torch.rand(1).item())


def test_seeds_are_spread():
    seeds = np.concatenate([augmentation_seed(0, epoch, np.arange(5000)) for epoch in range(4)])
    assert len(np.unique(seeds)) > 0.999 * len(seeds)
    assert stats.kstest(seeds / 2**32, "uniform").pvalue > 0.01


def test_replayed_gives_the_generators_back():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with replayed(7):
        random.random(), np.random.rand(), torch.rand(1)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_mixing_follows_the_laws_that_are_asked_for():
    samples, draws = 50, []
    for epoch in range(120):
        for sample, seed in enumerate(augmentation_seed(3, epoch, np.arange(samples)).tolist()):
            draws.append((sample, BOTH.draw(seed, sample, samples)))
    mixed = [(sample, mixing) for sample, mixing in draws if mixing is not None]
    assert len(mixed) / len(draws) == pytest.approx(0.9, abs=0.02)
    cutmix = [mixing for _, mixing in mixed if mixing.kind == "cutmix"]
    assert len(cutmix) / len(mixed) == pytest.approx(0.3, abs=0.03)
    weights = [mixing.weight for _, mixing in mixed if mixing.kind == "mixup"]
    assert stats.kstest(weights, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    assert stats.kstest([mixing.weight for mixing in cutmix], "uniform").pvalue > 0.01
    assert all(mixing.partner != sample and 0 <= mixing.partner < samples for sample, mixing in mixed)
    steps = np.bincount([(mixing.partner - sample) % samples for sample, mixing in mixed], minlength=samples)
    assert stats.chisquare(steps[1:]).pvalue > 0.01
    assert BOTH.draw(5, 1, samples) == BOTH.draw(5, 1, samples)


@pytest.mark.parametrize("change", [{"mixup_alpha": -1}, {"probability": 1.5}, {"switch_probability": -0.1}])
def test_numbers_out_of_range(change):
    with pytest.raises(ValueError, match="must"):
        MixingPolicy(**change)


def test_nothing_is_mixed_where_nothing_is_asked_for():
    assert MixingPolicy().draw(1, 0, 10) is None
    assert BOTH.draw(1, 0, 1) is None
    assert MixingPolicy(1.0, probability=0.0).draw(1, 0, 10) is None
    with pytest.raises(ValueError, match="negative"):
        MixingPolicy(-1.0)


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_pixels_are_those_of_the_formula(kind, dtype, as_array):
    generator = np.random.default_rng(0)
    first, second = (generator.integers(0, 256, (3, 9, 14)).astype(dtype) for _ in range(2))
    policy = MixingPolicy(1.0, 0.0) if kind == "mixup" else MixingPolicy(0.0, 1.0)
    for seed in range(40):
        mixing = policy.draw(seed, 0, 5)
        given_ = (first, second) if as_array else (torch.from_numpy(first), torch.from_numpy(second))
        mixed, weight = mixed_image(*given_, mixing)
        assert type(mixed) is type(given_[0])
        mixed = np.asarray(mixed)
        assert mixed.dtype == dtype
        if kind == "mixup":
            assert weight == mixing.weight
            expected = first.astype(float) * weight + second.astype(float) * (1 - weight)
            np.testing.assert_allclose(mixed, expected, atol=0.51 if dtype == np.uint8 else 1e-3)
        else:
            own = (mixed == first).all(0)
            assert ((mixed == second).all(0) | own).all()
            assert weight == pytest.approx((first == mixed).all(0).mean(), abs=0.03)
    assert (first != second).any()


def test_labels_are_mixed_as_timm_mixes_them():
    from timm.data.mixup import mixup_target

    labels, weight = torch.tensor([0, 3, 2, 1]), 0.3
    expected = mixup_target(labels, 4, weight, 0.1)
    found = mixed_targets(labels, labels.flip(0), torch.full((4,), weight), 4, 0.1, "uniform")
    torch.testing.assert_close(found, expected)
