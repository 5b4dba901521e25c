"""What a job does in its folder: a training with its results, or the soft labels of one teacher.

Both have a ``name`` for lines of progress, the trainer's shell ``command``, patterns of the ``files`` that it
writes, and say in ``done`` what was done, for the error that the data changed meanwhile.
"""

import json
from pathlib import Path
from typing import Any

import torch

from lskd import LskdError, SoftLabels
from lskd.base.files import write_text
from lskd.base.tensors import require_finite
from lskd.checkpoints import file_checksum
from lskd.terms import centred
from lskd_study.base.text import csv_text, gigabytes
from lskd_study.plan.folders import LABEL_FILES, LOG
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import CURVES, LOGITS, TRANSLATIONS, Plan, Run, Store
from lskd_study.runs.log import logged
from lskd_study.runs.watch import watched
from lskd_study.stores.state import rerun_command, stored_identity
from lskd_study.teachers.files import write_safetensors
from lskd_study.trainers import trainer_of

_LOSSES = ("train_ce", "train_hard_ce", "val_loss")


class Training:
    """One run: it trains, then curves and the answers of its model are stored."""

    def __init__(self, plan: Plan, run: Run) -> None:
        self.plan, self.run = plan, run
        self.folder = Path(plan.output, run.folder)
        self.trainer = trainer_of(plan.ecosystem, run.role)
        self.name, self.done = run.id, f"{run.id} was trained"
        self.command, self.files = self.trainer.command(plan, run), self.trainer.files
        self._stored: dict[str, Any] | None = None

    def identity(self, data: str) -> dict[str, Any]:
        """Return the run's settings, after a look at the soft labels that it reads."""
        self._stored = stored_identity(self.plan, self.run, data)
        return {"settings": self.plan.settings(self.run)}

    def can_go_on(self) -> bool:
        """Whether there is a whole checkpoint."""
        return self.trainer.resume(self.folder) is not None

    def do(self, goes_on: bool) -> str:
        """Train and measure; return how good the run is."""
        more = (self.trainer.resume(self.folder) or []) if goes_on else []
        with logged(self.run.id, self.folder / LOG):
            with watched(self.plan, self.run, goes_on):
                self.trainer.train(self.command[1:] + more)
            rows = self.trainer.read_curves(self.folder, self.run.role)
            self._store_curves(rows)
            found = self.trainer.collect(self.folder, Path(self.plan.data))
            store = _store_translations if self.plan.kind is TRANSLATION else _store_logits
            return store(self.folder, found, rows)

    def _store_curves(self, rows: list[dict[str, str]]) -> None:
        for row in rows:
            for name in _LOSSES:
                if value := row.get(name):
                    require_finite(name, float(value), int(row["epoch"]))
        # One set of columns for a whole study, though its teachers and students may come from two trainers.
        columns = trainer_of(self.plan.ecosystem, "student").curve_columns
        lines = ([row.get(name, "") for name in columns] for row in rows)
        write_text(self.folder / CURVES, csv_text(columns, lines))

    def record(self) -> dict[str, Any]:
        """Return the run's settings, weights and soft labels."""
        weights = self.folder / self.trainer.checkpoint  # of a failed run perhaps not there
        checksum = file_checksum(weights) if weights.exists() else ""
        return {
            "run": self.run.id,
            "role": self.run.role,
            "rerun_command": rerun_command(self.plan, self.run),
            "settings": self.plan.settings(self.run),
            "seed": self.run.seed,
            "checkpoint": {"file": weights.name, "sha256": checksum},
            "soft_labels": self._stored,
            "size": self._size() if checksum else None,
        }

    def _size(self) -> dict[str, float | None] | None:
        try:
            return self.trainer.size(self.plan, self.run).model_dump()
        except Exception:  # of frameworks; a run is no worse for it
            return None


class Storing:
    """One store: a teacher is asked about all that its students will see."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.folder = Path(plan.output, store.folder)
        self.trainer = trainer_of(plan.ecosystem, "student")
        self.name = f"soft labels of {store.id}"
        self.done = f"{self.name} were written"
        self.command, self.files = self.trainer.store_command(plan, store), LABEL_FILES
        self._written: dict[str, Any] = {}

    def identity(self, data: str) -> dict[str, Any]:
        """Return what is stored of each answer; a teacher that was trained anew makes another store."""
        drawn = {"sampled": True} if self.store.sampled else {}
        return {"seed": self.store.seed, "top_k": self.store.top_k, "values": self.store.values, **drawn}

    def can_go_on(self) -> bool:
        """Whether some are stored."""
        return self.plan.labels(self.store).exists()

    def do(self, goes_on: bool) -> str:
        """Write them; return how large they are.

        Raises:
            LskdError: also if they are not complete then.
        """
        with logged(self.name, self.folder / LOG):
            self.trainer.store(self.command)
        labels = SoftLabels(self.plan.labels(self.store))
        if not labels.complete:
            raise LskdError(f"{self.plan.labels(self.store)} is not complete; the log is {self.folder / LOG}")
        info, error = labels.info(), labels.own_error
        self._written = {
            "checksum": info["checksum"],
            "bytes": info["bytes"],
            "samples": labels.layout.samples,
            "epochs": labels.layout.epochs,
            "rows": labels.rows,
            **self.store.kept,
            "own_error": error and error.as_json(),
        }
        return gigabytes(info["bytes"])

    def record(self) -> dict[str, Any]:
        """Return the store's students, and what was stored; of a store that failed there is nothing."""
        written = {"soft_labels": self._written} if self._written else {}
        return {"store": self.store.id, "students": self.store.students, **written}


def _store_logits(folder: Path, found: Any, rows: list[dict[str, str]]) -> str:
    """Write ``val_logits.safetensors``; return how good the run is."""
    logits, labels = found.logits, found.labels
    require_finite("the logits of the validation images", logits, int(rows[-1]["epoch"]))
    tensors = {
        # Less each image's largest, beside which float16 has its finest steps: no tie is made at the top.
        "logits": centred(logits).clamp(min=torch.finfo(torch.float16).min).to(torch.float16),
        "labels": labels.to(torch.int64),
    }
    write_safetensors(folder / LOGITS, tensors, {"keys": found.keys})
    return f"val top-1 {100 * float((logits.argmax(-1) == labels).float().mean()):.2f} %"


def _store_translations(folder: Path, found: Any, rows: list[dict[str, str]]) -> str:
    """Write ``translations.jsonl``, the test set by the best epoch; return how good the run is."""
    write_text(folder / TRANSLATIONS, "".join(json.dumps(line) + "\n" for line in found))
    return f"best val BLEU {max(float(row['val_bleu'] or 'nan') for row in rows):.2f}"
