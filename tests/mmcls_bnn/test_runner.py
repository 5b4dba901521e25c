"""A whole training run of mmengine's Runner in this process, with a teacher filled by hand."""

import copy
import logging
import runpy
from pathlib import Path
from types import SimpleNamespace

import mmcls
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from lskd import DivergedError, LskdError
from lskd.base.files import read_csv
from mmcls_bnn.compat import MODELS
from mmcls_bnn.distil import hooks

pytestmark = pytest.mark.unit


@pytest.fixture
def config(make_config):
    return make_config(["SafeCheckpoint", "Curves"])


def test_teacher_is_the_file_after_training_and_outside_the_student(config, train, teacher_file):
    runner = train(config)
    model, teacher = runner.model, runner.model.teacher
    weights = torch.load(teacher_file, weights_only=True)["state_dict"]
    # Running statistics too: BatchNorm in train mode would have moved them.
    torch.testing.assert_close(dict(teacher.model.state_dict()), dict(weights), rtol=0, atol=0)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(teacher(images), teacher(images))  # dropout of 0.5 is off
    assert copy.deepcopy(model).teacher is teacher

    checkpoint = torch.load(f"{runner.work_dir}/epoch_2.pth", weights_only=True)
    alone = MODELS.build(config["model"])  # a student for whom no teacher was loaded
    assert checkpoint["state_dict"].keys() == alone.state_dict().keys()
    assert len(checkpoint["optimizer"]["state"]) == len(list(alone.parameters()))


@pytest.fixture
def child(digits, tmp_path):
    """A recipe based on one of ours, as it is read with `--cfg-options`."""
    path = tmp_path / "child.py"

    def read(text="", **options):
        data = {"dataset": {"data_root": str(digits), "num_classes": 4}}
        folders = {f"{split}_dataloader": data for split in ("train", "val")}
        base = Path(__file__).parents[2] / "recipes" / "reactnet" / "digits_kd.py"
        path.write_text(f"_base_ = {str(base)!r}\n{text}\n")
        recipe = Config.fromfile(str(path))
        recipe.merge_from_dict(
            {
                "work_dir": str(tmp_path / "run"),
                "log_level": "WARNING",
                "experiment_name": tmp_path.name,
                **folders,
                **options,
            }
        )
        return recipe

    return read


@pytest.mark.parametrize("where", ["child", "options"])
def test_the_teacher_that_is_named_is_used_and_dumped(child, where, tmp_path):
    teacher = {"checkpoint": "other.pth", "smoothing": 0.3}
    if where == "child":
        recipe = child(f"model = dict(teacher=dict(**{teacher!r}))")
    else:
        recipe = child(**{f"model.teacher.{name}": value for name, value in teacher.items()})
    runner = Runner.from_cfg(recipe)
    with pytest.raises(LskdError, match=r"other\.pth does not exist"):
        runner.train()
    dumped = Config.fromfile(str(tmp_path / "run" / "child.py"))
    for name, value in teacher.items():
        assert getattr(runner.model.teacher_settings, name) == value
        assert dumped.model.teacher[name] == value


def test_a_variable_that_changes_nothing_is_refused(child):
    recipe = child(data_root="own")
    with pytest.raises(LskdError, match=r"changes nothing .* set test_dataloader\.dataset\.data_root"):
        Runner.from_cfg(recipe).train()


@pytest.fixture
def plain(config):
    """A config without a teacher, and so without a student of ours."""
    config["model"]["type"] = "ImageClassifier"
    del config["model"]["teacher"]
    config["val_evaluator"] = [{"type": "Accuracy", "topk": (1,)}]
    return config


def test_teacher_hook_wants_a_distilling_classifier(plain, train):
    with pytest.raises(LskdError, match="take it out of custom_hooks"):
        train(plain, custom_hooks=[{"type": "TeacherHook"}])


@pytest.mark.parametrize("by_epoch", [True, False])
def test_a_diverged_run_ends_before_it_is_saved(plain, train, by_epoch, tmp_path):
    plain["optim_wrapper"] = {"optimizer": {"type": "SGD", "lr": 1e38}}
    where = "epoch 1: the"
    if not by_epoch:
        plain["train_cfg"] = {"by_epoch": False, "max_iters": 4, "val_interval": 2}
        where = "iteration 2: the"
    with pytest.raises(DivergedError, match=rf"{where} (training loss_hard|weights) .* the run diverged"):
        train(plain)
    assert not list(tmp_path.rglob("epoch_*.pth"))


def test_validation_outputs_that_are_no_numbers_end_the_run(plain, runner_of):
    runner = runner_of(plain)
    predict = runner.model.predict

    def broken(inputs, data_samples):
        found = predict(inputs, data_samples)
        found[0].pred_label.score = found[0].pred_label.score * float("nan")
        return found

    runner.model.predict = broken
    with pytest.raises(DivergedError, match="epoch 1: the validation outputs are not all finite"):
        runner.train()


