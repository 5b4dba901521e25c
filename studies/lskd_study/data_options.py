"""Options of `lskd data` in a study file, checked against the command's own signature."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lskd import LskdError
from lskd.images import class_folders
from lskd_study.data.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from lskd_study.plan import Plan

Value = bool | int | float | str
Options = Mapping[str, Value]

TEXT = ("number-words", "ding", "iwslt14")  # commands that make a data-bin; the others make image folders
SOURCE = "source"  # the positional argument of commands that have one
_SET_BY_THE_STUDY = frozenset({"output", "data-bin", "help"})
_SUBSETS = {"imagenet-subset": 100, "subset": 0}  # and the classes that they keep if not told
_DERIVED = frozenset({*_SUBSETS, "long-tail", "noise"})
# Options whose value a manifest keeps, and under which name.
_KEPT = {name: name for name in ("alpha", "head", "tail", "seed", "rate", "list", SOURCE)} | {
    "classes": "classes_asked",
    "evaluate-on": "evaluate_on",
}


def words_of(prepare: str, options: Options) -> list[str]:
    """Return a command of `lskd data` and its options as words.

    >>> words_of("noise", {"source": "data/digits", "rate": 0.3, "copy": True})
    ['noise', 'data/digits', '--rate', '0.3', '--copy']
    """
    words = [prepare]
    for name, value in options.items():
        if name == SOURCE:
            words.append(str(value))
        elif value is True:
            words.append(f"--{name}")
        elif value is False:
            words += [f"--no-{name}"] * (f"--no-{name}" in _flags(prepare))  # else off is how it is unasked
        else:
            words += [f"--{name}", str(value)]
    return words


def problem(prepare: str, options: Options) -> tuple[tuple[str, ...], str] | None:
    """Return what is wrong with the options of a command, and of which option; None where nothing is."""
    valid = valid_options(prepare)
    for name in options:
        if name in _SET_BY_THE_STUDY:
            return (name,), "the study sets the folders itself; remove it"
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(valid) or 'none'}"
            return (name,), f"unknown option of `lskd data {prepare}`; {mend}"
    try:
        _, *words = words_of(prepare, options)
        command_of(prepare).make_context(prepare, words)
    except Exception as error:
        # Errors of a command line; their class is click's or typer's, depending on typer's version.
        if not hasattr(error, "format_message"):
            raise
        return (), f"lskd data {prepare}: " + " ".join(str(error.format_message()).split())
    return None


def valid_options(prepare: str) -> list[str]:
    """Return the names of a command's options, without the dashes and those that the study sets."""
    names = [option.removeprefix("--") for option in _flags(prepare) if option.startswith("--")]
    names += [SOURCE for parameter in command_of(prepare).params if parameter.name == SOURCE]
    negatives = {name for name in names if name.startswith("no-") and name.removeprefix("no-") in names}
    return sorted(set(names) - negatives - _SET_BY_THE_STUDY)


def known_classes(prepare: str, options: Options) -> int | None:
    """Return how many classes a command makes, where its name and options say it."""
    from lskd_study.data.published import PUBLISHED, parse_expected

    if "expect" in options and prepare not in _SUBSETS:
        return parse_expected(str(options["expect"]))["classes"]
    if prepare in PUBLISHED:
        return PUBLISHED[prepare].numbers[0]["classes"]
    if prepare == "digits":
        return 10
    if prepare in _SUBSETS and "list" not in options:
        return int(options.get("classes", _SUBSETS[prepare])) or None
    return None


def check_preparation(plan: "Plan") -> None:
    """Check what a study's data are made from, or that those which are there are what it asks for.

    Raises:
        LskdError: for a source that is not there or has other classes, and for data made otherwise.
    """
    if not plan.prepare or plan.prepare in TEXT:
        return
    if plan.data_dir.exists():
        _check_made(plan)
    elif SOURCE in plan.prepare_options:
        _check_source(plan)


def _check_made(plan: "Plan") -> None:
    manifest = read_manifest(plan.data_dir)
    if not manifest:
        raise LskdError(
            f"data folder {plan.data} was not made by `lskd data {plan.prepare}`, it has no {MANIFEST}; "
            "remove data.prepare from the study, or the folder"
        )
    expected = "subset" if plan.prepare in _SUBSETS else plan.prepare
    if manifest.get("name", expected) != expected:
        raise LskdError(
            f"data folder {plan.data} holds {manifest['name']}, the study asks for {expected}; "
            "choose another data.path or remove it"
        )
    for option, value in plan.prepare_options.items():
        key = _KEPT.get(option)
        if key in manifest and manifest[key] != value:
            raise LskdError(
                f"data folder {plan.data} was made with {option} {manifest[key]}, the study asks for "
                f"{value}; choose another data.path or remove it"
            )


def _check_source(plan: "Plan") -> None:
    name = str(plan.prepare_options[SOURCE])
    source = Path(plan.cwd, name)
    if not source.exists():
        raise LskdError(
            f"{name}, which `lskd data {plan.prepare}` is to read, is not there; see docs/data.md"
        )
    if plan.prepare not in _DERIVED - _SUBSETS.keys():
        return
    classes = read_manifest(source).get("num_classes")
    if classes is None and (source / "train").is_dir():
        classes = len(class_folders(source / "train"))
    if classes is not None and classes != plan.num_classes:
        raise LskdError(f"{name} has {classes} classes but num_classes is {plan.num_classes}; mend one")


def command_of(prepare: str) -> Any:
    """Return a command of `lskd data`."""
    from typer.main import get_command

    from lskd_study.cli import data_app

    return get_command(data_app).commands[prepare]  # type: ignore[attr-defined]


def _flags(prepare: str) -> list[str]:
    """Return all spellings of a command's options."""
    return [
        option
        for parameter in command_of(prepare).params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    ]
