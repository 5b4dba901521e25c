"""What a store keeps of a teacher's logits, what a student reads there, and the form of the teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lskd.errors import SoftLabelsError
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.packed import LEVELS, codes
from lskd.teachers.fast import FastMode, TeacherForm
from lskd.teachers.replay import augmentation_seed
from lskd.terms import Rest, TopK, centred, sampled_log_probabilities, top_k_log_probabilities

TEACHER_FORM = "teacher_form"
"""Its name in a manifest's identity."""

# From the exact teacher on: each takes liberties that those before it do not take.
_LIBERTIES: tuple[FastMode, ...] = ("none", "float32", "bfloat16", "int8")
_DRAWING = 0x5A3D  # tells the draws of classes from the seeds of augmentation
TOLERANCE = {"float32": 0.01, "float16": 0.02, "packed": 0.03, "autocast": 0.1}
"""How far two answers to one image may be apart, in nats per nat, see :func:`stored_difference`: other
kernels, and half precision of what is stored or of the teacher."""
_LEAST = -15.0  # log-probabilities below are as good as none


def drawing_points(keys: ArrayLike, row: ArrayLike = 0) -> Tensor:
    """Return what the classes of rows are drawn by: it follows from the keys and the rows' numbers alone.

    Args:
        row: numbers of the rows within their samples, broadcast with the keys.

    Returns:
        in [0, 1), float32 on the CPU.
    """
    samples, rows = np.broadcast_arrays(np.asarray(keys), np.asarray(row))
    # Of 32 bits the first 24, which float32 has: it must not be rounded to 1.
    return torch.from_numpy((augmentation_seed(_DRAWING, samples, rows) >> 8).astype(np.float32) / 2**24)


def stored_form(
    logits: Tensor, layout: SoftLabelsLayout, keys: ArrayLike | None = None
) -> tuple[Tensor, Tensor]:
    """Return logits in the form in which soft labels are stored.

    With ``k < num_classes``: the ``k`` largest log-probabilities, or of a sampled store the log-weights of
    ``k`` that are drawn, largest first. With all classes they are in
    the classes' order: in float32 the logits as they came (float64 ones less their largest), so that a
    student's arithmetic is that of training online, number for number, at any temperature; in float16
    log-probabilities, of which half precision keeps the large ones best.

    Args:
        logits: ``(rows, num_classes)``.
        keys: ``(rows,)``, which a sampled store needs.

    Returns:
        values ``(rows, k)`` in the layout's dtype, finite, and int64 ids ``(rows, k)``.

    >>> layout = SoftLabelsLayout(num_classes=3, k=3, samples=1, values="float32")
    >>> [part.tolist() for part in stored_form(torch.tensor([[2.0, 0.0, 1.0]]), layout)]
    [[[2.0, 0.0, 1.0]], [[0, 1, 2]]]
    """
    logits = logits.detach()
    # float64 alone has something to lose.
    logits = centred(logits).float() if logits.dtype == torch.float64 else logits.float()
    if layout.sampled and layout.k < layout.num_classes:
        if keys is None:
            raise ValueError("what is drawn follows from the samples' keys; give them")
        values, ids = sampled_log_probabilities(logits, layout.k, drawing_points(keys).to(logits.device))
    elif layout.k < layout.num_classes:
        values, ids = top_k_log_probabilities(logits, layout.k)
    else:
        values = logits if layout.values == "float32" else logits.log_softmax(-1)
        ids = torch.arange(layout.k, device=logits.device).expand(values.shape)
    return as_stored(values, layout), ids


def as_stored(values: Tensor, layout: SoftLabelsLayout) -> Tensor:
    """Return log-probabilities as they come back from a store: in its dtype, finite, in float16 if packed.

    >>> packed = SoftLabelsLayout(num_classes=3, k=3, samples=1, values="packed")
    >>> as_stored(torch.tensor([0.0, -1.0, -40.0]), packed).tolist()
    [-0.0, -1.0078125, -16.0]
    """
    if layout.values == "packed":
        return torch.from_numpy(LEVELS[codes(values.float().cpu().numpy())]).to(values.device)
    dtype = torch.float16 if layout.values == "float16" else torch.float32
    return values.clamp(min=torch.finfo(dtype).min).to(dtype)


