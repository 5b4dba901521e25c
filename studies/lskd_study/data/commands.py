"""``lskd data``: a command for each function that makes a data set."""

import functools
import inspect
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lskd_study.data.folders.derived import (
    prepare_imagenet_subset,
    prepare_long_tail,
    prepare_noise,
    prepare_subset,
)
from lskd_study.data.folders.split import IDENTICAL_LIST, prepare_split
from lskd_study.data.manifest import Made
from lskd_study.data.published.cub200 import prepare_cub200
from lskd_study.data.published.imagenet import prepare_imagenet
from lskd_study.data.published.imaterialist import prepare_imaterialist
from lskd_study.data.published.inat2019 import prepare_inat2019
from lskd_study.data.published.long_tailed_lists import prepare_imagenet_lt, prepare_places_lt
from lskd_study.data.published.small import prepare_digits, prepare_fashion_mnist
from lskd_study.data.text.ding import prepare_ding
from lskd_study.data.text.iwslt14 import prepare_iwslt14
from lskd_study.data.text.number_words import prepare_number_words
from lskd_study.data.text.parallel import write_data_bin

_DATA_BIN = inspect.Parameter(
    "data_bin",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None, typer.Option(help="Folder for fairseq-preprocess' output too, made in the same step.")
    ],
)

app = typer.Typer(
    help="Make data sets: image folders (train/<class>/, val/<class>/) and parallel text for fairseq.",
    no_args_is_help=True,
)


def _add(prepare: Callable[..., Made], *more: inspect.Parameter) -> None:
    """Add the command of a function: its name, its arguments and ``more``, what its docstring begins with."""
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def command(data_bin: Path | None = None, **arguments: Any) -> None:
        made = prepare(**arguments)
        if more:
            _print_text(made, data_bin, arguments)
        else:
            _print_images(made)

    parameters = [*signature.parameters.values(), *more]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    name = prepare.__name__.removeprefix("prepare_").replace("_", "-")
    app.command(name, help=(inspect.getdoc(prepare) or "").partition("\n\n")[0])(command)


def _print_images(made: Made) -> None:
    manifest, images = made.manifest, made.manifest["images"]
    print(f"{made.folder}: {images['train']} training and {images['val']} validation images, {made.state}")
    sizes = [
        f"{split} {min(counts)} to {max(counts)}, median {statistics.median(counts):g}"
        for split, counts in manifest["images_per_class"].items()
    ]
    print(f"{manifest['num_classes']} classes; images in a class: {'; '.join(sizes)}")
    if missing := sum(manifest.get("missing", {}).values()):
        print(f"lskd: warning: {missing:,} images of the lists are missing", file=sys.stderr)
    if "wrong_labels" in manifest:
        print(f"{manifest['wrong_labels']:,} wrong labels, listed in {made.folder}/noise.csv")
    if passed_over := manifest.get("passed_over"):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
        print(f"lskd: warning: files that are no images were passed over: {kinds}", file=sys.stderr)
    if (identical := manifest.get("identical", {})).get("groups"):
        print(f"lskd: warning: {_leakage(identical, made.folder)}", file=sys.stderr)


def _leakage(identical: Mapping[str, int], folder: Path) -> str:
    """Return what is said of images that are there more than once."""
    several = identical.get("of_several_classes", 0)
    more = f"; pictures under several classes, all of them in training: {several:,}" if several else ""
    return (
        f"{identical['images']:,} images are identical to others; those of one picture are on one side, so "
        f"that none leaks into validation{more}; {folder}/{IDENTICAL_LIST} lists them"
    )


def _print_text(made: Made, data_bin: Path | None, arguments: Mapping[str, Any]) -> None:
    """Print what was written, and binarise it or print the command that does."""
    folder, pairs = made.folder, made.manifest["pairs"]
    print(
        f"{folder}: {pairs['train']} training, {pairs['valid']} validation and {pairs['test']} test pairs, "
        f"{made.state}"
    )
    if data_bin is not None:
        options = {name.replace("_", "-"): v for name, v in arguments.items() if not isinstance(v, Path)}
        print(f"{data_bin}: data-bin, {write_data_bin(data_bin, folder, made.manifest, options).state}")
    else:
        print(
            f"next: fairseq-preprocess -s de -t en --trainpref {folder}/train --validpref {folder}/valid "
            f"--testpref {folder}/test --destdir {folder}-bin"
        )
    if not made.manifest.get("sizes_as_expected", True):
        expected = made.manifest["expected"]
        print(f"lskd: warning: expected {expected}; the archive is not the one of 2014", file=sys.stderr)


for _prepare in (
    prepare_imagenet,
    prepare_cub200,
    prepare_imaterialist,
    prepare_inat2019,
    prepare_imagenet_lt,
    prepare_places_lt,
    prepare_fashion_mnist,
    prepare_imagenet_subset,
    prepare_subset,
    prepare_long_tail,
    prepare_noise,
    prepare_split,
    prepare_digits,
):
    _add(_prepare)
for _prepare_text in (prepare_iwslt14, prepare_ding, prepare_number_words):
    _add(_prepare_text, _DATA_BIN)
