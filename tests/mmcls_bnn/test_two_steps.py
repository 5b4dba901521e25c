"""Both steps in one run: as two runs that hand a checkpoint on, and as if nothing had broken it off."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lskd import CheckpointError, LskdError
from lskd.base.files import read_csv
from mmcls_bnn.distil.classifier import NOTE, read_note
from mmcls_bnn.distil.hooks import SafeCheckpointHook

pytestmark = pytest.mark.unit

# Of step 1, by layers, as the recipes have it.
DECAYING = {
    "optimizer": {"type": "Adam", "lr": 2.5e-3, "weight_decay": 0.1},
    "paramwise_cfg": {"norm_decay_mult": 0, "custom_keys": {"head": {"decay_mult": 0}}},
}
LINEAR = {"type": "LinearDecay"}


@pytest.fixture
def config(make_config):
    """Four epochs without a random draw, two of them step 1."""
    found = make_config(["SafeCheckpoint", "FlipRatio", "Curves"], optim_wrapper=DECAYING)
    found["train_dataloader"]["sampler"]["shuffle"] = False
    found["custom_hooks"] += [{"type": "TwoStepHook", "epochs": 2}]
    found["param_scheduler"] = [{**LINEAR, "end": 2}, {**LINEAR, "begin": 2}]
    found["train_cfg"]["max_epochs"] = 4
    return found


def ended(runner, epoch):
    return torch.load(f"{runner.work_dir}/epoch_{epoch}.pth", weights_only=True)


def test_one_run_is_two_that_hand_a_checkpoint_on(config, make_config, student, train):
    both = train(config)
    alone = {**config, "custom_hooks": config["custom_hooks"][:-1], "param_scheduler": [LINEAR]}
    alone["train_cfg"] = {**alone["train_cfg"], "max_epochs": 2}
    backbone = {**student["backbone"], "binarize": ("activations",)}
    first = train(alone, model={**student, "backbone": backbone})
    start = f"{first.work_dir}/epoch_2.pth"
    plain = {"optimizer": {**DECAYING["optimizer"], "weight_decay": 0}}
    second = train(alone, model={**student, "step1_checkpoint": start}, optim_wrapper=plain)
    for epoch, runner in ((2, first), (4, second)):
        wanted, found = ended(runner, 2)["state_dict"], ended(both, epoch)["state_dict"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert read_note(f"{both.work_dir}/epoch_{epoch}.pth") == read_note(f"{runner.work_dir}/epoch_2.pth")
    rows = read_csv(f"{both.work_dir}/epochs.csv")
    wanted = [row for runner in (first, second) for row in read_csv(f"{runner.work_dir}/epochs.csv")]
    assert [{**row, "epoch": ""} for row in rows] == [{**row, "epoch": ""} for row in wanted]
    assert [bool(row["flip_ratio"]) for row in rows] == [False, False, True, True]


def test_step_1_is_not_scored_as_step_2(config, train):
    """By the run's own configuration, whose weights have the same names."""
    trained = train(config)
    asked = SimpleNamespace(_train_loop={}, model=trained.model, _load_from="epoch_2.pth")
    words = "epoch_2.pth was saved with activations binary, the model binarises activations, weights"
    with pytest.raises(CheckpointError, match=words):
        SafeCheckpointHook().after_load_checkpoint(asked, ended(trained, 2))
    for content in (ended(trained, 4), {"meta": 3}, {"meta": {NOTE: {"binarize": 7}}}):
        SafeCheckpointHook().after_load_checkpoint(asked, content)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_run_that_was_ended_goes_on_in_its_step(config, train, tmp_path, done):
    """After a checkpoint that was not validated yet, too."""
    whole = train(config)
    folder = tmp_path / "ended"
    folder.mkdir()
    shutil.copy(f"{whole.work_dir}/epoch_{done}.pth", folder)
    (folder / "last_checkpoint").write_text(str(folder / f"epoch_{done}.pth"))
    rows = Path(whole.work_dir, "epochs.csv").read_text().splitlines()
    names, row = rows[0].split(","), rows[done].split(",")
    row = ["" if name.startswith("val_") else value for name, value in zip(names, row, strict=True)]
    (folder / "epochs.csv").write_text("\n".join([*rows[:done], ",".join(row)]) + "\n")
    again = train(config, work_dir=str(folder), resume=True)
    for part in ("state_dict", "optimizer"):
        torch.testing.assert_close(ended(again, 4)[part], ended(whole, 4)[part], rtol=0, atol=0)
    assert read_csv(folder / "epochs.csv") == read_csv(f"{whole.work_dir}/epochs.csv")


def test_a_control_that_stays_real_has_the_same_schedule(config, student, train):
    student["backbone"]["binarize"] = []
    runner = train(config, model={**student, "type": "UntaughtClassifier"})
    assert read_note(f"{runner.work_dir}/epoch_4.pth")["binarize"] == []
    assert [float(row["lr"]) for row in read_csv(f"{runner.work_dir}/epochs.csv")] == [2.5e-3, 1.25e-3] * 2
    wrapper = runner.optim_wrapper
    assert {group["weight_decay"] for group in wrapper.optimizer.param_groups} == {0}
    assert wrapper.get_lr()["base_lr"] == wrapper.get_lr()["lr"][:1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"custom_hooks": [{"type": "TwoStepHook", "epochs": 4}]}, "epochs is 4; .* from 1 to 3"),
        ({"custom_hooks": [{"type": "TwoStepHook", "epochs": 0}]}, "epochs is 0; .* from 1 to 3"),
        ({"train_cfg": {"by_epoch": False, "max_iters": 4}}, "trained by epochs; take it out"),
        ({"param_scheduler": [LINEAR]}, "LinearDecay of param_scheduler does not fit two steps"),
        ({"param_scheduler": [{"type": "LinearLR", "start_factor": 0.1, "begin": 2}]}, "from the first rate"),
        ({"step1_checkpoint": "step1.pth"}, "take out model.step1_checkpoint, or the hook"),
        ({"backbone": {"type": "ResNet_CIFAR", "depth": 18}}, "is for a ReActNet"),
    ],
)
def test_two_steps_that_cannot_be_are_refused(config, student, train, change, words):
    model = change if change.keys() & {"step1_checkpoint", "backbone"} else {}
    with pytest.raises(LskdError, match=words):
        train({**config, "param_scheduler": [], **({} if model else change)}, model={**student, **model})