def teacher_form(
    values: Tensor, ids: Tensor, layout: SoftLabelsLayout, rest: Rest = "spread"
) -> Tensor | TopK:
    """Return stored values as what :class:`lskd.DistillationLoss` takes.

    Args:
        values: ``(..., k)`` as stored.
        ids: ``(..., k)``.
        rest: what becomes of the classes that are not stored; drawn ones stand for all.

    Returns:
        Logits ``(..., num_classes)`` in float32 where all classes are stored, a :class:`TopK` elsewhere.
    """
    values = values.float()
    if values.shape[-1] == layout.num_classes:
        return values
    return TopK(values, ids.long(), "renormalise" if layout.sampled else rest, layout.sampled)


def check_reading(path: Path, layout: SoftLabelsLayout, temperature: float, rest: Rest) -> None:
    """Raise SoftLabelsError where a loss asks a store for another temperature than 1 which it cannot give."""
    if temperature == 1 or layout.k == layout.num_classes:
        return
    if layout.sampled:
        raise SoftLabelsError(
            f"the classes in {path} are drawn, which is right at temperature 1 and biased at "
            f"{temperature:g}: train at temperature 1, or from a store of the top K"
        )
    # Of a peaked teacher the rest is what eight bits rounded away, and a high temperature makes it large.
    if layout.values == "packed" and rest in ("spread", "lump"):
        raise SoftLabelsError(
            f"the values in {path} are packed, too coarse for what is missing to 1 at temperature "
            f"{temperature:g}: renormalise or restrict the rest, train at temperature 1, or store float16"
        )


def stored_difference(
    values: NDArray[Any], ids: NDArray[Any], logits: Tensor, sampled: bool = False
) -> Tensor:
    """Return how far a teacher's answers are from stored ones: the largest difference of log-probabilities.

    In units of ``1 + |log-probability|``: the rounding of stored values and of logits grows with it.

    Args:
        values: ``(n, k)`` as stored.
        ids: ``(n, k)``.
        logits: ``(n, num_classes)`` of the teacher now.
        sampled: whether the classes were drawn: those of the least weight may have had less themselves.

    Returns:
        ``(n,)`` in float64; infinity where a number is NaN.

    >>> stored_difference(np.log([[0.5]]), np.array([[1]]), torch.tensor([[0.0, 0.0]])).tolist()
    [0.0]
    """
    stored, places = torch.from_numpy(values.astype(np.float64)), torch.from_numpy(ids.astype(np.int64))
    if places.shape[-1] == logits.shape[-1]:
        stored = stored.log_softmax(-1)
    said = logits.cpu().double().log_softmax(-1).gather(-1, places).clamp(min=_LEAST)
    stored = stored.clamp(min=_LEAST)
    apart = said - stored
    if sampled:
        apart = torch.where(stored <= stored.amin(-1, keepdim=True), apart.clamp(min=0.0), apart)
    return (apart.abs() / (1 + stored.abs())).nan_to_num(nan=torch.inf).amax(-1)


def form_of_store(path: Path, identity: Mapping[str, Any]) -> TeacherForm:
    """Return the form in a manifest's identity; soft labels that do not say it are of the exact teacher.

    Raises:
        SoftLabelsError: a form that this release does not know.
    """
    try:
        return TeacherForm.of_json(identity.get(TEACHER_FORM, {"mode": "exact"}))
    except (KeyError, TypeError, OverflowError):
        raise SoftLabelsError(
            f"the soft labels in {path} are of a teacher in a form that this release does not know; "
            "write them again or use the release that wrote them"
        ) from None


def check_form(path: Path, stored: TeacherForm, asked: FastMode, bound: float) -> None:
    """Decide whether a run that asks for a form takes what is stored.

    It takes what comes from the form that it asks for or one with fewer liberties (exact, float32, bfloat16,
    int8, in this order; "auto" takes any), and was measured within its bound on the mean KL(exact || fast).

    Raises:
        SoftLabelsError: it does not.
    """
    if stored.mode == "none":
        return
    about = f"the soft labels in {path} are {stored}"
    if asked == "none":
        raise SoftLabelsError(
            f"{about}; this run asks for the exact teacher: ask for a fast one ({stored.mode} or auto), or "
            "write them with the exact one (another folder)"
        )
    if asked != "auto" and _LIBERTIES.index(stored.mode) > _LIBERTIES.index(asked):
        raise SoftLabelsError(
            f"{about}; this run asks for {asked}, which is closer to the exact one: ask for {stored.mode} or "
            "auto, or use another folder"
        )
    if not stored.mean_kl <= bound:
        raise SoftLabelsError(f"{about}; the bound of this run is {bound:g}: raise it, or use another folder")
