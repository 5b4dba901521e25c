"""A run folder after a kill at any moment."""

import os
import resource
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lskd import CheckpointError, LskdError, load_teacher_weights
from timm_ls_kd.trainer.run_folder import RunFolder, check_folder, resumed_checkpoint

pytestmark = pytest.mark.unit
METRICS = [10.0, 30.0, 20.0, 30.0, 25.0]


def open_run(folder, start_epoch=0, history=2, epochs=3):
    model = torch.nn.Linear(2, 2)
    return RunFolder(
        folder,
        Namespace(
            val_split="val",
            checkpoint_hist=history,
            model="m",
            eval_metric="top1",
            save_epochs=None,
            epochs=epochs,
        ),
        "model: m\n",
        start_epoch,
        False,
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


@pytest.mark.parametrize(
    ("cell", "message"), [("x", "could not convert"), ("9" * 200_000, "field larger"), ("²", None)]
)
def test_a_damaged_table_to_go_on_from_is_one_line(tmp_path, cell, message):
    save(open_run(tmp_path), [0])
    table = tmp_path / "summary.csv"
    columns = table.read_text().partition("\n")[0].count(",")
    with table.open("a") as file:
        file.write(f"{'1' if message else cell}{f',{cell}' * columns}\n")
    with pytest.raises(LskdError, match=message) if message else nullcontext():
        open_run(tmp_path, start_epoch=2)


def test_a_fresh_run_moves_another_runs_files_aside(tmp_path):
    old = {"summary.csv": "epoch,train_loss,eval_top1\r\n0,1.0,2.0\r\n", "args.yaml": "mine: 1\n"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    save(open_run(tmp_path), [0])
    for name, text in old.items():
        assert (tmp_path / f"{name}.aside-1").read_text() == text.replace("\r\n", "\n")
    assert (tmp_path / "summary.csv").read_text().count("epoch,") == 1
    assert len((tmp_path / "summary.csv").read_text().split()) == 2


def test_a_row_that_a_kill_left_without_a_checkpoint_is_this_runs_own(tmp_path):
    """The row comes first, and will be written again as it is; more rows are another run's."""
    save(open_run(tmp_path), [0])
    for path in tmp_path.glob("*.pth.tar"):
        path.unlink()
    open_run(tmp_path)
    assert contents(tmp_path) == ["args.yaml"]
    save(open_run(tmp_path), [0, 1])
    for path in tmp_path.glob("*.pth.tar"):
        path.unlink()
    open_run(tmp_path)
    assert contents(tmp_path) == ["args.yaml", "summary.csv.aside-1"]
    save(open_run(tmp_path, epochs=1), [0])
    for path in tmp_path.glob("*.pth.tar"):
        path.unlink()
    open_run(tmp_path, epochs=1)  # it may have ended, and that is all that was kept
    assert contents(tmp_path) == ["args.yaml", "summary.csv.aside-1", "summary.csv.aside-2"]


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


def test_what_a_killed_process_left_half_written_goes_and_nothing_else(tmp_path):
    half = [".last.pth.tar.lskd-0123abcd.new", ".tmp.pth.tar.lskd-0123abcd.new", "tmp.pth.tar"]
    others = [".notes.0123abcd.new", "last.pth.tar.new", ".last.pth.tar.lskd-0123.new"]
    for name in (*half, *others):
        (tmp_path / name).write_text("x")
    open_run(tmp_path)
    assert contents(tmp_path) == sorted([*others, "args.yaml"])


def test_a_link_in_a_checkpoints_place_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("notes")
    run = open_run(tmp_path / "run")
    for name in ("tmp.pth.tar", "last.pth.tar", "checkpoint-0.pth.tar", "summary.csv"):
        (tmp_path / "run" / name).symlink_to(victim)
    save(run, [0])
    assert victim.read_text() == "notes"
    assert not (tmp_path / "run" / "last.pth.tar").is_symlink()


@pytest.mark.parametrize("name", ["checkpoint-7.pth.tar", "model_best.pth.tar", "last.pth.tar"])
def test_a_folder_with_checkpoints_is_not_taken_over(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("x")
    for resume in ("", str(tmp_path / "other" / "last.pth.tar")):
        with pytest.raises(LskdError, match=f"contains a run already .{name}"):
            check_folder(folder, resume)
    check_folder(folder, str(folder / name))
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(LskdError, match="is a link"):
        check_folder(tmp_path / "link", str(folder / name))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    run = open_run(tmp_path)
    save(run, [0])
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(LskdError, match="the disk is full") as error:
            save(run, [1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before
    assert epoch_of(tmp_path / "last.pth.tar") == 0


def epoch_of(path):
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)["epoch"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """A byte of a tensor's, which torch reads without a word."""
    content = bytearray(path.read_bytes())
    content[content.index(load_teacher_weights(path)["weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    save(open_run(tmp_path), range(3))
    last = tmp_path / "last.pth.tar"
    assert resumed_checkpoint(str(last)) == (str(last), "")
    damage(last)  # and with it checkpoint-2, another name of the same file
    found, line = resumed_checkpoint(str(last))
    assert Path(found).name == "checkpoint-1.pth.tar"
    assert f"{last} is cut off or damaged; going on from {found}" in line
    run = open_run(tmp_path, start_epoch=epoch_of(found) + 1)
    assert epoch_of(last) == 1
    assert save(run, [2]) == (30.0, 1)
    for path in tmp_path.glob("*.tar"):
        cut(path)
    with pytest.raises(CheckpointError, match="no whole checkpoint lies beside it"):
        resumed_checkpoint(str(last))
