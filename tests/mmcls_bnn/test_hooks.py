"""Hooks, and step 2's start, on models and checkpoints made for the purpose."""

import json
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub

from lskd import CheckpointError, DivergedError, LskdError
from lskd.base.files import read_csv
from mmcls_bnn import recipe
from mmcls_bnn.binary.layers import binary_layers
from mmcls_bnn.binary.reactnet import ReActNet
from mmcls_bnn.data import CheckedImageFolder, seed_worker
from mmcls_bnn.distil.classifier import load_step1
from mmcls_bnn.distil.curves import COLUMNS, CurvesHook
from mmcls_bnn.distil.hooks import EpochSeedHook, FlipRatioHook, SafeCheckpointHook
from mmcls_bnn.register import _report

pytestmark = pytest.mark.unit


class Student(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.backbone = ReActNet(**{"width": 0.125, "stem": "cifar", "in_channels": 1, **settings})


def save(path, model, described=True):
    hub = MessageHub.get_instance(f"test-{path.name}")
    hub.update_scalar("train/loss", 1.5)
    hub.update_info("best_score", np.float64(0.5))
    hub.update_info("best_ckpt", "best.pth")
    hub.update_info("array", np.zeros(3))
    hub.update_info("keep_ckpt_ids", [1, np.int64(2)])
    checkpoint = {"meta": {"epoch": 1}, "state_dict": model.state_dict(), "message_hub": hub.state_dict()}
    recipe = {"model": {"type": "LsKdClassifier", "backbone": {}, "teacher": {"checkpoint": "t"}}}
    runner = SimpleNamespace(model=model, cfg=Config(recipe if described else {}))
    SafeCheckpointHook().before_save_checkpoint(runner, checkpoint)
    torch.save(checkpoint, path)


def test_checkpoints_are_read_by_safe_loading(tmp_path):
    model = Student()
    save(tmp_path / "c.pth", model)
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    info = {"best_score": 0.5, "best_ckpt": "best.pth", "keep_ckpt_ids": [1, 2]}
    assert content["message_hub"]["runtime_info"] == info
    note = content["meta"]["mmcls_bnn"]
    assert note["binarize"] == ["activations", "weights"]
    backbone = {"binarize": ["activations", "weights"]}
    student = {"type": "ImageClassifier", "backbone": backbone, "data_preprocessor": {}}
    assert json.loads(note["model"]) == student  # of the teacher not a word
    hub = MessageHub.get_instance("resumed")
    hub.load_state_dict(content["message_hub"])  # as a resumed run does
    assert hub.get_info("best_score") == 0.5
    save(tmp_path / "c.pth", model, described=False)  # built in Python
    note = torch.load(tmp_path / "c.pth", weights_only=True)["meta"]["mmcls_bnn"]
    assert note == {"binarize": ["activations", "weights"]}


def test_without_the_hook_they_are_read_where_the_package_is_imported(tmp_path):
    torch.save({"log": HistoryBuffer([1.0, 3.0], [1, 1])}, tmp_path / "c.pth")
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(tmp_path / "c.pth", weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)
    assert torch.load(tmp_path / "c.pth", weights_only=True)["log"].mean() == 2.0


class Reaches:
    def __reduce__(self):
        return getattr, (HistoryBuffer, "update")


def test_getattr_in_a_checkpoint_reaches_statistics_alone(tmp_path):
    torch.save(Reaches(), tmp_path / "c.pth")
    with pytest.raises(Exception, match="not allowed"):
        torch.load(tmp_path / "c.pth", weights_only=True)


def test_step_1_loads_into_step_2(tmp_path):
    first, second = Student(binarize=("activations",)), Student()
    save(tmp_path / "step1.pth", first)
    load_step1(second, str(tmp_path / "step1.pth"))
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_step1(second, str(tmp_path / "nosuch.pth"))


ADVICE = r"^step1_checkpoint .*; give the same depth, width, stem and classes as in step 1\.$"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Student(), r"\['activations', 'weights'\] binarised, so it is not step 1"),
        (Student(binarize=("activations",), width=0.25), ADVICE),
        (Student(binarize=("activations",), depth=34), ADVICE),
        (torch.nn.Linear(2, 2), "does not say that it is step 1"),
    ],
)
def test_step_2_refuses_what_is_not_step_1(tmp_path, model, words):
    save(tmp_path / "c.pth", model)
    with pytest.raises(CheckpointError, match=words) as error:
        load_step1(Student(), str(tmp_path / "c.pth"))
    assert "\n" not in str(error.value)


