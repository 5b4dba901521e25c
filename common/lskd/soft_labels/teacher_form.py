"""The form in which a teacher answered what is stored: exact, or fast and so far from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lskd.errors import SoftLabelsError
from lskd.teachers.fast import FAST_MODES, Deviation, FastMode, FastTeacher

TEACHER_FORM = "teacher_form"
"""Its name in a manifest's identity."""

# From the exact teacher on: each takes liberties that those before it do not take.
_LIBERTIES: tuple[FastMode, ...] = ("none", "float32", "bfloat16", "int8")
# How far two answers to one image may be apart, in units of `stored_difference`.
_TOLERANCES = {"float32": 0.01, "bfloat16": 0.1, "int8": 0.1}


@dataclass(frozen=True)
class TeacherForm:
    """In which form a teacher answers.

    Attributes:
        mode: "none" for the exact teacher, or "float32", "bfloat16" or "int8".
        deviation: how far a fast one was from the exact one, as measured when it was made.
        description: what was done to a fast one.
    """

    mode: FastMode = "none"
    deviation: Deviation | None = None
    description: str = ""

    @classmethod
    def of_teacher(cls, fast: FastTeacher | None) -> "TeacherForm":
        """Return the form of a teacher that :func:`lskd.choose_fast` made; None: the exact one."""
        return cls() if fast is None else cls(fast.mode, fast.deviation, fast.description)

    @classmethod
    def of_store(cls, path: Path, identity: Mapping[str, Any]) -> "TeacherForm":
        """Read it from a manifest's identity; soft labels that do not say it are of the exact teacher.

        Raises:
            SoftLabelsError: a form that this release does not know.
        """
        content = identity.get(TEACHER_FORM, {"mode": "exact"})
        try:
            if content["mode"] == "exact":
                return cls()
            if content["mode"] not in FAST_MODES:
                raise KeyError(content["mode"])
            measured = [content[name] for name in ("mean_kl", "max_kl", "agreement", "images")]
            if not isinstance(content["made"], str) or any(isinstance(number, str) for number in measured):
                raise TypeError("no text, or no numbers")
            mean_kl, max_kl, agreement, images = (float(number) for number in measured)
            return cls(content["mode"], Deviation(mean_kl, max_kl, agreement, int(images)), content["made"])
        except (KeyError, TypeError, OverflowError):
            raise SoftLabelsError(
                f"the soft labels in {path} are of a teacher in a form that this release does not know; "
                "write them again or use the release that wrote them"
            ) from None

    @property
    def name(self) -> str:
        """The name in messages and manifests."""
        return "exact" if self.mode == "none" else self.mode

    @property
    def tolerance(self) -> float | None:
        """How far two answers may be apart, see :func:`lskd.stored_difference`; None: as the caller knows."""
        return _TOLERANCES.get(self.mode)

    def as_json(self) -> dict[str, Any]:
        """Return it as it lies in a manifest."""
        if self.deviation is None:
            return {"mode": self.name}
        mean_kl, max_kl, agreement, images = self.deviation
        return {
            "mode": self.name,
            "made": self.description,
            "mean_kl": mean_kl,
            "max_kl": max_kl,
            "agreement": agreement,
            "images": images,
        }

    def __str__(self) -> str:
        """Say whose the words are."""
        if self.deviation is None:
            return "of the exact teacher"
        return f"of a fast teacher ({self.name}): {self.deviation}"


def check_form(path: Path, stored: TeacherForm, asked: FastMode, bound: float) -> None:
    """Decide whether a run that asks for a form takes what is stored.

    It takes what comes from the form that it asks for or one with fewer liberties (exact, float32, bfloat16,
    int8, in this order; "auto" takes any), and was measured within its bound.

    Args:
        path: of the store, for messages.
        stored: the form of what is there.
        asked: by this run.
        bound: on the mean KL(exact || fast), of this run.

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
    if stored.deviation is not None and not stored.deviation.mean_kl <= bound:
        raise SoftLabelsError(f"{about}; the bound of this run is {bound:g}: raise it, or use another folder")
