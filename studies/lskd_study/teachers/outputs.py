"""What a teacher said about each sample of a data set, in memory and as a file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lskd import LskdError
from lskd_study.plan.plan import LOGITS
from lskd_study.teachers.files import read_file, write_safetensors


@dataclass(frozen=True)
class Outputs:
    """Logits of one teacher, and what else is known about the samples.

    Attributes:
        name: how reports call the teacher.
        logits: ``(N, K)`` floating point of any precision, mapped from a file where that is possible. None
            where only features are known.
        labels: ``(N,)`` int64.
        keys: names of the samples, unique.
        class_names: names of the ``K`` classes.
        features: ``(N, D)``, the activations before the classifier.
        templates: ``(K, D)``, the classifier's weights: row c is the template of class c.
    """

    name: str
    logits: Tensor | None
    labels: Tensor
    keys: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    features: Tensor | None = None
    templates: Tensor | None = None

    def checked(self, where: Path | str) -> "Outputs":
        """Return itself if all belongs together; ``where`` it comes from, for the message.

        Whether numbers are finite is left to who reads them.

        Raises:
            LskdError: lengths or widths that differ, labels that are no class, fewer than two classes, or a
                name that occurs twice.
        """
        for name, rows in (("logits", self.logits), ("features", self.features), ("keys", self.keys)):
            if rows is not None and len(rows) != len(self.labels):
                raise LskdError(
                    f"{where}: {name} have {len(rows):,} rows, labels {len(self.labels):,}; "
                    "store one of each a sample"
                )
        features, weight = self.features, self.templates
        if features is not None and weight is not None and features.shape[1] != weight.shape[1]:
            raise LskdError(
                f"{where}: features have {features.shape[1]} columns, weight {weight.shape[1]}; "
                "store the features that go into this classifier"
            )
        by_class = {
            "logits": None if self.logits is None else self.logits.T,
            "weight": weight,
            "class_names": self.class_names,
        }
        counts = [(name, len(rows)) for name, rows in by_class.items() if rows is not None]
        (first, classes), *others = counts or [("labels", int(self.labels.max()) + 1)]
        for name, count in others:
            if count != classes:
                raise LskdError(
                    f"{where}: {first} have {classes:,} classes, {name} {count:,}; store all of them"
                )
        if classes < 2:
            raise LskdError(f"{where}: {first} have {classes} class; at least two are needed")
        outside = ((self.labels < 0) | (self.labels >= classes)).nonzero()
        if len(outside):
            index = int(outside[0])
            raise LskdError(
                f"{where}: the label of sample {index} is {int(self.labels[index])}; "
                f"with {classes:,} classes labels are 0 to {classes - 1}"
            )
        for name, texts in (("keys", self.keys), ("class_names", self.class_names)):
            if texts is not None and len(set(texts)) < len(texts):
                twice = Counter(texts).most_common(1)[0][0]
                raise LskdError(f"{where}: {name} has {twice!r} twice; each needs a name of its own")
        return self


def default_name(path: Path) -> str:
    """Return what a file's teacher is called: the file's stem, or the run's folder for a run's own file."""
    return path.absolute().parent.name if path.name == LOGITS else path.stem


def read_outputs(path: Path | str, name: str | None = None) -> Outputs:
    """Read a file of logits and labels; of a safetensors file only what is looked at gets into memory.

    Args:
        path: ``.npz``, ``.safetensors`` or ``.parquet`` with ``labels`` ``(N,)``, whole numbers from 0, and
            ``logits`` ``(N, K)`` or ``features`` ``(N, D)``. Optional: ``weight`` ``(K, D)``, the
            classifier's; ``keys``, the samples' names; ``class_names``. In Parquet a row of logits is a list,
            and class names are JSON in the schema's metadata; in safetensors names are UTF-8 in uint8, joined
            by newlines.
        name: how reports call the teacher; None: the file's stem.

    Raises:
        LskdError: one line that says what is wrong with the file.
    """
    path = Path(path)
    found = read_file(path)
    logits, templates = (found.pop(part, None) for part in ("logits", "weight"))
    return Outputs(name or default_name(path), logits, templates=templates, **found).checked(path)


def write_outputs(outputs: Outputs, path: Path | str) -> None:
    """Write outputs as safetensors, whole or not at all; numbers keep their precision.

    Raises:
        LskdError: another suffix, or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise LskdError(f"outputs are written as .safetensors; call {path} {path.stem}.safetensors")
    tensors = {
        "logits": outputs.logits,
        "labels": outputs.labels,
        "features": outputs.features,
        "weight": outputs.templates,
    }
    write_safetensors(path, tensors, {"keys": outputs.keys, "class_names": outputs.class_names})
