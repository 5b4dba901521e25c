"""Which teachers, which classes: what the figures of several teachers need to agree on."""

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lskd import LskdError
from lskd.analysis.classes import class_confusion, class_mean_probabilities, propose_classes
from lskd_study.drawing.drawing import listed
from lskd_study.teachers.outputs import Outputs


def class_count(outputs: Outputs) -> int:
    """Return the number of classes that a teacher knows.

    Raises:
        LskdError: for a file that does not say.
    """
    if outputs.logits is not None:
        return int(outputs.logits.shape[1])
    if outputs.templates is not None:
        return len(outputs.templates)
    raise LskdError(f"{outputs.name}: neither logits nor templates are there, so its classes are unknown")


def class_names(outputs: Outputs) -> list[str]:
    """Return the names of a teacher's classes; their ids where it has none."""
    if outputs.class_names is not None:
        return list(outputs.class_names)
    return [str(c) for c in range(class_count(outputs))]


def check_teachers(teachers: Sequence[Outputs]) -> None:
    """Check that teachers can stand side by side.

    Raises:
        LskdError: for teachers of one name, of different classes, or asked about different samples.
    """
    first = teachers[0]
    names = [teacher.name for teacher in teachers]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise LskdError(f"two teachers are called {min(twice)}; give each a --name")
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


def resolve_classes(text: str, names: Sequence[str]) -> list[int]:
    """Return the ids of classes named in a comma-separated list, by name or id, quotes as in CSV.

    Raises:
        LskdError: for a class that does not exist or is named twice.
    """
    wanted = split_names(text)
    ids = {name: c for c, name in reversed(list(enumerate(names)))}
    found = []
    for name in wanted:
        if name in ids:
            found.append(ids[name])
        elif name.isdecimal() and int(name) < len(names):
            found.append(int(name))
        else:
            raise LskdError(f"no class is called {name!r}; {_nearest(name, names)}")
    if len(set(found)) < len(found):
        raise LskdError(f"--classes {text} names a class twice; name each once")
    return found


def split_names(text: str) -> list[str]:
    """Return the names in a comma-separated list; a name with a comma stands in double quotes.

    Raises:
        LskdError: for a text that is no such list.
    """
    try:
        names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True, strict=True))]
    except (csv.Error, StopIteration):
        names = []
    if not names or not all(names):
        raise LskdError(f"--classes {text!r} is no list of names; separate them by commas")
    return names


def _nearest(name: str, names: Sequence[str]) -> str:
    if name.isdecimal():
        return f"ids go from 0 to {len(names) - 1}"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {listed(names)}" + ("" if list(names[:2]) == ["0", "1"] else ", or ids from 0")


@dataclass(frozen=True)
class Proposal:
    """Three classes for the projection, and why these."""

    classes: tuple[int, int, int]
    reason: str


def propose(teachers: Sequence[Outputs]) -> Proposal:
    """Choose the most similar pair of classes and the class most unlike both, by the teachers' confusion.

    Raises:
        LskdError: for a teacher without logits, or fewer than three classes with samples.
    """
    means = []
    for teacher in teachers:
        if teacher.logits is None:
            raise LskdError(f"{teacher.name} has no logits to choose classes by; name three with --classes")
        means.append(class_means(teacher))
    confusion = class_confusion(means)
    a, b, c = propose_classes(confusion)
    names = class_names(teachers[0])
    each = "the teacher" if len(teachers) == 1 else f"{len(teachers)} teachers"
    reason = (
        f"{names[a]} and {names[b]}, which {each} confuse most "
        f"(mean probability {float(confusion[a, b]):.2g} for the other), and {names[c]}, which is confused "
        f"least with both ({float(confusion[a, c] + confusion[b, c]) / 2:.2g})"
    )
    return Proposal((a, b, c), reason.replace("the teacher confuse", "the teacher confuses"))


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
