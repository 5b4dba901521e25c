"""Images that are made again from their seeds: the same pixels in any order, by any number of workers."""

import itertools
import random

import numpy as np
import pytest
import torch
from timm.data import create_dataset, create_transform

from lskd import LskdError
from lskd.teachers.replay import MixingPolicy, augmentation_seed
from timm_ls_kd.arguments import SoftLabelsConfig
from timm_ls_kd.data import CheckedReader
from timm_ls_kd.loader import EpochSampler
from timm_ls_kd.store import KeySampler, ReplayedDataset

pytestmark = pytest.mark.unit
BOTH = MixingPolicy(0.8, 1.0, 0.9, 0.5)
COLOURS = {"color_jitter_prob": 0.8, "grayscale_prob": 0.3, "gaussian_blur_prob": 0.5}


@pytest.fixture
def loader(make_loader, tmp_path):
    def make(seed, flags="", mixing=BOTH, **more):
        """More: what timm's own script alone makes the transform with."""
        config = SoftLabelsConfig(path=tmp_path, seed=5, mixing=mixing, mixing_off_epoch=2)
        found = make_loader("--scale", 0.3, 1, "--seed", seed, *flags.split(), stored=config)
        if more:
            options = {"is_training": True, "use_prefetcher": True, "scale": (0.3, 1.0), **more}
            found.dataset.transform = create_transform((3, 24, 24), **options)
        return found

    return make


def images(loader, epoch):
    """Return image, label of the partner and share by key."""
    loader.sampler.set_epoch(epoch)
    found = {}
    for pixels, targets in loader:
        mixed = targets.partner_labels is not None
        for row, key in enumerate(targets.keys.tolist()):
            rest = (int(targets.partner_labels[row]), float(targets.weights[row])) if mixed else ()
            found[key] = pixels[row].clone(), int(targets.labels[row]), *rest
    return found


AUGMENTATIONS = {
    "RandAugment": "--aa rand-m9-mstd0.5-inc1",
    "AutoAugment": "--aa original-mstd0.5",
    "AugMix": "--aa augmix-m5-w4-d2",
    "3-Augment": "--aa 3a --color-jitter 0.3",
    "colours": "",
    "flips, random interpolation": "--vflip 0.5",
    "erasing": "--no-prefetcher --reprob 0.8 --recount 2",
    "erasing by colour": "--no-prefetcher --reprob 0.8 --recount 2 --remode rand",
    "key points": "--train-crop-mode rkrc",
}