def test_flip_ratio_counts_signs():
    model, logged = Student(), []
    runner = SimpleNamespace(model=model, epoch=0, logger=logging.getLogger("flips"))
    runner.visualizer = SimpleNamespace(add_scalar=lambda *_, **__: None)
    runner.message_hub = SimpleNamespace(update_scalar=lambda _, ratio: logged.append(ratio))
    hook = FlipRatioHook()
    hook.before_train_epoch(runner)
    convolutions = list(binary_layers(model).values())
    with torch.no_grad():
        convolutions[0].weight.neg_()
        convolutions[1].weight.mul_(2)  # another size, the same sign
    hook.after_train_epoch(runner)
    hook.after_train_epoch(runner)
    total = sum(layer.weight.numel() for layer in convolutions)
    assert logged == [pytest.approx(convolutions[0].weight.numel() / total), 0]
    runner.model = Student(binarize=("activations",))
    hook.before_train_epoch(runner)
    hook.after_train_epoch(runner)
    assert len(logged) == 2  # step 1 has no binary weights


def test_epochs_are_seeded_apart_and_repeatably():
    def draw(epoch, rank=0):
        EpochSeedHook().before_train_epoch(SimpleNamespace(seed=0, epoch=epoch, rank=rank))
        seed_worker(0)
        return float(torch.rand(())), float(np.random.rand())

    assert draw(3) == draw(3)
    draws = [draw(3), draw(4), draw(3, rank=1)]
    assert len({torch_draw for torch_draw, _ in draws}) == 3
    assert len({numpy_draw for _, numpy_draw in draws}) == 3


def curve_runner(folder, epoch):
    runner = SimpleNamespace(work_dir=str(folder), epoch=epoch, model=torch.nn.Linear(1, 1), ran=[])
    runner.logger = logging.getLogger("curves")
    runner.optim_wrapper = SimpleNamespace(get_lr=lambda: {"lr": [0.1]})
    runner.message_hub = SimpleNamespace(log_scalars={})
    runner.train_loop = SimpleNamespace(val_begin=1, val_interval=1, max_epochs=3)
    runner.val_loop = SimpleNamespace(run=lambda: runner.ran.append(runner.epoch))
    return runner


def rows(folder):
    return read_csv(folder / "epochs.csv")


def test_curves_of_a_run_killed_before_its_validation(tmp_path):
    hook, runner = CurvesHook(), curve_runner(tmp_path, 0)
    (tmp_path / "epochs.csv").write_text("left over from another run\n")
    hook.before_train(runner)
    assert rows(tmp_path) == []
    for epoch in range(3):
        runner.epoch = epoch
        hook.after_train_iter(runner, 0, {"inputs": [0] * 3}, {"loss": torch.tensor(1.0)})
        hook.after_train_iter(runner, 1, {"inputs": [0]}, {"loss": torch.tensor(5.0)})
        hook.after_train_epoch(runner)
        if epoch < 2:
            runner.epoch = epoch + 1
            hook.after_val_epoch(runner, {"accuracy/top1": 50.0 + epoch})
    found = rows(tmp_path)
    assert tuple(found[0]) == COLUMNS
    assert [row["val_top1"] for row in found] == ["50", "51", ""]
    assert [float(row["train_hard_ce"]) for row in found] == [2.0] * 3  # every sample weighs the same

    resumed = curve_runner(tmp_path, 3)  # from the checkpoint of epoch 3, which was not validated
    CurvesHook().before_train(resumed)
    assert resumed.ran == [3]
    earlier = curve_runner(tmp_path, 1)  # from the checkpoint of epoch 1: later rows will be repeated
    CurvesHook().before_train(earlier)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]
    assert earlier.ran == []


def test_a_run_at_chance_is_named(digits):
    dataset = CheckedImageFolder(str(digits), "val", num_classes=4)
    lines = []
    runner = SimpleNamespace(
        val_dataloader=SimpleNamespace(dataset=dataset), logger=SimpleNamespace(warning=lines.append)
    )
    hook = CurvesHook()
    for hook._top1 in (25.0, 50.0):
        hook.after_train(runner)
    (line,) = lines
    assert "no better than chance: right on 25.0 % of 48 validation images (chance 25.0 %)" in line


def test_a_loading_process_that_dies_is_one_line_in_a_run_of_several_too(capfd, monkeypatch):
    """torch puts a hook around ours, and would lose what ours writes."""
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    monkeypatch.setattr(sys, "excepthook", _report)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit):
            sys.excepthook(type(error), error, None)
    finally:
        torch.distributed.destroy_process_group()
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        "a process that loads data has died (DataLoader worker (pid 7) is killed by signal: Killed)" in line
    )


@pytest.mark.parametrize(("error", "status"), [(LskdError("mistake"), 2), (DivergedError("diverged"), 3)])
def test_a_diverged_run_has_a_status_of_its_own(error, status, capfd):
    with pytest.raises(SystemExit) as end:
        _report(type(error), error, None)
    assert end.value.code == status
    assert capfd.readouterr().err == f"mmcls_bnn: error: {error}\n"

    def work():
        raise error

    assert recipe.run(work) == status
