"""fairseq's students: stored by `python -m fairseq_kd.soft_labels`, read with ``task.kd_soft_labels``."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lskd_study.base.extras import needs_fairseq_extra
from lskd_study.plan.plan import Plan, Run, Store
from lskd_study.trainers.fairseq import CHECKPOINT
from lskd_study.trainers.views import CannotStoreError, Views

_PRESETS_TOP_K = {"tan2019": 8}


def views(plan: Plan, run: Run) -> Views:
    """Return what a student learns from: the training sentences, which are the same in every epoch.

    Raises:
        CannotStoreError: its file stores by itself, cuts sentences, or asks for more words than are stored.
    """
    config = plan.configs[run.config]
    task, criterion = _section(config, "task"), _section(config, "criterion")
    if task.get("kd_soft_labels"):
        raise CannotStoreError(f"{run.config} has a store of its own")
    if task.get("truncate_source"):
        raise CannotStoreError(f"{run.config} sets task.truncate_source, the teacher read whole sentences")
    if _section(config, "dataset").get("train_subset", "train") != "train":
        raise CannotStoreError(f"{run.config} trains on something else than train")
    asked = criterion.get("kd_top_k")
    wanted = _PRESETS_TOP_K.get(str(criterion.get("kd_preset")), 0) if asked is None else int(asked)
    if wanted > int(plan.soft_labels["top_k"]):
        raise CannotStoreError(f"{run.config} asks for the top {wanted}, more than soft_labels.top_k")
    epochs = int(_section(config, "optimization").get("max_epoch") or 0)
    return Views("sentences", epochs, 1)


def command(plan: Plan, store: Store, output: str | None = None) -> list[str]:
    """Return the shell command that stores, paths relative to ``plan.cwd``."""
    teacher = plan.run(store.teacher)
    words = ["python", "-m", "fairseq_kd.soft_labels", plan.data]
    words += ["--path", str(Path(plan.output, teacher.folder, CHECKPOINT)), "--top-k", str(store.top_k)]
    words += ["--values", store.values, "--output", str(plan.labels(store, output))]
    cpu = _section(plan.configs[plan.run(store.writer).config], "common").get("cpu")
    return [*words, "--cpu"] if cpu else words


def write(words: list[str]) -> None:
    """Run such a command in this process.

    Raises:
        LskdError: as the command says it.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with needs_fairseq_extra():
        from fairseq_kd.soft_labels import main
    main(words[3:])


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}
