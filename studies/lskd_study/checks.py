"""What is checked before a study's first run: data folder, models, output folder, Snakemake's options."""

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from lskd import LskdError
from lskd_study.data.manifest import read_manifest
from lskd_study.data_options import Options
from lskd_study.extras import needs_study_extra

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
# lskd sets these itself; a second value would break resuming or point the workflow elsewhere.
OWN_OPTIONS = ("--snakefile", "--directory", "--cores", "--dry-run", "--rerun-triggers", "--config")


def check_data_folder(folder: Path, name: str, num_classes: int, mend: str = "") -> None:
    """Check for ``train`` and ``val`` with a folder of images for each class; ``mend`` says how to make it.

    Raises:
        LskdError: for a folder that is missing or holds something else; says how to make it.
    """
    mend = mend or _how_to_make(name)
    if not folder.is_dir():
        raise LskdError(f"data folder {name} does not exist; {mend}")
    classes: dict[str, list[str]] = {}
    for split in ("train", "val"):
        try:
            entries = [entry for entry in os.scandir(folder / split) if entry.is_dir()]
        except OSError as error:
            raise LskdError(f"data folder {name} has no {split} folder; {mend}") from error
        classes[split] = sorted(entry.name for entry in entries)
        empty = sorted(entry.name for entry in entries if not _has_image(entry.path))
        if empty:
            raise LskdError(f"class folder {name}/{split}/{empty[0]} has no images; {mend}")
        if len(entries) != num_classes:
            raise LskdError(
                f"{name}/{split} has {len(entries)} class folders but num_classes is {num_classes}; mend one"
            )
    check_names(folder / "val", f"{name}/val")
    if classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))
        raise LskdError(
            f"train and val of {name} have different classes, e.g. {odd[0]}; they must be the same"
        )


def check_names(folder: Path, name: str) -> None:
    """Check that the names of all images and folders below a folder can be stored beside what is measured.

    Raises:
        LskdError: naming the first that cannot, and how many more there are.
    """
    odd = []
    for root, folders, files in os.walk(folder, followlinks=True):
        images = (file for file in files if os.path.splitext(file)[1].lower() in IMAGES)
        odd += [os.path.join(root, entry) for entry in (*folders, *images) if not storable(entry)]
    if odd:
        first = os.path.join(name, os.path.relpath(min(odd), folder))
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise LskdError(f"{first!r}{more} has a name that is no UTF-8 text in one line; rename it")


def storable(name: str) -> bool:
    """Whether a name is UTF-8 text in one line, as tables and files of keys need it."""
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that Python could not decode
        return False
    return not {"\n", "\r"} & set(name)


def check_class_order(folder: Path, name: str) -> None:
    """Check that timm, whose model teaches, and mmcls, whose model learns, number the classes alike.

    timm sorts by the numbers in names (2 before 10) and without case, mmcls by letters (10 before 2).

    Raises:
        LskdError: for folders that the two sort differently.
    """
    from timm.utils.misc import natural_key

    names = sorted(entry.name for entry in os.scandir(folder / "train") if entry.is_dir())
    numbered: list[str] = sorted(names, key=natural_key)
    for ours, theirs in zip(numbered, names, strict=True):
        if ours != theirs:
            raise LskdError(
                f"the class folders of {name} are numbered differently by timm ({ours} before {theirs}) and "
                "by mmcls; rename them in train and val: zeros in front of numbers (02, 10), lower case"
            )


def check_data_bin(folder: Path, name: str, options: Options, mend: str = "") -> None:
    """Check for what fairseq-preprocess writes: two dictionaries, and train, valid and test in two languages.

    Args:
        folder: the data-bin.
        name: what it is called in the study file.
        options: of the command that made it, as far as the study file says; others are an error.
        mend: how to make it.

    Raises:
        LskdError: for a folder that is missing or holds something else; says how to make it.
    """
    mend = mend or "make it with fairseq-preprocess, see docs/fairseq.md"
    if not folder.is_dir():
        raise LskdError(f"data-bin {name} does not exist; {mend}")
    if len(list(folder.glob("dict.*.txt"))) < 2:
        raise LskdError(f"{name} is no data-bin, it has no two dictionaries (dict.*.txt); {mend}")
    for split in ("train", "valid", "test"):
        if any(len(list(folder.glob(f"{split}.*-*.*.{kind}"))) != 2 for kind in ("bin", "idx")):
            raise LskdError(f"data-bin {name} has no {split} set in two languages; {mend}")
    made = read_manifest(folder).get("options", {})
    for option, value in options.items():
        if option in made and made[option] != value:
            raise LskdError(
                f"data-bin {name} was made with {option} {made[option]}, the study asks for {value}; "
                "choose another data.path or remove it"
            )


def _how_to_make(name: str) -> str:
    if Path(name).name == "digits":
        return f"make it with `lskd data digits --output {name}`"
    return "it must hold train/<class>/ and val/<class>/ with images"


def _has_image(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in IMAGES for entry in entries)


def check_models(models: Iterable[str]) -> None:
    """Check that timm knows every model, its tag included.

    Raises:
        LskdError: for an unknown one, with the nearest name.
    """
    with needs_study_extra():
        from timm_ls_kd.models import check_model_name
    for model in dict.fromkeys(models):
        check_model_name(model, "model")


def check_output(folder: Path, name: str) -> None:
    """Make a folder that will be written to and check that it can be.

    Raises:
        LskdError: when it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LskdError(f"cannot write the folder {name} ({error.strerror}); choose another one") from error


def check_snakemake_options(options: Sequence[str]) -> None:
    """Check options meant for Snakemake with its own parser, before anything runs.

    Raises:
        LskdError: for an option that Snakemake does not know or that lskd sets itself.
    """
    with needs_study_extra():
        from snakemake.cli import get_argument_parser

    if not options:
        return
    for option in options:
        if option.partition("=")[0] in OWN_OPTIONS:
            raise LskdError(f"{option.partition('=')[0]} is set by lskd study itself; leave it out")

    def complain(message: str) -> NoReturn:
        line = message.splitlines()[0]
        unknown = next((word for word in line.split() if word.startswith("--")), "").partition("=")[0]
        known = {
            *parser._option_string_actions,
            "--cores",
            "--dry-run",
            "--hours",
            "--output",
            "--own",
            "--yes",
        }
        near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.7) if unknown else []
        hint = f"; did you mean {near[0]}?" if near and near[0] != unknown else ""
        raise LskdError(f"{line}; an option of neither lskd study nor snakemake{hint}")

    parser: argparse.ArgumentParser = get_argument_parser()
    parser.error = complain  # type: ignore[method-assign]
    parser.parse_args(list(options))
