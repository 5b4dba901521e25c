"""The teachers of a figure: saved outputs, or models asked now."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lskd import LskdError
from lskd_study.drawing.teachers import check_teachers, class_names, resolve_classes, split_names
from lskd_study.teachers.outputs import Outputs

Split = Literal["train", "val"]
_TIMM_SPLITS = {"train": "train", "val": "validation"}


@dataclass(frozen=True)
class TeacherOptions:
    """What the command line says about teachers and data."""

    outputs: Sequence[Path]
    train_outputs: Sequence[Path]
    models: Sequence[str]
    checkpoints: Sequence[Path]
    names: Sequence[str]
    data_dir: Path | None
    batch_size: int
    workers: int
    device: str | None
    img_size: int | None


@dataclass(frozen=True)
class TeachersOnSplit:
    """All teachers on the samples of one split."""

    name: str
    teachers: list[Outputs]


def check_class_list(text: str, count: int | None = None) -> None:
    """Check a list of classes as far as that goes without knowing their names.

    Raises:
        LskdError: for another number of classes than ``count``.
    """
    named = len(split_names(text))
    if count is not None and named != count:
        raise LskdError(
            f"--classes names {named} {'class' if named == 1 else 'classes'}; the projection takes {count}, "
            "the similar pair first"
        )


def read_splits(
    options: TeacherOptions, splits: Sequence[Split], features: bool, classes: str | None
) -> list[TeachersOnSplit] | None:
    """Read or ask all teachers on each split for which there is something; check that they go together.

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
    _check(options)
    found = {}
    for split in reversed(splits):  # what is asked for most first: its errors come before the longer work
        teachers = []
        for index in range(max(len(options.outputs), len(options.models))):
            outputs = _read(options, split, splits, index, features)
            if outputs is None:
                continue
            teachers.append(outputs)
            if classes is not None:
                resolve_classes(classes, class_names(outputs))
        if teachers:
            check_teachers(teachers)
            found[split] = TeachersOnSplit(split, teachers)
    return [found[split] for split in splits if split in found] or None


def _check(options: TeacherOptions) -> None:
    if options.outputs and options.models:
        raise LskdError("--outputs and --model both name teachers; take one kind for a figure")
    if not options.outputs and not options.models:
        raise LskdError("no teacher; name saved ones with --outputs, or models with --model and --data-dir")
    count = len(options.outputs or options.models)
    if options.train_outputs and len(options.train_outputs) != len(options.outputs):
        raise LskdError(
            f"{len(options.outputs)} --outputs and {len(options.train_outputs)} --train-outputs; "
            "give one of each for each teacher"
        )
    if options.models and len(options.checkpoints) not in (0, count):
        raise LskdError(
            f"{count} --model and {len(options.checkpoints)} --checkpoint; give one for each model"
        )
    if options.checkpoints and not options.models:
        raise LskdError("--checkpoint needs the --model that it belongs to")
    if options.models and options.data_dir is None:
        raise LskdError("a --model needs images to be asked about; name their folder with --data-dir")
    for name in options.names or options.models:
        if list(options.names or options.models).count(name) > 1:
            raise LskdError(f"two teachers are called {name}; give each a --name of its own")
    if options.names and len(options.names) != count:
        raise LskdError(f"{len(options.names)} --name for {count} teachers; give one for each, or none")


def _read(
    options: TeacherOptions, split: Split, splits: Sequence[Split], index: int, features: bool
) -> Outputs | None:
    name = options.names[index] if options.names else None
    if options.outputs:
        from lskd_study.teachers.outputs import default_name, read_outputs

        if split == splits[-1]:
            return read_outputs(options.outputs[index], name)
        if not options.train_outputs:
            return None
        return read_outputs(options.train_outputs[index], name or default_name(options.outputs[index]))
    from lskd_study.teachers.evaluate import TeacherSpec, evaluate

    checkpoint = options.checkpoints[index] if options.checkpoints else None
    spec = TeacherSpec(name=name, model=options.models[index], checkpoint=checkpoint)
    return evaluate(
        spec,
        data_dir=options.data_dir,
        split=_TIMM_SPLITS[split],
        features=features,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        img_size=options.img_size,
    )
