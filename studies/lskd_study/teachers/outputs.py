"""What a teacher said about each sample of a data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lskd import LskdError
from lskd_study.plan.plan import LOGITS
from lskd_study.teachers.checks import check_consistent
from lskd_study.teachers.npz import read_npz
from lskd_study.teachers.parquet import read_parquet
from lskd_study.teachers.safetensors_file import read_safetensors, write_safetensors

READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".parquet": read_parquet,
}


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


def default_name(path: Path) -> str:
    """Return what a file's teacher is called: the file's stem, or the run's folder for a run's own file."""
    return path.absolute().parent.name if path.name == LOGITS else path.stem


def read_outputs(path: Path | str, name: str | None = None) -> Outputs:
    """Read a file of logits and labels.

    Large arrays are not read but mapped, from the file itself (safetensors, NumPy's ``savez``) or from an
    unnamed temporary file (NumPy's ``savez_compressed``, Parquet, byte orders and layouts that torch does not
    have). Whether numbers are finite is left to who reads them.

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
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LskdError(f"{path} is of no known kind; logits are read from {', '.join(READERS)} files")
    try:
        there = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise LskdError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if not there:
        raise LskdError(f"{path} does not exist or is not a file; check the path")
    found = reader(path)
    check_consistent(
        path,
        found["labels"],
        *(found.get(part) for part in ("logits", "features", "weight", "keys", "class_names")),
    )
    return Outputs(
        name or default_name(path),
        found.get("logits"),
        found["labels"],
        found.get("keys"),
        found.get("class_names"),
        found.get("features"),
        found.get("weight"),
    )


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
    texts = {"keys": outputs.keys, "class_names": outputs.class_names}
    write_safetensors(
        path,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        {name: words for name, words in texts.items() if words is not None},
    )
