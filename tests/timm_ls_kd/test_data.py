"""Order and augmentation depend on (seed, epoch, sample) alone."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm import create_model
from timm.data import create_dataset

from lskd import LskdError
from lskd.teachers.replay import replayed
from timm_ls_kd.arguments import SoftLabelsConfig
from timm_ls_kd.data import check_data, guard
from timm_ls_kd.evaluation import evaluate_model
from timm_ls_kd.loader import EpochSampler

pytestmark = pytest.mark.unit
MIXING = ("--mixup", 0.8, "--cutmix", 1)


@pytest.fixture
def loader(make_loader):
    return partial(make_loader, "--scale", 0.3, 1, "--aa", "rand-m9-mstd0.5", "--seed", 3)


def epoch(loader, number):
    if hasattr(loader.sampler, "set_epoch"):  # validation goes straight on
        loader.sampler.set_epoch(number)
    return [(images.clone(), targets) for images, targets in loader]


def same(first, second):
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))


def test_training_shares_are_a_partition_of_each_global_batch():
    one = list(EpochSampler(96, seed=1, rank=0, world_size=1))
    shares = [list(EpochSampler(96, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(one) == list(range(96))
    for step in range(4):
        joint = {index for share in shares for index in share[8 * step : 8 * step + 8]}
        assert joint == set(one[24 * step : 24 * step + 24])
    uneven = [len(list(EpochSampler(97, 1, rank, 3))) for rank in range(3)]
    assert uneven == [32, 32, 32]


def test_validation_shares_contain_each_sample_once(make_loader):
    loaders = [make_loader(training=False, rank=rank, world_size=7) for rank in range(7)]
    assert sorted(index for loader in loaders for index in loader.sampler) == list(range(96))
    labels = torch.cat([targets for loader in loaders for _, targets in loader])
    assert labels.bincount().tolist() == [24] * 4


def test_epochs_and_seeds_differ(loader):
    first = loader()
    assert same(epoch(first, 2), epoch(loader(), 2))
    assert not same(epoch(first, 2), epoch(first, 3))
    order = [list(EpochSampler(50, seed, 0, 1)) for seed in (1, 2)]
    assert order[0] != order[1]


@pytest.mark.parametrize("mixing", [(), MIXING])
@pytest.mark.parametrize("prefetch", [(), ("--no-prefetcher",)])
def test_worker_count_does_not_matter(loader, mixing, prefetch):
    here = loader(*mixing, *prefetch)
    workers = loader(*mixing, *prefetch, "--workers", 2)
    epoch(workers, 0)  # workers that have lived for an epoch
    assert same(epoch(here, 1), epoch(workers, 1))


def test_two_processes_see_what_one_sees(loader):
    whole = epoch(loader("--batch-size", 16), 4)
    halves = [epoch(loader(rank=rank, world_size=2), 4) for rank in range(2)]
    for step, (images, targets) in enumerate(whole):
        joint = torch.stack([halves[0][step][0], halves[1][step][0]], dim=1).flatten(0, 1)
        assert torch.equal(images, joint)
        assert torch.equal(targets, torch.stack([halves[0][step][1], halves[1][step][1]], dim=1).flatten())


@pytest.mark.parametrize("workers", [0, 2])
def test_mixing_ends_when_asked(loader, workers):
    mixed = loader(*MIXING, "--mixup-off-epoch", 1, "--workers", workers)
    before, after = epoch(mixed, 0), epoch(mixed, 1)
    assert any((targets.max(1).values < 0.9).any() for _, targets in before)
    assert all(torch.allclose(targets.max(1).values, torch.tensor(0.925)) for _, targets in after)


def test_loading_leaves_the_generators_alone(loader):
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with replayed(1, 2):
        first = random.random(), np.random.rand(), torch.rand(1)
    with replayed(1, 2):
        assert first == (random.random(), np.random.rand(), torch.rand(1))
    dataset = loader()._loader.loader.dataset
    dataset.__getitems__([5, 6])
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(torch.get_rng_state(), state[2])


@pytest.mark.parametrize(
    ("flags", "training"),
    [((), True), (("--no-prefetcher",), True), (("--aa", "rand-m9-mstd0.5"), True), ((), False)],
)
def test_numpys_generator_is_seeded_where_it_counts(make_loader, monkeypatch, flags, training):
    """Against seeding it always; batches lie in memory as torch's do."""
    load = partial(make_loader, "--vflip", 0.5, "--scale", 0.3, 1, *flags, training=training)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    found = epoch(load(), 0)
    assert (np.random.get_state()[1] == before).all()
    monkeypatch.setattr("timm_ls_kd.loader._NO_NUMPY", frozenset())
    assert same(found, epoch(load(), 0))
    assert all(images.is_contiguous() and images.data_ptr() % 64 == 0 for images, _ in load())


