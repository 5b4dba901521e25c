"""The teachers of a figure and their classes: saved outputs, or models asked now."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lskd import LskdError
from lskd.analysis.classes import class_confusion, class_mean_probabilities, propose_classes
from lskd_study.base.text import did_you_mean, first_of
from lskd_study.teachers.evaluate import TeacherSpec, check_specs, evaluate
from lskd_study.teachers.outputs import Outputs

Split = Literal["train", "val"]
_TIMM_SPLITS = {"train": "train", "val": "validation"}


@dataclass(frozen=True)
class TeacherOptions:
    """What the command line says about teachers and data; ``evaluation`` is passed on to ``evaluate``."""

    specs: Sequence[TeacherSpec]
    evaluation: Mapping[str, Any]
    train_outputs: Sequence[Path] = ()


# Teachers


def read_splits(
    options: TeacherOptions, splits: Sequence[Split], features: bool, classes: str | None
) -> dict[Split, list[Outputs]] | None:
    """Return all teachers on each split for which there is something, read or asked, if they go together.

    Args:
        options: the command line's.
        splits: in the figure's order; saved outputs belong to the last, ``train_outputs`` to the first.
        features: ask models for their activations too.
        classes: the list of classes, checked as soon as the first teacher says which there are.

    Returns:
        None on the processes of torchrun other than the first.

    Raises:
        LskdError: for options or teachers that do not go together.
    """
    saved = sum(spec.logits is not None for spec in options.specs)
    if 0 < saved < len(options.specs):
        raise LskdError("--outputs and --model both name teachers; take one kind for a figure")
    if (train := len(options.train_outputs)) and train != saved:
        raise LskdError(f"{saved} --outputs and {train} --train-outputs; give one of each for each teacher")
    check_specs(options.specs, options.evaluation["data_dir"])
    found = {}
    for split in reversed(splits):  # what is asked for most first: its errors come before the longer work
        teachers = []
        specs = list(options.specs)
        if saved and split != splits[-1]:
            specs = [
                replace(spec, logits=path) for spec, path in zip(specs, options.train_outputs, strict=False)
            ]
        for spec in specs:
            outputs = evaluate(spec, split=_TIMM_SPLITS[split], features=features, **options.evaluation)
            if outputs is None:
                continue
            teachers.append(outputs)
            if classes is not None:
                resolve_classes(classes, class_names(outputs))
        if teachers:
            check_teachers(teachers)
            found[split] = teachers
    return {split: found[split] for split in splits if split in found} or None


def check_teachers(teachers: Sequence[Outputs]) -> None:
    """Check that teachers can stand side by side.

    Raises:
        LskdError: for teachers of different classes, or asked about different samples.
    """
    first = teachers[0]
    for other in teachers[1:]:
        pair = f"{first.name} and {other.name}"
        if class_count(other) != class_count(first):
            raise LskdError(
                f"{pair} have {class_count(first)} and {class_count(other)} classes; "
                "side by side stand teachers of the same classes"
            )
        if None not in (first.class_names, other.class_names) and class_names(other) != class_names(first):
            raise LskdError(f"{pair} have classes of different names; take the same data set for both")
        if not torch.equal(other.labels.sort().values, first.labels.sort().values):
            raise LskdError(f"{pair} have different labels; take both over the same samples")


# Classes


def class_count(outputs: Outputs) -> int:
    """Return the number of classes that a teacher knows.

    Raises:
        LskdError: for a file that does not say.
    """
    known = outputs.logits.T if outputs.logits is not None else outputs.templates
    if known is None:
        raise LskdError(f"{outputs.name}: neither logits nor templates are there, so its classes are unknown")
    return len(known)


def class_names(outputs: Outputs) -> list[str]:
    """Return the names of a teacher's classes; their ids where it has none."""
    return [*(map(str, range(class_count(outputs))) if outputs.class_names is None else outputs.class_names)]


def class_means(teacher: Outputs, classes: Sequence[int] | None = None) -> torch.Tensor:
    """Return a teacher's class-mean probabilities, ``(C, K)``.

    Raises:
        LskdError: for a teacher without logits, or with logits that are not finite.
    """
    if teacher.logits is None:
        raise LskdError(f"{teacher.name} has no logits; save them, or name a model and its checkpoint")
    try:
        return class_mean_probabilities(teacher.logits, teacher.labels, class_count(teacher), classes)
    except ValueError as error:
        raise LskdError(f"{teacher.name}: {error}") from error


def resolve_classes(text: str, names: Sequence[str]) -> list[int]:
    """Return the ids of classes named in a comma-separated list, by name or id, quotes as in CSV.

    Raises:
        LskdError: for a class that does not exist or is named twice.
    """
    ids = {name: c for c, name in reversed(list(enumerate(names)))}
    found = []
    for name in split_names(text):
        if name in ids:
            found.append(ids[name])
        elif name.isdecimal() and int(name) < len(names):
            found.append(int(name))
        else:
            raise LskdError(f"no class is called {name!r}; {_nearest(name, names)}")
    if len(set(found)) < len(found):
        raise LskdError(f"--classes {text} names a class twice; name each once")
    return found


def split_names(text: str, count: int | None = None) -> list[str]:
    """Return the names in a comma-separated list; a name with a comma stands in double quotes.

    Raises:
        LskdError: for a text that is no such list, or another number of names than ``count``.
    """
    try:
        names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True, strict=True))]
    except (csv.Error, StopIteration):
        names = []
    if not names or not all(names):
        raise LskdError(f"--classes {text!r} is no list of names; separate them by commas")
    if count is not None and len(names) != count:
        raise LskdError(
            f"--classes names {len(names)} {'class' if len(names) == 1 else 'classes'}; the projection takes "
            f"{count}, the similar pair first"
        )
    return names


def _nearest(name: str, names: Sequence[str]) -> str:
    if name.isdecimal():
        return f"ids go from 0 to {len(names) - 1}"
    ids = "" if list(names[:2]) == ["0", "1"] else ", or ids from 0"
    return did_you_mean(name, names, f"there are {first_of(names)}{ids}")


def propose(teachers: Sequence[Outputs]) -> tuple[list[int], str]:
    """Return the pair of classes that the teachers confuse most and the class most unlike both, and why.

    Raises:
        LskdError: for a teacher without logits, or fewer than three classes with samples.
    """
    for teacher in teachers:
        if teacher.logits is None:
            raise LskdError(f"{teacher.name} has no logits to choose classes by; name three with --classes")
    confusion = class_confusion([class_means(teacher) for teacher in teachers])
    a, b, c = propose_classes(confusion)
    names = class_names(teachers[0])
    who = "the teacher confuses" if len(teachers) == 1 else f"{len(teachers)} teachers confuse"
    reason = (
        f"{names[a]} and {names[b]}, which {who} most "
        f"(mean probability {float(confusion[a, b]):.2g} for the other), and {names[c]}, which is confused "
        f"least with both ({float(confusion[a, c] + confusion[b, c]) / 2:.2g})"
    )
    return [a, b, c], reason
