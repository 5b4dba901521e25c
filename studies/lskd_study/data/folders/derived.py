"""Data sets made from any image folder: fewer classes, a long tail, wrong labels."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.base.text import csv_text
from lskd_study.data.arguments import Copy, Expect, OfFolder, OutputBeside, Seed
from lskd_study.data.expected import check_numbers, count
from lskd_study.data.folders.archives import MEMBER_LIMIT, fingerprint
from lskd_study.data.folders.image_folder import ImageFolder
from lskd_study.data.folders.layout import build, listing_checksum
from lskd_study.data.folders.rows import Image, Rows
from lskd_study.data.manifest import Made, read_manifest

CLASS_LIST = "classes.txt"
NOISE_LIST = "noise.csv"
_ONE_EACH = "give one class name on each line"


def prepare_imagenet_subset(
    source: OfFolder,
    classes: Annotated[int, typer.Option(help="How many: 100 and 500 in the paper's Table 4.")] = 100,
    seed: Seed = 0,
    output: OutputBeside = None,
    copy: Copy = False,
    expect: Expect = None,
) -> Made:
    """Write ImageNet-100, -500 ...: classes of a whole ImageNet folder, drawn at random.

    Raises:
        LskdError: as :func:`prepare_subset`, and for a source that is not whole.
    """

    def plan() -> Rows:
        folder = ImageFolder.read(source)
        check_numbers("imagenet", count(image[:2] for image in folder.images()), expect)
        return _keep(folder, _drawn(folder, classes, seed))

    choice = {"classes_asked": classes, "seed": seed}
    return build(output or beside(source, f"{classes}"), "subset", _origin(source) | choice, plan, copy, {})


def prepare_subset(
    source: OfFolder,
    classes: Annotated[int | None, typer.Option(help="How many classes, drawn at random.")] = None,
    list: Annotated[Path | None, typer.Option(help="Or a file that names them, one a line.")] = None,
    seed: Seed = 0,
    output: OutputBeside = None,
    copy: Copy = False,
) -> Made:
    """Keep some classes of any image folder; classes.txt says which.

    Raises:
        LskdError: for a source or a choice that does not fit, or an output that cannot be written.
    """
    if (classes is None) == (list is None):
        raise LskdError("give either --classes N or --list FILE")

    def plan() -> Rows:
        folder = ImageFolder.read(source)
        return _keep(folder, _read_classes(list, folder) if list else _drawn(folder, classes or 0, seed))

    choice = {"list": str(list)} if list else {"classes_asked": classes, "seed": seed}
    lists = {list.name: fingerprint(list, _ONE_EACH)} if list else {}
    return build(output or beside(source, "subset"), "subset", _origin(source) | choice, plan, copy, lists)


def _drawn(folder: ImageFolder, classes: int, seed: int) -> Sequence[str]:
    if not 2 <= classes <= len(folder.classes):
        raise LskdError(
            f"{folder.path} has {len(folder.classes)} classes; --classes must be 2 to that number"
        )
    return sorted(random.Random(seed).sample(folder.classes, classes))


def _keep(folder: ImageFolder, chosen: Sequence[str]) -> Rows:
    kept = {split: {label: names[label] for label in chosen} for split, names in folder.splits.items()}
    listed = "".join(f"{label}\n" for label in chosen)
    return Rows(ImageFolder(folder.path, kept).images(), files={CLASS_LIST: listed.encode()})


def prepare_long_tail(
    source: OfFolder,
    head: Annotated[int, typer.Option(help="Images in the largest class; 1280 in ImageNet-LT.")],
    tail: Annotated[int, typer.Option(help="Images in the smallest class.")] = 5,
    alpha: Annotated[float, typer.Option(help="Power value of the Pareto distribution.")] = 6.0,
    seed: Seed = 0,
    output: OutputBeside = None,
    copy: Copy = False,
) -> Made:
    """Draw training images of any image folder so that its class sizes follow a Pareto distribution.

    Which class gets which size, and which of its images stay, is drawn at random; validation stays as it is.
    ``alpha`` is 6 in the paper's Appendix A.

    Raises:
        LskdError: for sizes that the source's classes do not have, or an output that cannot be written.
    """
    if not alpha > 0 or not 1 <= tail <= head:
        raise LskdError(
            f"--alpha must be above 0 and --tail from 1 to --head, got {alpha:g}, {tail} and {head}"
        )

    def plan() -> Rows:
        folder = ImageFolder.read(source)
        generator = random.Random(seed)
        images = folder.splits["train"]
        sizes = pareto_sizes(len(images), alpha, head, tail)
        assigned = _assign(sizes, images, generator, source)
        kept = {k: sorted(generator.sample(images[k], assigned[k])) for k in sorted(assigned)}
        return Rows(ImageFolder(source, {"train": kept, "val": folder.splits["val"]}).images())

    settings = _origin(source) | {"alpha": alpha, "head": head, "tail": tail, "seed": seed}
    return build(output or beside(source, "long_tail"), "long-tail", settings, plan, copy)


def pareto_sizes(classes: int, alpha: float, head: int, tail: int) -> list[int]:
    """Return class sizes, largest first, that follow a Pareto distribution between ``tail`` and ``head``.

    The quantiles (i - 1/2) / K of the Pareto distribution with power ``alpha`` and lowest value 1, scaled
    linearly so that the largest becomes ``head`` and the smallest ``tail``. With the paper's Appendix A this
    gives 182,604 images for Places-LT (there: 184.5K) and 104,850 for ImageNet-LT (115.8K): the published
    lists are random draws, which vary by more than that.

    >>> sum(pareto_sizes(365, 6, 4980, 5))
    182604
    """
    if classes == 1:
        return [head]
    quantiles = [((i + 0.5) / classes) ** (-1 / alpha) for i in range(classes)]
    scale = (head - tail) / (quantiles[0] - quantiles[-1])
    return [round(tail + scale * (quantile - quantiles[-1])) for quantile in quantiles]


def _assign(
    sizes: Sequence[int], classes: Mapping[str, Sequence[str]], generator: random.Random, source: Path
) -> dict[str, int]:
    """Assign the sizes, largest first, to classes that have as many images, at random among those."""
    left = sorted(classes)
    assigned = {}
    for size in sizes:
        able = [label for label in left if len(classes[label]) >= size]
        if not able:
            most = max(len(names) for names in classes.values())
            raise LskdError(
                f"{source}: no class is left that has {size:,} training images, the largest has {most:,}; "
                "choose a smaller --head"
            )
        label = generator.choice(able)
        left.remove(label)
        assigned[label] = size
    return assigned


def prepare_noise(
    source: OfFolder,
    rate: Annotated[float, typer.Option(help="Share of training images that get a wrong label.")] = 0.3,
    seed: Seed = 0,
    output: OutputBeside = None,
    copy: Copy = False,
) -> Made:
    """Put wrong labels on training images of any image folder; noise.csv says which.

    Each other class is equally likely (symmetric noise). Exactly ``round(rate * images)`` labels are
    changed, so ``rate`` counts wrong labels: a definition that draws from all classes, the right one among
    them, leaves 1/K of its rate right. Validation stays as it is.

    Raises:
        LskdError: for a rate out of range, a class that would be left without images, or an output that
            cannot be written.
    """
    if not 0 < rate < 1:
        raise LskdError(f"--rate must be above 0 and below 1, got {rate:g}")

    def plan() -> Rows:
        folder = ImageFolder.read(source)
        images = folder.images("train")
        wrong = _wrong_labels(images, folder.classes, rate, random.Random(seed))
        noisy = [
            image._replace(label=wrong[i], name=f"from-{image.label}-{image.name}") if i in wrong else image
            for i, image in enumerate(images)
        ]
        if empty := set(folder.classes) - {image.label for image in noisy}:
            raise LskdError(f"class {min(empty)} of {source} would have no images; choose another --seed")
        lines = [(noisy[i].label, noisy[i].name, images[i].label, images[i].name) for i in sorted(wrong)]
        listed = csv_text(("label", "file", "true_label", "source_file"), lines)
        return Rows(
            [*noisy, *folder.images("val")],
            files={NOISE_LIST: listed.encode()},
            more={"wrong_labels": len(wrong)},
        )

    settings = _origin(source) | {"rate": rate, "seed": seed}
    return build(output or beside(source, "noise"), "noise", settings, plan, copy)


def _wrong_labels(
    images: Sequence[Image], labels: Sequence[str], rate: float, generator: random.Random
) -> dict[int, str]:
    """Return the new label of each image that gets one, by its place in ``images``."""
    if len(labels) < 2:
        raise LskdError("label noise needs two classes or more")
    place_of = {label: place for place, label in enumerate(labels)}
    chosen = generator.sample(range(len(images)), round(rate * len(images)))
    return {
        i: labels[(place_of[images[i].label] + generator.randrange(1, len(labels))) % len(labels)]
        for i in chosen
    }


def _origin(source: Path) -> dict[str, Any]:
    """Return the source's name, and the checksum of what it contains."""
    if not source.is_dir():
        raise LskdError(f"{source} is no folder; the source must contain train/<class>/ and val/<class>/")
    listing = read_manifest(source).get("listing_sha256") or listing_checksum(source)
    return {"source": str(source), "source_listing_sha256": listing}


def beside(source: Path, name: str) -> Path:
    """Return the folder that is made of a source, beside it."""
    source = source.absolute()
    return source.parent / f"{source.name}_{name}"


def _read_classes(file: Path, folder: ImageFolder) -> Sequence[str]:
    try:
        text = read_bytes(file, MEMBER_LIMIT, "a list of classes", _ONE_EACH).decode()
    except UnicodeDecodeError:
        raise LskdError(f"{file} is no text in UTF-8; {_ONE_EACH}") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if unknown := [name for name in names if name not in folder.splits["train"]]:
        raise LskdError(f"{file} names {unknown[0]!r}, which is no class of {folder.path}")
    if len(names) < 2 or len(set(names)) != len(names):
        raise LskdError(f"{file} must name two classes or more, each once")
    return sorted(names)
