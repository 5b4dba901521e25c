"""Data sets made from any image folder: fewer classes, a long tail, wrong labels."""

import csv
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.expected import Numbers, check_numbers
from lskd_study.data.folders.archives import MEMBER_LIMIT, fingerprint
from lskd_study.data.folders.folders import Folder, Image, images_of, numbers_of, place, read_image_folder
from lskd_study.data.folders.layout import SPLITS, Fill, Tree, build, listing_checksum
from lskd_study.data.manifest import read_manifest

CLASS_LIST = "classes.txt"
NOISE_LIST = "noise.csv"
_ONE_EACH = "give one class name on each line"


def prepare_subset(
    source: Path,
    output: Path,
    *,
    classes: int | None = None,
    class_list: Path | None = None,
    seed: int = 0,
    copy: bool = False,
    published: str = "",
    expected: Numbers | None = None,
) -> tuple[dict[str, Any], bool]:
    """Keep some classes with all their images; ``classes.txt`` says which.

    Args:
        source: image folder.
        output: folder to write.
        classes: how many, drawn at random.
        class_list: or a file that names them, one on each line.
        seed: of the draw.
        copy: copy files where links would do.
        published: data set that the source must be, whole.
        expected: its numbers instead of the published ones.

    Raises:
        LskdError: for a source or a choice that does not fit, or an output that cannot be written.
    """
    if (classes is None) == (class_list is None):
        raise LskdError("give either --classes N or --list FILE")
    choice = {"classes_asked": classes, "seed": seed} if class_list is None else {"list": str(class_list)}

    def plan() -> Fill:
        folder = read_image_folder(source)
        if published:
            check_numbers(published, numbers_of(folder), expected)
        if class_list is not None:
            chosen = _read_classes(class_list, folder["train"], source)
        else:
            assert classes is not None
            if not 2 <= classes <= len(folder["train"]):
                raise LskdError(
                    f"{source} has {len(folder['train'])} classes; --classes must be 2 to that number"
                )
            chosen = sorted(random.Random(seed).sample(sorted(folder["train"]), classes))
        kept = {split: {label: folder[split][label] for label in chosen} for split in SPLITS}

        def fill(tree: Tree) -> dict[str, Any]:
            place(tree, [image for split in SPLITS for image in images_of(kept, source, split)])
            tree.write(CLASS_LIST, "".join(f"{label}\n" for label in chosen).encode())
            return {}

        return fill

    lists = {} if class_list is None else {class_list.name: fingerprint(class_list, _ONE_EACH)}
    return build(output, "subset", _origin(source) | choice, plan, copy, lists)


def prepare_long_tail(
    source: Path,
    output: Path,
    *,
    alpha: float = 6.0,
    head: int,
    tail: int,
    seed: int = 0,
    copy: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Give the training classes the sizes of a Pareto distribution; validation stays as it is.

    Which class gets which size, and which of its images stay, is drawn at random.

    Args:
        source: image folder.
        output: folder to write.
        alpha: power value of the distribution; 6 in the paper's Appendix A.
        head: images in the largest class.
        tail: images in the smallest class.
        seed: of the draws.
        copy: copy files where links would do.

    Raises:
        LskdError: for sizes that the source's classes do not have, or an output that cannot be written.
    """
    if not alpha > 0 or not 1 <= tail <= head:
        raise LskdError(
            f"--alpha must be above 0 and --tail from 1 to --head, got {alpha:g}, {tail} and {head}"
        )

    def plan() -> Fill:
        folder = read_image_folder(source)
        generator = random.Random(seed)
        sizes = pareto_sizes(len(folder["train"]), alpha, head, tail)
        assigned = _assign(sizes, folder["train"], generator, source)
        kept = {
            label: sorted(generator.sample(folder["train"][label], assigned[label]))
            for label in sorted(assigned)
        }

        def fill(tree: Tree) -> dict[str, Any]:
            whole = {"train": kept, "val": folder["val"]}
            place(tree, [image for split in SPLITS for image in images_of(whole, source, split)])
            return {}

        return fill

    settings = {"alpha": alpha, "head": head, "tail": tail, "seed": seed}
    return build(output, "long-tail", _origin(source) | settings, plan, copy)


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


def prepare_noise(
    source: Path, output: Path, *, rate: float, seed: int = 0, copy: bool = False
) -> tuple[dict[str, Any], bool]:
    """Give a share of the training images a wrong label, each other class equally likely (symmetric noise).

    Exactly ``round(rate * images)`` labels are changed, so ``rate`` counts wrong labels: a definition that
    draws from all classes, the right one among them, leaves 1/K of its rate right. ``noise.csv`` lists them.
    Validation stays as it is.

    Args:
        source: image folder.
        output: folder to write.
        rate: share of wrong labels, above 0 and below 1.
        seed: of the draws.
        copy: copy files where links would do.

    Raises:
        LskdError: for a rate out of range, a class that would be left without images, or an output that
            cannot be written.
    """
    if not 0 < rate < 1:
        raise LskdError(f"--rate must be above 0 and below 1, got {rate:g}")

    def plan() -> Fill:
        folder = read_image_folder(source)
        images = images_of(folder, source, "train")
        wrong = _wrong_labels(images, sorted(folder["train"]), rate, random.Random(seed))
        noisy = [
            image._replace(label=wrong[i], name=f"from-{image.label}-{image.name}") if i in wrong else image
            for i, image in enumerate(images)
        ]
        if empty := set(folder["train"]) - {image.label for image in noisy}:
            raise LskdError(f"class {min(empty)} of {source} would have no images; choose another --seed")
        rows = [(noisy[i].label, noisy[i].name, images[i].label, images[i].name) for i in sorted(wrong)]

        def fill(tree: Tree) -> dict[str, Any]:
            place(tree, [*noisy, *images_of(folder, source, "val")])
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(("label", "file", "true_label", "source_file"))
            writer.writerows(rows)
            tree.write(NOISE_LIST, text.getvalue().encode())
            return {"wrong_labels": len(rows)}

        return fill

    return build(output, "noise", _origin(source) | {"rate": rate, "seed": seed}, plan, copy)


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


def _assign(
    sizes: Sequence[int], classes: Mapping[str, Sequence[str]], generator: random.Random, source: Path
) -> dict[str, int]:
    """Give the sizes, largest first, to classes that have as many images, at random among those."""
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


def _origin(source: Path) -> dict[str, Any]:
    """Name the source, and what it holds."""
    if not source.is_dir():
        raise LskdError(f"{source} is no folder; the source must hold train/<class>/ and val/<class>/")
    listing = read_manifest(source).get("listing_sha256") or listing_checksum(source)
    return {"source": str(source), "source_listing_sha256": listing}


def _read_classes(file: Path, known: Folder | Mapping[str, Any], source: Path) -> list[str]:
    try:
        text = read_bytes(file, MEMBER_LIMIT, "a list of classes", _ONE_EACH).decode()
    except UnicodeDecodeError:
        raise LskdError(f"{file} is no text in UTF-8; {_ONE_EACH}") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if unknown := [name for name in names if name not in known]:
        raise LskdError(f"{file} names {unknown[0]!r}, which is no class of {source}")
    if len(names) < 2 or len(set(names)) != len(names):
        raise LskdError(f"{file} must name two classes or more, each once")
    return sorted(names)
