"""The state of the schedules: what a run takes out of a checkpoint that it goes on from."""

import math

import pytest
import torch
from fairseq.logging import metrics
from fairseq.tasks.translation import EVAL_BLEU_ORDER

from fairseq_kd.multilingual import TranslationMultiLsKdTask
from fairseq_kd.schedule import ScheduledTask
from lskd import CheckpointError


class Epochs:
    """What fairseq's task does at the start of an epoch."""

    def begin_epoch(self, epoch, model): ...


class Task(ScheduledTask, Epochs):
    """A task of one language pair."""


def goes_on(content, epoch, pair="", lang_pairs=None, teacher="", interval=1):
    task = Task()
    if lang_pairs:
        task.lang_pairs = lang_pairs
    task.set_checkpoint_dict(content)
    task.begin_schedule(0.9, "adaptive", interval, pair=pair, teacher=teacher, teacher_bleu=20.0)
    task.begin_epoch(epoch, None)
    return task


def test_a_run_without_a_bleu_goes_on_at_its_weight():
    task = goes_on({"": {"weight": 0.1, "epoch": 3}}, 4)
    assert task.kd_weights == {"": 0.1}
    task.post_validate(None, {"bleu": 21.0}, None)
    task.begin_epoch(5, None)
    assert task.kd_weights == {"": pytest.approx(0.9 * 0.5**3)}


def test_a_validation_without_the_pair_leaves_its_weight():
    task = goes_on({"": {"weight": 0.2, "epoch": 3, "bleu": 21.0}}, 3)
    task.post_validate(None, {}, None)
    task.begin_epoch(4, None)
    assert task.kd_weights == {"": 0.2}


def test_pairs_and_teachers_of_another_run_say_nothing():
    state = {pair: {"weight": 0.2, "epoch": 3, "teacher": "a"} for pair in ("de-en", "es-en")}
    for teacher, weight in (("a", 0.2), ("b", 0.9)):
        task = goes_on(state, 3, "de-en", ["de-en", "fr-en"], teacher)
        assert task.kd_weights == {"de-en": weight}
        assert task.kd_state.keys() == {"de-en"}


def test_a_state_without_a_weight_begins_with_the_flag():
    assert goes_on({"": {}}, 2, interval=3).kd_weights == {"": 0.9}


@pytest.mark.parametrize(
    "content",
    [
        [1],
        3,
        "weights",
        {"": 3},
        {"": [1]},
        {"weight": "half"},
        {"weight": [1]},
        *({"": {"weight": weight}} for weight in (50, -0.1, math.nan, "0.5", [0.5], torch.ones(2))),
        {"": {"weight": 0.5, "bleu": math.inf}},
        {"": {"weight": 0.5, "teacher_bleu": "20"}},
        {"": {"weight": 0.5, "epoch": {}}},
        {"": {"weight": 0.5, "epoch": 10**400}},
    ],
    ids=repr,
)
def test_a_state_that_the_plugin_does_not_write_is_one_line(content):
    with pytest.raises(CheckpointError, match="has a state of --kd-alpha-schedule that the plugin") as caught:
        Task().set_checkpoint_dict(content)
    assert "\n" not in str(caught.value)


def test_a_pair_without_sentences_has_no_bleu(monkeypatch):
    monkeypatch.setattr(ScheduledTask, "reduce_metrics", lambda *_: None, raising=False)
    task = object.__new__(TranslationMultiLsKdTask)
    some = torch.tensor([4.0, 3, 2, 1, 4, 3, 2, 1, 4, 4])
    assert len(some) == 2 * EVAL_BLEU_ORDER + 2
    logs = [{"_bleu_de-en": some, "_bleu_fr-en": 0 * some, "_bleu_fr-en_teacher": 0 * some}]
    with metrics.aggregate(new_root=True) as found:
        task.reduce_metrics(logs, None)
    values = found.get_smoothed_values()
    assert values["bleu_de-en"] == 100
    assert not any("fr-en" in name for name in values)
