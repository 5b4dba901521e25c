"""A fast teacher in mmengine's Runner: measured on training batches, refused, and with a store."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lskd import LskdError, SoftLabels
from lskd.teachers import frozen
from lskd.teachers.fast import supported_modes
from mmcls_bnn import soft_labels

pytestmark = pytest.mark.unit
ROUGHEST = supported_modes(torch.device("cpu"))[-1]  # int8 where the CPU has it


@pytest.fixture
def config(make_config):
    crop = {"type": "RandomResizedCrop", "scale": 16, "crop_ratio_range": (0.5, 1.0)}
    made = make_config(["EpochSeed", "Teacher", "Curves", "SoftLabels"], crop, log_level="INFO")
    made["data_preprocessor"] = made["model"].pop("data_preprocessor")
    made["custom_hooks"][1]["samples"] = 0
    made["train_cfg"]["max_epochs"] = 1
    made["optim_wrapper"] = {"optimizer": {"type": "SGD", "lr": 1e-3}}
    for name in ("val_dataloader", "val_evaluator", "val_cfg", "default_hooks"):
        del made[name]
    return made


@pytest.fixture
def taught_by(config, train):
    """Train with such settings of `distillation`; return the runner and its log."""

    def run(**distillation):
        runner = train(config, model=config["model"] | {"distillation": distillation})
        (log,) = Path(runner.work_dir).rglob("*.log")
        return runner, log.read_text()

    return run


def epoch(runner):
    header, row = (Path(runner.work_dir) / "epochs.csv").read_text().splitlines()[:2]
    return dict(zip(header.split(","), row.split(","), strict=True))


@pytest.mark.parametrize("mode", ["float32", ROUGHEST])
def test_measured_on_training_batches(taught_by, config, mode, monkeypatch):
    config["optim_wrapper"]["optimizer"]["lr"] = 0  # one student: a binary one that learns amplifies rounding
    seen = []
    choose = frozen.choose_fast

    def spy(model, images, *arguments, **named):
        seen.append((images, model, named["exact"](images)))
        return choose(model, images, *arguments, **named)

    monkeypatch.setattr(frozen, "choose_fast", spy)
    exact, _ = taught_by()
    fast, log = taught_by(teacher_fast={"mode": mode, "bound": 0.05})
    made = "convolutions in int8" if mode == "int8" else mode
    assert re.search(
        rf"teacher 'test_resnet', fast: {made}, 15 of 15 batch norms folded, channels-last: [\d.]+ times as "
        r"fast .*; KL\(exact \|\| fast\) [\d.e-]+ nats on the mean of 72 images, [\d.e-]+ at most",
        log,
    )
    ((images, model, said),) = seen  # the exact run measured nothing
    assert images.shape == (96, 1, 16, 16)
    assert -1 <= float(images.min()) < float(images.max()) <= 1  # normalised for the teacher
    torch.testing.assert_close(said, model(images), rtol=0, atol=0)
    assert fast.model.teacher.form.mode == mode
    for column in ("train_ce", "train_teacher_entropy"):
        assert float(epoch(fast)[column]) == pytest.approx(float(epoch(exact)[column]), rel=0.02), column
    assert epoch(fast) != epoch(exact)  # it was another teacher


def test_the_students_images_and_weights_do_not_notice(taught_by, config, monkeypatch):
    """With the exact teacher put back after it was measured, the run is the exact one to the bit."""
    config["custom_hooks"] = [{"type": "TeacherHook", "samples": 0}, {"type": "CurvesHook"}]  # no new seeds
    exact, _ = taught_by()
    speed_up = frozen.FrozenTeacher.speed_up

    def measured_alone(teacher, *arguments, **named):
        before = dict(vars(teacher))
        line = speed_up(teacher, *arguments, **named)
        vars(teacher).update(before)
        return line

    monkeypatch.setattr(frozen.FrozenTeacher, "speed_up", measured_alone)
    monkeypatch.setattr(
        "mmcls_bnn.distil.classifier.LsKdClassifier.speaking_teacher", lambda self: self.teacher
    )
    fast, _ = taught_by(teacher_fast={"mode": "float32"})
    assert epoch(exact) == epoch(fast)
    torch.testing.assert_close(exact.model.state_dict(), fast.model.state_dict(), rtol=0, atol=0)


def test_one_that_is_too_rough_is_refused_in_one_line(taught_by):
    with pytest.raises(LskdError, match=r"is too far from the exact one: KL.*the bound is 1e-30") as error:
        taught_by(teacher_fast={"mode": "bfloat16", "bound": 1e-30})
    assert "\n" not in str(error.value)


def test_needs_the_hook_that_makes_it(taught_by, config):
    config["custom_hooks"] = []
    with pytest.raises(LskdError, match="teacher_fast needs dict"):
        taught_by(teacher_fast={"mode": "float32"})


def test_with_a_store(taught_by, config, tmp_path, monkeypatch, capsys):
    store = {"path": str(tmp_path / "store"), "top_k": 0}
    fast = {"mode": ROUGHEST, "bound": 0.05}
    with pytest.raises(LskdError, match="1e-30"):
        taught_by(soft_labels=store, teacher_fast={"mode": ROUGHEST, "bound": 1e-30})
    assert not (tmp_path / "store").exists()
    writes, log = taught_by(soft_labels=store, teacher_fast=fast)
    assert "teacher 'test_resnet', fast: " in log
    form = SoftLabels(store["path"]).identity["teacher_form"]
    assert (form["mode"], form["images"]) == (ROUGHEST, 72)
    with pytest.raises(LskdError, match="this run asks for the exact teacher"):
        taught_by(soft_labels=store)
    if ROUGHEST != "float32":  # a CPU without VNNI and AVX512_BF16 has no rougher one
        with pytest.raises(LskdError, match="asks for float32, which is closer to the exact one"):
            taught_by(soft_labels=store, teacher_fast={"mode": "float32"})
    with pytest.raises(LskdError, match="bound of this run is 1e-30"):
        taught_by(soft_labels=store, teacher_fast={"mode": "auto", "bound": 1e-30})
    _, log = taught_by(soft_labels=store | {"verify": 96}, teacher_fast=fast)
    assert f"is allowed of a teacher in {ROUGHEST})" in log
    with monkeypatch.context() as patch:
        patch.setattr(
            "mmcls_bnn.distil.classifier.load_teacher", lambda *a: pytest.fail("a teacher was built")
        )
        reads, log = taught_by(soft_labels=store, teacher_fast={"mode": "auto", "bound": 0.05})
    assert f"of a fast teacher ({ROUGHEST}): KL(exact || fast)" in log
    assert "val_ce to val_agreement in epochs.csv, stay empty" in log
    torch.testing.assert_close(writes.model.state_dict(), reads.model.state_dict(), rtol=0, atol=0)

    # Ahead of training, the same.
    ahead = copy.deepcopy(config)
    ahead["model"]["distillation"] = {"soft_labels": store | {"path": str(tmp_path / "ahead")}}
    ahead["model"]["distillation"]["teacher_fast"] = fast
    (tmp_path / "recipe.py").write_text("".join(f"{name} = {value!r}\n" for name, value in ahead.items()))
    assert soft_labels.main([str(tmp_path / "recipe.py"), "--cpu"]) == 0
    assert f"of a fast teacher ({ROUGHEST}): KL(exact || fast)" in capsys.readouterr().out
    trained, ahead = SoftLabels(store["path"]), SoftLabels(tmp_path / "ahead")
    assert ahead.identity["teacher_form"] == form
    keys = np.arange(96)
    np.testing.assert_allclose(ahead.take(keys).values, trained.take(keys).values, atol=0.05)
