"""Tasks whose teacher's share follows validation BLEU: selective distillation (Tan et al., ICLR 2019)."""

import math
from collections.abc import Mapping
from typing import Any

from lskd import AlphaSchedule, CheckpointError
from lskd.teachers.outputs import selective_weight


class ScheduledTask:
    """What comes before a task of fairseq: its schedule, or one for each language pair, in the checkpoint.

    Attributes:
        kd_state: by language pair, `""` for the only one: ``weight``, the teacher's share now; ``epoch``,
            when it was decided; ``bleu``, the student's last; ``teacher_bleu``; ``teacher``, its checksum.
            In the checkpoint: a run that goes on must have the weights of an unbroken one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kd_state: dict[str, dict[str, Any]] = {}
        self._schedules: dict[str, tuple[float, AlphaSchedule]] = {}
        self._interval, self._epoch = 1, 1

    def begin_schedule(
        self,
        weight: float,
        schedule: AlphaSchedule,
        interval: int,
        *,
        pair: str = "",
        teacher: str = "",
        teacher_bleu: float | None = None,
    ) -> None:
        """Decide by the validation BLEU every ``interval`` epochs.

        Args:
            weight: of the teacher, to begin with.
            pair: the language pair, where there are several.
            teacher: the teacher's checksum.
            teacher_bleu: its validation BLEU; None: it is measured beside the student's.
        """
        self._schedules[pair], self._interval = (weight, schedule), interval
        state = self.kd_state.setdefault(pair, {})
        if state.get("teacher", teacher) != teacher:  # nothing that was decided about another one
            state.pop("teacher_bleu", None)
            state["weight"] = weight
        state.setdefault("weight", weight)
        state["teacher"] = teacher
        if teacher_bleu is not None:
            state["teacher_bleu"] = teacher_bleu

    @property
    def kd_weights(self) -> dict[str, float]:
        """What the schedules say, by language pair; they look at the BLEU once in an epoch of theirs.

        That is in the epoch's first update and not in `begin_epoch`: a run that goes on has no schedule then.
        """
        due = (self._epoch - 1) % self._interval == 0
        for pair, (weight, schedule) in self._schedules.items():
            state = self.kd_state[pair]
            if due and state.get("epoch") != self._epoch:
                bleu, of_teacher = state.get("bleu"), state.get("teacher_bleu")
                if None not in (bleu, of_teacher):
                    state["weight"] = selective_weight(weight, schedule, bleu, of_teacher)
                state["epoch"] = self._epoch
        return {pair: float(self.kd_state[pair]["weight"]) for pair in self._schedules}

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """Return what fairseq stores in the checkpoint. (It never reads a task's `state` when it resumes.)"""
        return {type(self).__name__: {pair: dict(state) for pair, state in self.kd_state.items()}}

    def set_checkpoint_dict(self, content: Any) -> None:
        """Take the schedules' state out of the checkpoint that training goes on from.

        Raises:
            CheckpointError: it is none that the plugin writes.
        """
        try:
            states = {pair: _checked(state) for pair, state in content.items()}
            pairs = getattr(self, "lang_pairs", [""])
            self.kd_state = {pair: state for pair, state in states.items() if pair in pairs}
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise CheckpointError(
                "the checkpoint that the run goes on from has a state of --kd-alpha-schedule that the plugin "
                "does not write; give another one with --restore-file, or remove it to begin anew"
            ) from None

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Note the epoch."""
        super().begin_epoch(epoch, model)  # type: ignore[misc]
        self._epoch = epoch

    def post_validate(self, model: Any, stats: dict[str, Any], agg: Any) -> None:
        """Note the BLEU that fairseq has just logged of a validation; None where there was none."""
        for pair, state in self.kd_state.items():
            column = f"bleu_{pair}" if pair else "bleu"
            state["bleu"] = stats.get(column)
            if (measured := stats.get(f"{column}_teacher")) is not None:
                state["teacher_bleu"] = measured


def _checked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the plugin writes of a pair; raises as Python does where it would write no such thing."""
    names = ("weight", "epoch", "bleu", "teacher_bleu")
    numbers: dict[str, Any] = {name: state[name] for name in names if state.get(name) is not None}
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers.values()):
        raise ValueError
    if not 0 <= numbers.get("weight", 0) <= 1:
        raise ValueError
    return numbers | ({"teacher": str(state["teacher"])} if "teacher" in state else {})
