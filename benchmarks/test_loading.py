"""Loading training images in the bundled trainer, against timm's own loader with the same augmentation."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from lskd import SoftLabels, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.teachers.frozen import Normalisation
from lskd.teachers.replay import augmentation_seed
from timm_ls_kd.arguments import SoftLabelsConfig
from timm_ls_kd.data import DataConfig, guard
from timm_ls_kd.loader import train_loader
from timm_ls_kd.store import replayed_images
from timm_ls_kd.trainer.arguments import parse_arguments

BATCH, HALF = 32, (0.5,) * 3
DIGITS = ("--hflip", "0", "--color-jitter", "0")  # as in recipes/digits


def images(root: Path, width: int, height: int, count: int, name: str) -> Path:
    """Write smooth random images, which compress as photographs do."""
    generator = np.random.default_rng(0)
    for number in range(count):
        folder = root / "train" / f"class{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05}.{name}", quality=90)
    return root


def epochs(loader: Any, together: int = 1_000_000) -> Callable[[], None]:
    """Return what loads an epoch at each call: of the first ones again and again."""
    numbers = itertools.count()

    def load() -> None:
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(next(numbers) % together)
        for _ in loader:
            pass

    return load


def ours(root: Path, pixels: int, flags: tuple[str, ...]) -> Callable[[], None]:
    """Load as the bundled trainer does."""
    args = parse_arguments([*flags, "--batch-size", str(BATCH), "--workers", "0"])
    args.num_classes, args.rank, args.world_size = 4, 0, 1
    dataset = create_dataset("", root=str(root), split="train")
    guard(dataset)
    config = DataConfig((3, pixels, pixels), Normalisation(HALF, HALF), "bilinear", 0.875, "center")
    return epochs(train_loader(dataset, config, args, torch.device("cpu"), 0.0))


def stored(
    root: Path, pixels: int, flags: tuple[str, ...], together: int, samples: int
) -> Callable[[], None]:
    """Load as the bundled trainer does from a store of the top 10 of 1,000 classes, its rows too."""
    args = parse_arguments([*flags, "--batch-size", str(BATCH), "--workers", "0"])
    args.num_classes, args.rank, args.world_size = 1000, 0, 1
    layout, generator = SoftLabelsLayout(1000, 10, samples, together, 1, seeds=True), np.random.default_rng(0)
    with SoftLabelsWriter(root / "store", layout, {}) as writer:
        for epoch in range(together):
            values = -np.sort(generator.exponential(2, (samples, 10)).astype(np.float32))
            seeds = augmentation_seed(0, epoch, np.arange(samples))
            writer.append(values, generator.integers(0, 1000, values.shape), seeds=seeds)
    dataset = create_dataset("", root=str(root), split="train")
    guard(dataset)
    config = DataConfig((3, pixels, pixels), Normalisation(HALF, HALF), "bilinear", 0.875, "center")
    images, collate = replayed_images(dataset, SoftLabelsConfig(root / "store", seed=0), prefetch=True)
    collate.labels, collate.stored = SoftLabels(root / "store"), together * samples
    loader = train_loader(dataset, config, args, torch.device("cpu"), 0.0, (images, collate), together)
    return epochs(loader, together)


def theirs(root: Path, pixels: int, flags: tuple[str, ...]) -> Callable[[], None]:
    """Load as timm's own script does."""
    args = parse_arguments([*flags])
    loader = create_loader(
        create_dataset("", root=str(root), split="train"),
        (3, pixels, pixels),
        BATCH,
        is_training=True,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        interpolation=args.train_interpolation or "random",
        mean=HALF,
        std=HALF,
        num_workers=0,
        device=torch.device("cpu"),
    )
    return epochs(loader)


@pytest.mark.parametrize("flags", [(), DIGITS], ids=["timm's augmentation", "crops alone"])
@pytest.mark.parametrize(("pixels", "width", "height", "name"), [(32, 32, 32, "png"), (224, 500, 375, "jpg")])
def test_bundled_loading(ratio, request, tmp_path, pixels, width, height, name, flags):
    """CPU time of an epoch; the two take turns."""
    root = images(tmp_path, width, height, 640 if pixels == 32 else 96, name)
    ratio(
        f"loading, {name} of {width} x {height} to {pixels} px, {request.node.callspec.id.split('-')[-1]}"
        " / timm's create_loader",
        ours(root, pixels, flags),
        theirs(root, pixels, flags),
        bar=1 / 0.95,
        rounds=21,
        clock=time.process_time,
    )


@pytest.mark.parametrize(
    ("flags", "name", "bar"),
    [(("--color-jitter", "0"), "crops and flips", 1 / 1.5), ((), "timm's own", None)],
)
def test_views_of_one_decoding(ratio, tmp_path, flags, name, bar):
    """CPU time of an epoch: four views of each image and their rows of the store, against an image each.

    Crops and flips are what the method is published with; of what else is drawn nothing is shared.
    """
    root = images(tmp_path, 500, 375, 96, "jpg")
    ratio(
        f"loading from the store, 4 views a decoding, jpg of 500 x 375 to 224 px, {name} / create_loader",
        stored(root, 224, flags, 4, 96),
        theirs(root, 224, flags),
        bar=bar,
        rounds=21,
        clock=time.process_time,
    )
