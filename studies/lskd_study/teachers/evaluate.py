"""Ask a teacher about every sample of a data set: a file of its answers, or the model itself."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.install import how_to_install
from lskd_study.base.extras import missing_modules
from lskd_study.teachers.collect import collect, join_processes
from lskd_study.teachers.outputs import Outputs, default_name, read_outputs


@dataclass(frozen=True)
class TeacherSpec:
    """Where a teacher's answers come from: exactly one of model, config and logits, which has no checkpoint.

    Attributes:
        name: how reports call it; None: :attr:`default_name`.
        model: timm's name, or ``torchvision:NAME``.
        config: configuration file of mmcls.
        checkpoint: the model's weights; without them timm's own pretrained ones.
        logits: file that :func:`read_outputs` reads.
    """

    name: str | None = None
    model: str | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    logits: Path | None = None

    @property
    def default_name(self) -> str:
        """What the teacher is called when nobody says."""
        if self.logits is not None:
            return default_name(self.logits)
        return self.config.stem if self.config is not None else str(self.model)

    @property
    def source(self) -> str:
        """Where its answers come from, for reports."""
        if self.logits is not None:
            return str(self.logits)
        weights = f"weights {self.checkpoint}" if self.checkpoint else "timm's pretrained weights"
        return f"{self.model or self.config}, {weights}"


def teacher_specs(
    files: Sequence[Path] | None,
    models: Sequence[str] | None,
    checkpoints: Sequence[Path] | None,
    names: Sequence[str] | None,
    configs: Sequence[str] = (),
    *,
    files_option: str,
    numbered: bool = False,
    order: str = "in their order",
) -> list[TeacherSpec]:
    """Return the teachers that a command line names: files, then models, then configurations.

    Args:
        files: of answers.
        models: as in :class:`TeacherSpec`.
        checkpoints: one for each model and configuration, or none.
        names: one for each teacher, or none.
        configs: of mmcls.
        files_option: what names ``files``, for messages.
        numbered: without ``names``, number those that are called the same; otherwise refuse them.
        order: how checkpoints are to be given, for messages.

    Raises:
        LskdError: no teacher, other numbers, or one name for two.
    """
    if not (files or models or configs):
        raise LskdError(f"no teacher; name files with {files_option}, or models with --model and --data-dir")
    makers = [partial(TeacherSpec, model=model) for model in models or []]
    makers += [partial(TeacherSpec, config=Path(config)) for config in configs]
    weights: Sequence[Path | None] = checkpoints or [None] * len(makers)
    if len(weights) != len(makers):
        raise LskdError(f"{len(weights)} --checkpoint for {len(makers)} models; give one for each, {order}")
    specs = [TeacherSpec(logits=path) for path in files or []]
    specs += [make(checkpoint=own) for make, own in zip(makers, weights, strict=True)]
    if names and len(names) != len(specs):
        raise LskdError(f"{len(names)} --name for {len(specs)} teachers; give one for each, or none")
    chosen = [" ".join(name.split()) for name in names or []] or [spec.default_name for spec in specs]
    if numbered and not names:
        chosen = [
            f"{name} ({chosen[: i + 1].count(name)})" if chosen.count(name) > 1 else name
            for i, name in enumerate(chosen)
        ]
    (name, times), *_ = Counter(chosen).most_common(1)
    if times > 1:
        raise LskdError(f"two teachers are called {name}; give each its own with --name")
    return [replace(spec, name=name) for spec, name in zip(specs, chosen, strict=True)]


def check_specs(specs: Sequence[TeacherSpec], data_dir: Path | None) -> None:
    """Refuse, before the first teacher is asked, files and data folders that are missing.

    Raises:
        LskdError: naming the first.
    """
    for spec in specs:
        for path in (spec.logits, spec.checkpoint, spec.config):
            if path is not None and not os.path.exists(path):  # names that are too long, too
                raise LskdError(f"{path} does not exist; check the path")
        if spec.model is not None:
            if data_dir is None:
                raise LskdError(f"model '{spec.model}' needs a folder of images; name it with --data-dir")
            if not Path(data_dir).is_dir():
                raise LskdError(f"data folder {data_dir} does not exist; check the path")


def evaluate(
    spec: TeacherSpec,
    *,
    data_dir: Path | None = None,
    split: str | None = None,
    features: bool = False,
    img_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    amp: bool = False,
) -> Outputs | None:
    """Return what a teacher says about a data set, in the order of the data set.

    Under torchrun every process must call this in the same order; each asks its share. A file of logits is
    read as it is, the other arguments are for models.

    Args:
        spec: the teacher.
        data_dir: the data; a configuration's own where None.
        split: of the data folder, None: validation; a configuration's own comes before it.
        features: the input of the classifier, and its weight as templates, too.
        img_size: instead of the model's own.
        crop_pct: instead of the model's own.
        batch_size: of each process.
        workers: loading processes of each process.
        device: where to compute; None: a GPU where there is one.
        amp: mixed precision.

    Returns:
        The outputs, large arrays mapped from unnamed temporary files; None on processes of torchrun other
        than the first.

    Raises:
        LskdError: one line for whatever the user can fix.
    """
    name = spec.name or spec.default_name
    process = join_processes(device)
    if spec.logits is not None:
        return read_outputs(spec.logits, name) if process.rank == 0 else None
    options: dict[str, Any] = {
        "data_dir": data_dir,
        "split": split or "validation",
        "features": features,
        "batch_size": batch_size,
        "workers": workers,
        "device": process.device,
        "amp": amp,
        "rank": process.rank,
        "world_size": process.world_size,
    }
    # mmengine, because mmpretrain may stand in for mmcls.
    extra, module = ("timm", "timm") if spec.config is None else ("mmcls", "mmengine")
    if missing_modules([module]):
        raise LskdError(f"this needs {extra}, not installed here; {how_to_install(extra)}")
    own_input: dict[str, Any] = {"img_size": img_size, "crop_pct": crop_pct}
    if spec.config is None:
        from timm_ls_kd.evaluation import evaluate_model

        answers = evaluate_model(str(spec.model), spec.checkpoint, **options, **own_input)
    else:
        if given := [key for key, value in own_input.items() if value is not None]:
            raise LskdError(f"{spec.config} says itself what images become; change {given[0]} there")
        from mmcls_bnn.evaluation import evaluate_config

        answers = evaluate_config(spec.config, spec.checkpoint, **options)
    rows = collect(answers.batches, answers.samples, answers.num_classes, process, name)
    if rows is None:
        return None
    logits, labels, found = rows
    outputs = Outputs(name, logits, labels, answers.keys, answers.class_names, found, answers.templates)
    return outputs.checked(name)