@pytest.mark.parametrize("mixing", [MixingPolicy(), BOTH], ids=["plain", "mixed"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_pixels_are_the_same_in_any_order(loader, name, mixing):
    more = {"mixing": mixing} | (COLOURS if name == "colours" else {})
    first = images(loader(1, AUGMENTATIONS[name], **more), 1)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    other = loader(2, f"{AUGMENTATIONS[name]} --batch-size 6", **more)
    images(other, 0)
    second = images(other, 1)
    assert first.keys() == second.keys() == set(range(96, 192))
    assert list(first) != list(second)
    for key, (pixels, *rest) in first.items():
        assert torch.equal(pixels, second[key][0])
        assert tuple(rest) == second[key][1:]
    # The test can fail: an epoch later the images are others.
    later = images(other, 2)
    assert sum(torch.equal(first[key][0], later[key + 96][0]) for key in first) < 20


def test_worker_processes_make_the_same_images(loader):
    here = loader(1, "--aa rand-m9-mstd0.5")
    workers = loader(2, "--aa rand-m9-mstd0.5 --batch-size 12 --workers 2")
    for epoch in range(2):  # the second time with workers that live on
        expected, found = images(here, epoch), images(workers, epoch)
        assert all(torch.equal(pixels, found[key][0]) for key, (pixels, *_) in expected.items())


def test_mixed_images_are_made_of_their_parts(loader):
    plain = images(loader(1, mixing=MixingPolicy()), 1)
    mixed = images(loader(1), 1)
    kinds = set()
    for sample in range(96):
        seed = augmentation_seed(5, 1, sample)
        mixing = BOTH.draw(seed, sample, 96)
        pixels, label, partner_label, weight = mixed[96 + sample]
        own = plain[96 + sample]
        assert label == own[1]
        if mixing is None:
            assert torch.equal(pixels, own[0])
            assert weight == 1
            continue
        kinds.add(mixing.kind)
        other = plain[96 + mixing.partner]
        assert partner_label == other[1]
        if mixing.kind == "mixup":
            assert weight == pytest.approx(mixing.weight)
            # Both are rounded to whole bytes.
            torch.testing.assert_close(pixels, own[0] * weight + other[0] * (1 - weight), atol=0.012, rtol=0)
        else:
            top, bottom, left, right = mixing.box(24, 24)
            expected = own[0].clone()
            expected[:, top:bottom, left:right] = other[0][:, top:bottom, left:right]
            assert torch.equal(pixels, expected)
            assert weight == pytest.approx(1 - (bottom - top) * (right - left) / 24**2)
    assert kinds == {"mixup", "cutmix"}


def test_mixing_ends_with_its_epoch(loader):
    last = images(loader(1), 2)
    assert all(weight == 1 for *_, weight in last.values())


def test_an_unreadable_image_is_not_replaced_by_the_next(own_digits):
    dataset = create_dataset("", root=str(own_digits), split="train")
    broken = ReplayedDataset(dataset, 0, MixingPolicy(), 0)
    broken.transform = np.asarray
    assert broken[96 + 3].key == 99
    path = dataset.filename(3, absolute=True)
    with open(path, "wb") as file:
        file.write(b"not an image")
    with pytest.raises(LskdError, match=path):
        broken[96 + 3]


def test_keys_of_another_sampler():
    keys = KeySampler([2, 0, 1], 3)
    assert list(keys) == [2, 0, 1]
    keys.epoch = 4
    assert list(keys) == [14, 12, 13]
    assert len(keys) == 3


@pytest.mark.parametrize(("views", "ranks"), [(2, 1), (3, 1), (4, 2)])
def test_views_come_together_and_none_twice(views, ranks):
    """In V epochs of a length that V does not divide each process shows each key of its images once."""
    samples = 10
    samplers = [EpochSampler(samples, 7, rank, ranks, views) for rank in range(ranks)]
    seen = []
    for sampler in samplers:
        keys = []
        for epoch in range(views, 2 * views):  # not the first turn
            sampler.set_epoch(epoch)
            drawn = list(sampler)
            assert len(drawn) == len(sampler) == samples // ranks
            keys += drawn
        changes = sum(one % samples != other % samples for one, other in itertools.pairwise(keys))
        assert changes == samples // ranks - 1
        seen += keys
    assert sorted(seen) == list(range(views * samples, 2 * views * samples))


@pytest.mark.parametrize("mixing", [MixingPolicy(), BOTH], ids=["plain", "mixed"])
def test_views_of_one_decoding_are_those_of_their_epochs(loader, monkeypatch, mixing):
    plain = loader(1, mixing=mixing)
    expected = images(plain, 0) | images(plain, 1)
    together = loader(1, mixing=mixing)
    together.sampler.views, opened = 2, []
    original = CheckedReader.opened
    monkeypatch.setattr(CheckedReader, "opened", lambda *which: opened.append(which) or original(*which))
    found = images(together, 0)
    drawn = (mixing.draw(augmentation_seed(5, *divmod(key, 96)), key % 96, 96) for key in found)
    assert len(opened) == 48 + sum(each is not None for each in drawn)  # and the partners, each another
    found |= images(together, 1)
    assert found.keys() == expected.keys()
    for key, (pixels, *rest) in found.items():
        assert torch.equal(pixels, expected[key][0])
        assert tuple(rest) == expected[key][1:]
