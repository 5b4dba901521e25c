"""A script with the parts of timm's train.py that the plugin uses, as newer releases may arrange them."""

import argparse
import logging
import resource
import shutil
import sys
from pathlib import Path

import pytest
import timm

from timm_ls_kd.arguments import add_kd_arguments
from timm_ls_kd.run_settings import UPSTREAM_ONLY
from timm_ls_kd.trainer.arguments import create_parser
from timm_ls_kd.upstream import _check_checkpoints, keep_abbreviations

pytestmark = pytest.mark.integration

SCRIPT = """
import argparse, os, torch
from timm import utils
from timm.data import (
    FastCollateMixup, Mixup, MultiLabelTarget, create_dataset, create_loader, resolve_data_config)
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import (
    ClassificationTask, LogitDistillationTask, MultiLabelClassificationTask, resume_task_checkpoint)

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("--config", default="")
parser = argparse.ArgumentParser(parents=[config_parser])
for name in ("data", "data-dir", "num-classes", "cutmix-minmax"):
    parser.add_argument("--" + name, default=None, type=int if name == "num-classes" else str)
for name, default in dict(
    dataset="", train_split="train", val_split="val", class_map="", model="", device="cpu", resume="",
    initial_checkpoint="", output="", experiment="", amp_dtype="float16", task="single", loss="", loop="",
    criterion="",
    smoothing=0.1, mixup=0.0, cutmix=0.0, reprob=0.0, lr=0.05, epochs=1, batch_size=16, workers=0, rank=0,
    seed=42, world_size=1, aug_splits=0, img_size=32, tta=0,
).items():
    parser.add_argument("--" + name.replace("_", "-"), default=default, type=type(default))
parser.add_argument("--kd-distill-type", default="logit")
parser.add_argument("--kd-loss-type", default="kl")
for name in ("amp", "channels-last", "no-aug", "no-prefetcher", "log-wandb"):
    parser.add_argument("--" + name, action="store_true")


class OtherTask(ClassificationTask):
    pass


def _parse_args():
    return parser.parse_args(), ""


def main():
    args, _ = _parse_args()
    device = torch.device(args.device)
    model = create_model(args.model, pretrained=False, num_classes=args.num_classes)
    data = resolve_data_config(vars(args), model=model)
    loaders = []
    for split in (args.train_split, args.val_split):
        training = split == args.train_split
        dataset = create_dataset("", root=args.data_dir, split=split, is_training=training)
        if args.task == "multilabel":  # of its class and the next, as a reader of lists gives them
            encode = MultiLabelTarget(args.num_classes)
            dataset.target_transform = lambda label: encode([label, (label + 1) % args.num_classes])
        loaders.append(create_loader(
            dataset, input_size=data["input_size"], mean=data["mean"], std=data["std"], is_training=training,
            batch_size=args.batch_size, use_prefetcher=False, num_workers=0, persistent_workers=False,
            device=device))
    kinds = {"multilabel": MultiLabelClassificationTask, "single": ClassificationTask}
    kind = kinds.get(args.task, OtherTask)
    options = dict(loss_type=args.criterion or args.loss or None, smoothing=args.smoothing)
    task = kind(model, criterion_kwargs=options, device=device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr)
    start = 0
    if args.resume:
        start = resume_task_checkpoint(task, args.resume, log_info=False)
        print("resumed from", args.resume, start)
    folder = os.path.join(args.output, args.experiment)
    os.makedirs(folder, exist_ok=True)
    saver = utils.CheckpointSaver(model, optimizer, args, checkpoint_dir=folder, task=task)
    for epoch in range(start, args.epochs):
        train_one_epoch(epoch, model, loaders[0], optimizer, args, task=task)
        print("validated", validate(model, loaders[1], args, task.create_evaluator()))
        saver.save_checkpoint(epoch, 1.0)


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    total = 0.0
    for images, targets in loader:
        if args.loop == "own":
            loss = model(images).square().mean()
        else:
            loss = task(images, targets)["loss"]
        loss /= 1  # in place, as timm's own script divides it by --grad-accum-steps
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return {"loss": total / len(loader)}


def validate(model, loader, args, evaluator):
    model.eval()
    with torch.inference_mode():
        for images, targets in loader:
            evaluator.update(model(images), targets)
    return evaluator.compute()
"""


MULTILABEL = ["--task", "multilabel", "--dataset", "wds/digits"]


@pytest.fixture
def script(timm_command, digits, tmp_path, kd, monkeypatch):
    # timm's script puts a handler on the root logger; it is not to be left to other tests.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.delitem(sys.modules, "train", raising=False)  # the script of the test before
    (tmp_path / "train.py").write_text(SCRIPT)
    common = ["--data-dir", digits, "--model", "test_resnet", "--num-classes", 4, "--output", tmp_path]

    def run(*arguments, teacher=True):
        words = [*common, *(kd if teacher else ()), "--experiment", "run", *arguments]
        return timm_command(tmp_path / "train.py", *words)

    return run


def test_the_stand_in_distils(script):
    result = script()
    assert result.status == 0, result.err
    assert "labels are not trained on" in result.out
    assert "'top1'" in result.out