def test_training_by_iterations_has_a_row_for_each_validation(config, train):
    config["train_cfg"] = {"by_epoch": False, "max_iters": 5, "val_interval": 2}
    config["custom_hooks"].append({"type": "TeacherHook", "samples": 0})
    runner = train(config)
    rows = read_csv(f"{runner.work_dir}/epochs.csv")
    assert [row["iteration"] for row in rows] == ["2", "4", "5"]
    assert all(float(row[name]) > 0 for row in rows for name in ("train_ce", "val_ce", "val_top1"))


@pytest.mark.parametrize("hooks", [[], ["SafeCheckpointHook"]])
def test_a_resumed_run_keeps_as_many_checkpoints(plain, train, hooks, tmp_path):
    """From our checkpoint, and from mmengine's own, as a config without our hook writes it."""
    plain["custom_hooks"] = [{"type": hook} for hook in hooks]
    plain["default_hooks"]["checkpoint"]["max_keep_ckpts"] = 2
    for epochs, resume in ((3, False), (5, True)):
        plain["train_cfg"]["max_epochs"] = epochs
        train(plain, work_dir=plain["work_dir"], resume=resume)
    kept = sorted(path.name for path in (tmp_path / "run").glob("epoch*.pth"))
    assert kept == ["epoch_4.pth", "epoch_5.pth"]


def test_a_run_goes_on_from_a_whole_checkpoint_whatever_a_kill_left(plain, train, tmp_path):
    """A note of the last checkpoint, or the checkpoint itself, that is written half."""
    plain["custom_hooks"] = [{"type": "SafeCheckpointHook"}]
    folder = tmp_path / "run"
    train(plain, work_dir=plain["work_dir"])
    note, first, last = folder / "last_checkpoint", folder / "epoch_1.pth", folder / "epoch_2.pth"
    for text in ("", "\0" * 99, note.read_text()[:-9]):
        note.write_text(text)
        plain["train_cfg"]["max_epochs"] += 1
        assert train(plain, work_dir=plain["work_dir"], resume=True).epoch == plain["train_cfg"]["max_epochs"]
        assert note.read_text() == str(folder / f"epoch_{plain['train_cfg']['max_epochs']}.pth")
    for path in (first, last, *folder.glob("epoch_[345].pth")):
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(LskdError, match="none lies beside it; remove it to start anew"):
        train(plain, work_dir=plain["work_dir"], resume=True)


def test_checkpoints_that_are_elsewhere_are_found_there(tmp_path):
    runner = SimpleNamespace(work_dir=str(tmp_path / "run"), logger=logging.getLogger())
    note, place = tmp_path / "run" / "last_checkpoint", tmp_path / "place"
    note.parent.mkdir()
    place.mkdir()
    torch.save({}, place / "epoch_1.pth")
    (place / "epoch_2.pth").write_bytes(b"half")
    for noted, found in (
        ("s3://bucket/epoch_3.pth", "s3://bucket/epoch_3.pth"),
        (str(place / "epoch_2.pth"), str(place / "epoch_1.pth")),
    ):
        note.write_text(noted)
        hooks._find_last_checkpoint(runner)
        assert note.read_text() == found


def test_testing_with_augmentation_needs_no_teacher_and_no_store(config, tmp_path):
    """As `mim test --tta` changes the config."""
    script = Path(mmcls.__file__).parent / ".mim" / "tools" / "test.py"
    merge_args = runpy.run_path(str(script))["merge_args"]
    config["custom_hooks"] += [{"type": "TeacherHook"}, {"type": "SoftLabelsHook"}]
    config["model"]["teacher"]["checkpoint"] = "moved_away.pth"
    config["model"]["distillation"] = {"soft_labels": {"path": str(tmp_path / "labels")}}
    model = MODELS.build(copy.deepcopy(config["model"]))
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "epoch_1.pth")
    config |= {
        "test_dataloader": copy.deepcopy(config["val_dataloader"]),
        "test_evaluator": [{"type": "Accuracy", "topk": (1,)}],
        "test_cfg": {},
    }
    options = {"show": False, "show_dir": None, "no_pin_memory": True, "cfg_options": None}
    options |= {"work_dir": str(tmp_path / "test"), "checkpoint": str(tmp_path / "epoch_1.pth")}
    found = {}
    for tta in (False, True):
        given = SimpleNamespace(**options, launcher="none", tta=tta, config="recipe.py")
        cfg = merge_args(Config(copy.deepcopy(config)), given)
        cfg.experiment_name = f"{tmp_path.name}-{tta}"
        found[tta] = Runner.from_cfg(cfg).test()
    assert all(0 <= metrics["accuracy/top1"] <= 100 for metrics in found.values())
