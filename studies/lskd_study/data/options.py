"""Options of `lskd data` in a study file, checked against the command's own signature."""

from collections.abc import Mapping
from typing import Any

from lskd_study.base.text import did_you_mean
from lskd_study.data.expected import known_numbers

Value = bool | int | float | str
Options = Mapping[str, Value]

TEXT = ("number-words", "ding", "iwslt14")  # commands that make a data-bin; the others make image folders
SOURCE = "source"  # the positional argument of commands that have one
_SET_BY_THE_STUDY = frozenset({"output", "data-bin", "help"})
SUBSETS = {"imagenet-subset": 100, "subset": 0}  # and the classes that they keep if not told
DERIVED = frozenset({*SUBSETS, "long-tail", "noise"})
# Options whose value a manifest keeps, and under which name.
KEPT = {
    name: name for name in ("alpha", "head", "tail", "seed", "rate", "list", "validation", "labels", SOURCE)
} | {
    "classes": "classes_asked",
    "evaluate-on": "evaluate_on",
}


def arguments_of(prepare: str, options: Options) -> list[str]:
    """Return the arguments of `lskd data` that make a data set with some options.

    >>> arguments_of("noise", {"source": "data/digits", "rate": 0.3, "copy": True})
    ['noise', 'data/digits', '--rate', '0.3', '--copy']
    """
    arguments = [prepare]
    for name, value in options.items():
        if name == SOURCE:
            arguments.append(str(value))
        elif value is True:
            arguments.append(f"--{name}")
        elif value is False:
            arguments += _parameters(prepare)[name].secondary_opts  # none where off is how it is unasked
        else:
            arguments += [f"--{name}", str(value)]
    return arguments


def problem(prepare: str, options: Options) -> tuple[tuple[str, ...], str] | None:
    """Return what is wrong with the options of a command, and of which option; None where nothing is."""
    valid = valid_options(prepare)
    for name in options:
        if name in _SET_BY_THE_STUDY:
            return (name,), "the study sets the folders itself; remove it"
        if name not in valid:
            fix = did_you_mean(name, valid, f"valid here: {', '.join(valid) or 'none'}")
            return (name,), f"unknown option of `lskd data {prepare}`; {fix}"
    try:
        _, *arguments = arguments_of(prepare, options)
        command_of(prepare).make_context(prepare, arguments)
    except Exception as error:
        # Errors of a command line; their class is click's or typer's, depending on typer's version.
        if not hasattr(error, "format_message"):
            raise
        return (), f"lskd data {prepare}: " + " ".join(str(error.format_message()).split())
    return None


def valid_options(prepare: str) -> list[str]:
    """Return the names of a command's options, without the dashes and those that the study sets."""
    return sorted(_parameters(prepare).keys() - _SET_BY_THE_STUDY)


def known_classes(prepare: str, options: Options) -> int | None:
    """Return how many classes a command makes, where its name and options say it."""
    if prepare not in SUBSETS:
        return known_numbers(prepare, options.get("expect")).get("classes")
    return None if "list" in options else int(options.get("classes", SUBSETS[prepare])) or None


def command_of(prepare: str) -> Any:
    """Return a command of `lskd data`."""
    from typer.main import get_command

    from lskd_study.data.commands import app

    return get_command(app).commands[prepare]  # type: ignore[attr-defined]


def _parameters(prepare: str) -> dict[str, Any]:
    """Return a command's parameters by the names that a study file has for them."""
    return {parameter.opts[0].removeprefix("--"): parameter for parameter in command_of(prepare).params}
