"""Measure a list of teachers one after the other, compare them, and write what was asked for."""

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from lskd import LskdError
from lskd.base.files import write_text
from lskd_study.base.files import check_writable
from lskd_study.teachers import report as render
from lskd_study.teachers.compare import Comparison, Teacher, compare, looks, measure
from lskd_study.teachers.evaluate import TeacherSpec, check_specs, evaluate
from lskd_study.teachers.outputs import write_outputs

WRITERS = {".json": render.as_json, ".csv": render.as_csv}


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of all teachers of one call; ``evaluation`` is passed on to ``evaluate``."""

    temperatures: Sequence[float] = (1.0,)
    replicates: int = 2000
    seed: int = 0
    small_class_correction: bool = False
    save_outputs: Path | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def run_teachers(
    specs: Sequence[TeacherSpec], settings: ComparisonSettings, files: Mapping[str, Path | None]
) -> Comparison | None:
    """Measure and compare teachers, print the tables and write the files asked for.

    Args:
        specs: the teachers, each with a name of its own.
        settings: of this call.
        files: where to write, by ``".json"`` and ``".csv"``.

    Returns:
        The comparison; None on the processes of torchrun other than the first.

    Raises:
        LskdError: for whatever the user can fix.
    """
    for t in settings.temperatures:
        if not (t > 0 and math.isfinite(t)):
            raise LskdError(f"--temperature is {t:g}; it must be greater than 0")
    try:
        check_specs(specs, settings.evaluation.get("data_dir"))
        _check_files(specs, settings, files)
    except LskdError:
        # Every process finds the same here; one line is enough.
        if int(os.environ.get("RANK", "0")):
            raise SystemExit(2) from None
        raise
    measured = [_measure(spec, settings, influence=len(specs) > 1) for spec in specs]
    found = [teacher for teacher in measured if teacher is not None]
    if not found:
        return None
    with _bar("comparing", settings.replicates, hidden=len(found) < 2) as bar:
        comparison = compare(found, settings.replicates, settings.seed, bar.update)
    for suffix, path in files.items():
        if path is not None:
            write_text(path, WRITERS[suffix](comparison))
    # A pipe has no width; wide enough that nothing is folded.
    width = None if sys.stdout.isatty() else 60 + 24 * max(len(found), 3)
    render.print_comparison(comparison, Console(width=width))
    return comparison


def _measure(spec: TeacherSpec, settings: ComparisonSettings, influence: bool) -> Teacher | None:
    outputs = evaluate(spec, **settings.evaluation)
    if outputs is None:
        return None
    if settings.save_outputs is not None and spec.logits is None:
        write_outputs(outputs, _place(spec, settings.save_outputs))
    total = looks(len(outputs.labels), settings.temperatures, influence)
    with _bar(outputs.name, total, unit="samples") as bar:
        return measure(
            outputs,
            spec.source,
            settings.temperatures,
            influence,
            settings.small_class_correction,
            bar.update,
        )


def _bar(name: str, total: int, unit: str = "draws", hidden: bool = False) -> "tqdm[Any]":
    # Silent where there is no terminal, as in a log file.
    return tqdm(
        total=total,
        desc=name,
        unit=f" {unit}",
        unit_scale=True,
        leave=False,
        disable=True if hidden else None,
    )


def _check_files(
    specs: Sequence[TeacherSpec], settings: ComparisonSettings, files: Mapping[str, Path | None]
) -> None:
    """Refuse, before any work, a place that cannot be written, is written twice or is read from."""
    wanted = [path for path in files.values() if path is not None]
    if settings.save_outputs is not None:
        wanted += [_place(spec, settings.save_outputs) for spec in specs if spec.logits is None]
    read = {path.resolve() for spec in specs for path in (spec.logits, spec.checkpoint, spec.config) if path}
    seen: set[Path] = set()
    for path in wanted:
        check_writable(path, "name another file")
        where = path.resolve()
        if where in read:
            raise LskdError(f"{path} is read from; name another file to write")
        if where in seen:
            raise LskdError(f"{path} would be written twice; name another file, or the teachers differently")
        seen.add(where)


def _place(spec: TeacherSpec, folder: Path) -> Path:
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", spec.name or spec.default_name)
    return folder / f"{name}.safetensors"