def test_sigmoids_are_distilled_where_classes_do_not_exclude_one_another(script):
    result = script(*MULTILABEL, "--kd-hard-weight", 0.5, "--smoothing", 0.2, "--kd-temperature", 2)
    assert result.status == 0, result.err
    assert "0.5, teacher's labels at T = 2" in result.out
    assert "0.9000 on the label and 0.1000 on each other class; of the sigmoid of each class" in result.out
    assert "teacher 'test_resnet': right on" in result.out
    assert "'map'" in result.out


def test_resume_auto_starts_and_goes_on(script, tmp_path):
    assert script("--resume", "auto").status == 0
    for epochs in (1, 2):  # the first is done: a kill came after its checkpoint
        result = script("--resume", "auto", "--epochs", epochs)
        assert result.status == 0, result.err
        assert f"resumed from {tmp_path / 'run' / 'last.pth.tar'} 1" in result.out
        assert ("validated" in result.out) == (epochs == 2)
    script("--resume", "auto", "--experiment", "").assert_one_clear_line("--experiment NAME")


def test_abbreviated_flags_of_the_scripts_own_mean_what_they_meant():
    """Every prefix of every argument of timm's train.py, with our arguments and without."""
    bundled = {action.dest for action in create_parser()._actions if not action.dest.startswith("kd_")}
    names = (bundled - {"help", "smoothing_convention"}) | UPSTREAM_ONLY.keys() | {"kd_temperature"}
    before, after = argparse.ArgumentParser(), argparse.ArgumentParser()
    for parser in (before, after):
        for name in sorted(names):
            parser.add_argument("--" + name.replace("_", "-"))
    add_kd_arguments(after)
    keep_abbreviations(after, {action.dest for action in before._actions})

    def meant(parser, word):
        found = parser._parse_optional(word)
        found = found if isinstance(found, list) else [found]  # Python 3.12 lists them
        return [each[0] and each[0].dest for each in found]

    checked = 0
    for option in before._option_string_actions:
        for end in range(3, len(option) + 1):
            word = option[:end]
            try:
                expected = meant(before, word)
            except (SystemExit, argparse.ArgumentError):
                continue  # ambiguous as it is
            if word != "--kd-teacher":  # in full, it is ours
                assert meant(after, word) == expected, word
                checked += 1
    assert checked > 1000
    assert meant(after, "--kd-har") == ["kd_hard_weight"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--task", "other"], "nothing is distilled"),
        ([*MULTILABEL, "--loss", "asl"], "--loss asl changes the loss of the hard labels"),
        (
            [*MULTILABEL, "--kd-teacher-fast", "float32"],
            "--task multilabel distils the exact teacher's sigmoids",
        ),
        (["--loss", "poly"], "--loss poly changes"),
        (["--loss", "bce"], "--loss bce changes"),
        (["--criterion", "poly"], "PolyCrossEntropy"),
        (["--kd-loss-type", "plackett_luce"], "--kd-loss-type is timm's own"),
    ],
)
def test_a_teacher_that_would_be_left_out_is_refused_before_anything_is_written(
    script, tmp_path, arguments, word
):
    script(*arguments).assert_one_clear_line(word, "--kd-teacher")
    assert not (tmp_path / "run").exists()


def test_a_folder_has_one_label_for_each_image(script, tmp_path):
    script("--task", "multilabel", teacher=False).assert_one_clear_line("lists of labels", "one label")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--loop", "own"], ["--epochs", 0]])
def test_a_run_without_a_step_of_the_teachers_loss_is_an_error(script, arguments):
    result = script(*arguments)
    result.assert_one_clear_line("nothing is distilled")
    assert "validated" not in result.out


def test_a_temperature_without_a_teacher_is_refused(script, tmp_path):
    script("--kd-temperature", 2, teacher=False).assert_one_clear_line("--kd-temperature needs --kd-teacher")
    script("--kd-distill-type", "token", teacher=False).assert_one_clear_line("--kd-model-name MODEL")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    script("--log-wandb").assert_one_clear_line("wandb")
    assert not (tmp_path / "run").exists()


def test_a_timm_that_is_too_old_is_named_before_its_script(script, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.26")
    (tmp_path / "train.py").write_text("")  # of which nothing newer belongs to that timm
    script().assert_one_clear_line("timm 1.0.26 is too old", "1.0.27 or later", "pip install -U timm")


def test_other_losses_without_a_teacher_are_the_scripts_own_affair(script):
    assert script("--loss", "poly", teacher=False).status == 0


@pytest.mark.parametrize("distils", [True, False])
def test_a_run_that_diverged(script, distils):
    result = script("--lr", "1e38", "--batch-size", 96, teacher=distils)
    result.assert_one_clear_line("epoch 0: ", "the run diverged", status=3)
    assert "validated" not in result.out


def test_a_folder_with_checkpoints_is_not_taken_over(script, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-3.pth.tar").write_text("x")
    script().assert_one_clear_line("contains a run already", "--resume")


def test_a_full_disk_is_one_line(script, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        script(teacher=False).assert_one_clear_line("run/tmp.pth.tar", "the disk is full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_damaged_checkpoint_gives_way_to_a_whole_one(teacher_run, tmp_path, capsys):
    last = Path(shutil.copytree(teacher_run, tmp_path / "run")) / "last.pth.tar"
    last.write_bytes(last.read_bytes()[:100_000])
    args = argparse.Namespace(resume=str(last), initial_checkpoint="")
    _check_checkpoints(args)
    assert Path(args.resume).name == "checkpoint-9.pth.tar"
    assert "cut off or damaged; going on from" in capsys.readouterr().out