def test_a_batch_that_is_held_stays_as_it_is(loader):
    """Memory is used again, but not while a tensor, a view of one or autograd's graph holds it."""
    load = loader("--batch-size", 8)
    images, weights = epoch(load, 0), torch.ones((), requires_grad=True)
    load.sampler.set_epoch(0)
    held, sums, places = [], [], set()
    for number, (batch, _) in enumerate(load):
        places.add(batch.data_ptr())
        if number % 3 == 0:
            held.append(batch[0])
        elif number % 3 == 1:
            sums.append((batch * weights).sum())
    assert len(places) < len(images)
    for number, (batch, _) in enumerate(images):
        if number % 3 == 0:
            assert torch.equal(held.pop(0), batch[0])
        elif number % 3 == 1:
            (gradient,) = torch.autograd.grad(sums.pop(0), weights)
            torch.testing.assert_close(gradient, batch.sum())


@pytest.mark.parametrize("prefetch", [(), ("--no-prefetcher",)])
@pytest.mark.parametrize("kind", ["training", "validation", "store"])
def test_colours_reach_the_network_as_they_are(make_loader, tmp_path, kind, prefetch):
    """Red first, and only normalised."""
    colours = ((200, 100, 20), (255, 255, 255))
    for label, colour in enumerate(colours):
        (tmp_path / "train" / f"class{label}").mkdir(parents=True)
        Image.new("RGB", (40, 30), colour).save(tmp_path / "train" / f"class{label}" / "flat.png")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    stored = SoftLabelsConfig(path=tmp_path / "store", seed=0) if kind == "store" else None
    options = {"data": tmp_path, "mean": mean, "std": std, "training": kind != "validation", "stored": stored}
    found = make_loader("--batch-size", 2, "--color-jitter", 0, *prefetch, **options)
    ((images, targets),) = epoch(found, 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    for image, label in zip(images, getattr(targets, "labels", targets).tolist(), strict=True):
        expected = torch.tensor(colours[label]).view(3, 1, 1) / 255
        torch.testing.assert_close(image * std + mean, expected.expand_as(image))


def test_a_deep_grey_image_is_refused_where_timms_own_script_reads_it(own_digits):
    """What `timm PATH/train.py` puts around the script's data sets; timm skips what is not readable."""
    path = sorted((own_digits / "train" / "digit0").iterdir())[0]
    dataset = create_dataset("", root=str(own_digits), split="train")
    before = np.asarray(dataset[0][0])
    guard(dataset)
    assert (np.asarray(dataset[0][0]) == before).all()
    assert dataset.reader.class_to_idx
    assert len(copy.deepcopy(dataset.reader)) == len(dataset)
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(path)
    with pytest.raises(LskdError, match=f"{path.name} has grey values of more than 8 bits"):
        dataset[0]


def test_a_pickled_class_map_is_refused(own_digits, tmp_path):
    """args.yaml beside a checkpoint may name one; some versions of timm run what is in it."""
    with pytest.raises(LskdError, match=r"class map x.pkl is pickled; write it as text"):
        check_data("", str(own_digits), ["train"], class_map="x.pkl")


def test_the_advice_names_no_option_that_the_command_lacks(own_digits, tmp_path):
    with pytest.raises(LskdError, match="name it by --train-split or --val-split"):
        check_data("", str(own_digits), ["nothing"])
    weights = tmp_path / "weights.pth"
    torch.save(create_model("test_resnet", num_classes=4).state_dict(), weights)
    with pytest.raises(LskdError, match=r"rename the folder, or name another split\.$"):
        evaluate_model("test_resnet", weights, own_digits, "nothing")
