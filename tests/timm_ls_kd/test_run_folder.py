"""A run folder after a kill at any moment."""

import os
from argparse import Namespace

import pytest
import torch

from timm_ls_kd.run_folder import RunFolder

pytestmark = pytest.mark.unit
METRICS = [10.0, 30.0, 20.0, 30.0, 25.0]


def open_run(folder, start_epoch=0, history=2):
    model = torch.nn.Linear(2, 2)
    return RunFolder(
        folder,
        Namespace(val_split="val", checkpoint_hist=history, model="m"),
        "model: m\n",
        start_epoch,
        False,
        "top1",
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )


def save(run, epochs):
    for epoch in epochs:
        best = run.save(epoch, {"loss": 1.0 / (epoch + 1)}, {"loss": 0.3, "top1": METRICS[epoch]}, lr=0.1)
    return best


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_resumed_folder_is_that_of_an_unbroken_run(tmp_path):
    whole = save(open_run(tmp_path / "whole"), range(5))
    assert whole == (30.0, 1)
    for stop in range(1, 5):
        folder = tmp_path / f"stop{stop}"
        save(open_run(folder), range(stop))
        # killed after the next epoch's row, before its checkpoint: the row is dropped
        with (folder / "summary.csv").open("a") as file:
            file.write(f"{stop},0.1,0.3,99.0,0.1\r\n{stop + 1},0.")
        assert save(open_run(folder, stop), range(stop, 5)) == whole
        assert (folder / "summary.csv").read_bytes() == (tmp_path / "whole" / "summary.csv").read_bytes()
        assert contents(folder) == contents(tmp_path / "whole")


def test_kill_between_last_and_the_numbered_checkpoint(tmp_path):
    run = open_run(tmp_path)
    save(run, [0, 1])
    for name in ("checkpoint-1.pth.tar", "model_best.pth.tar"):
        (tmp_path / name).unlink()
    open_run(tmp_path, start_epoch=2)
    assert contents(tmp_path) == [
        "args.yaml",
        "checkpoint-0.pth.tar",
        "checkpoint-1.pth.tar",
        "last.pth.tar",
        "model_best.pth.tar",
        "summary.csv",
    ]


def test_a_fresh_run_drops_an_old_summary(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,train_loss,eval_top1\r\n0,1.0,2.0\r\n")
    save(open_run(tmp_path), [0])
    assert (tmp_path / "summary.csv").read_text().count("epoch,") == 1
    assert len((tmp_path / "summary.csv").read_text().split()) == 2


def test_last_and_best_are_there_at_every_moment(tmp_path, monkeypatch):
    run = open_run(tmp_path, history=1)
    save(run, [0])
    replaced = []

    def watched(name):
        original = getattr(os, name)

        def call(*paths, **kwargs):
            original(*paths, **kwargs)
            replaced.append(os.path.basename(paths[-1]))
            assert (tmp_path / "last.pth.tar").exists(), name
            assert (tmp_path / "model_best.pth.tar").exists(), name

        monkeypatch.setattr(os, name, call)

    for name in ("replace", "unlink", "remove", "link"):
        watched(name)
    save(run, [1])
    assert {"last.pth.tar", "model_best.pth.tar", "checkpoint-1.pth.tar"} <= set(replaced)
