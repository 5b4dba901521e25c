"""`mim train`, `mim test` and mmcls' own train.py in processes of their own, on tiny real data."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mmcls
import pytest
import timm
import torch

import forked
from digit_teacher import teach
from events import scalars
from lskd.base.files import read_csv
from mmcls_bnn.binary import bits

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TRAIN = Path(mmcls.__file__).parent / ".mim" / "tools" / "train.py"
MIM = Path(sys.executable).with_name("mim")


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    """What timm's trainers leave of a model that has learnt the images."""
    checkpoint = teach(digits, tmp_path_factory.mktemp("teacher"))
    settings = "model: test_resnet\nin_chans: 1\nmean: [0.5]\nstd: [0.5]\n"
    checkpoint.with_name("args.yaml").write_text(settings)
    return checkpoint


@pytest.fixture(scope="module")
def write(digits, teacher):
    """Write the recipe for digits, made smaller, and pointed at the files of this test."""

    def make(path, extra=""):
        path.write_text(
            f"""
_base_ = {str(ROOT / "recipes" / "reactnet" / "digits_kd.py")!r}
num_classes = 4
data_preprocessor = dict(num_classes=4)
model = dict(
    backbone=dict(width=0.125),
    head=dict(num_classes=4, in_channels=64),
    teacher=dict(_delete_=True, model="test_resnet", checkpoint={str(teacher)!r}, smoothing=0.1),
)
train_dataloader = dict(batch_size=32, dataset=dict(data_root={str(digits)!r}, num_classes=4))
val_dataloader = dict(dataset=dict(data_root={str(digits)!r}, num_classes=4))
test_dataloader = dict(dataset=dict(data_root={str(digits)!r}, num_classes=4))
val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="DistillationMetric")]
test_evaluator = [dict(type="Accuracy", topk=(1,))]
train_cfg = dict(max_epochs=3)
{extra}
"""
        )
        return path

    return make


@pytest.fixture
def recipe(write, tmp_path):
    return lambda name="recipe.py", extra="": write(tmp_path / name, extra)


@pytest.fixture(scope="module")
def trained(write, teacher, tmp_path_factory):
    """What `mim train` leaves: the recipe, the folder, and all that it printed."""
    folder, before = tmp_path_factory.mktemp("trained"), teacher.read_bytes()
    path = write(folder / "recipe.py")
    tracker = ("--cfg-options", "visualizer.vis_backends.0.type=TensorboardVisBackend")
    result = run(MIM, "train", "mmcls", path, "--work-dir", folder / "run", *tracker, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert teacher.read_bytes() == before
    return path, folder / "run", result.stdout + result.stderr


def run(*words, cwd=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def call(*words):
    """Run a script or `-m` and a module in a process that finds mmcls, not the plugin, imported."""
    return forked.run(*words, imported=("mmcls.models", "mmcls.datasets", "timm", "plain_configs"))


def train(recipe, folder, *words):
    return call(TRAIN, recipe, "--work-dir", folder, *words)


def curves(folder):
    return read_csv(folder / "epochs.csv")


def assert_close(*checkpoints, **bounds):
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in checkpoints]
    torch.testing.assert_close(*weights, **bounds)


def test_mim_train_and_mim_test(trained, teacher, tmp_path):
    path, folder, log = trained
    assert "teacher 'test_resnet': right on" in log
    assert "normalisation the student's; trained with smoothing 0.1 (paper): the entropy of an ideal" in log
    assert "is 0.435 nats" in log  # -0.9 ln 0.9 - 0.1 ln (0.1 / 3)
    for name in ("loss_ce", "loss_kl", "teacher_entropy", "agreement", "flip ratio", "distillation/kl"):
        assert name in log
    rows = curves(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        for split in ("train", "val"):
            total = float(row[f"{split}_kl"]) + float(row[f"{split}_teacher_entropy"])
            assert float(row[f"{split}_ce"]) == pytest.approx(total, rel=1e-5)
        assert 0 < float(row["flip_ratio"]) < 0.5
    assert float(rows[-1]["train_ce"]) < float(rows[0]["train_ce"])

    checkpoint = torch.load(folder / "epoch_3.pth", weights_only=True)
    assert all(name.split(".")[0] in ("backbone", "head") for name in checkpoint["state_dict"])
    # Testing needs no teacher: it is moved away.
    moved = teacher.rename(teacher.with_name("away"))
    try:
        words = ("test", "mmcls", path, "--checkpoint", folder / "epoch_3.pth", "--work-dir", tmp_path / "t")
        result = run(MIM, *words, cwd=tmp_path)
    finally:
        moved.rename(teacher)
    assert result.returncode == 0, result.stderr
    tested = re.search(r"accuracy/top1: ([\d.]+)", result.stdout + result.stderr)
    assert float(tested[1]) == pytest.approx(float(rows[-1]["val_top1"]), abs=1e-3)


def test_tensorboard_has_what_mmengine_logs(trained):
    _, folder, _ = trained
    (logs,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    # The times are of iterations and of epochs, under one name.
    found, rows = scalars(logs, but=("time", "data_time")), curves(folder)
    expected = {int(row["epoch"]): float(row["val_top1"]) for row in rows}
    assert found["accuracy/top1"] == pytest.approx(expected)
    assert found["distillation/kl"] == pytest.approx(
        {int(row["epoch"]): float(row["val_kl"]) for row in rows}
    )
    assert {"loss_ce", "loss_kl", "teacher_entropy", "agreement"} <= found.keys()


@pytest.mark.skipif(
    (ROOT / "data" / "imagenet").exists(), reason="ImageNet is here; this is about its absence"
)
@pytest.mark.parametrize("background", [False, True])
def test_the_papers_recipe_without_imagenet(tmp_path, background):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    before = signal.getsignal(signal.SIGINT)
    if background:  # as a shell starts what ends in &
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run(MIM, "train", "mmcls", "recipes/reactnet_kd.py", cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.returncode != 0
    printed = result.stdout + result.stderr
    assert "Traceback" not in printed, printed
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith(
        "mmcls_bnn: error: data folder data/imagenet/train does not exist; put ImageNet-1K"
    )
    assert "mim train mmcls recipes/reactnet/digits_teacher.py" in line


def test_two_processes_equal_one(recipe, tmp_path):
    """The same 32 images a step, without batch statistics, which each process takes over its own share.

    A real-valued student under plain SGD, where rounding (2^-24 of a sum's parts) stays rounding: in a binary
    one it flips signs, and Adam makes whole steps of gradients that are nearly 0.
    """
    extra = (
        "train_pipeline = [\n"
        "    dict(type='LoadImageFromFile', color_type='grayscale'),\n"
        "    dict(type='Resize', scale=16),\n"
        "    dict(type='PackClsInputs'),\n"
        "]\n"
        "train_dataloader['dataset'].update(pipeline=train_pipeline)\n"
        "model['backbone'].update(norm_eval=True, binarize=())\n"
        "optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.01))\n"
        "train_cfg.update(max_epochs=2)\n"
    )
    one, two = recipe("one.py", extra), recipe("two.py", extra + "train_dataloader.update(batch_size=16)\n")
    result = train(one, tmp_path / "one")
    assert result.returncode == 0, result.stderr
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = (TRAIN, two, "--work-dir", tmp_path / "two", "--launcher", "pytorch")
    result = run(sys.executable, *launcher, *words)
    assert result.returncode == 0, result.stderr
    for row, other in zip(curves(tmp_path / "one"), curves(tmp_path / "two"), strict=True):
        assert {k: float(v) for k, v in row.items() if v} == pytest.approx(
            {k: float(v) for k, v in other.items() if v}, rel=1e-4
        )
    assert_close(tmp_path / "one" / "epoch_2.pth", tmp_path / "two" / "epoch_2.pth", rtol=1e-4, atol=1e-5)


def test_two_processes_store_what_one_reads(recipe, tmp_path):
    """The reading student has another seed, batch size and workers; 20 is no divisor of the 96 images."""
    store, stored = tmp_path / "labels", "model['distillation'] = dict(soft_labels=dict(top_k=3, path={!r}))"
    path = recipe("stored.py", stored.format(str(store)))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = ("--work-dir", tmp_path / "two", "--launcher", "pytorch", "--cfg-options")
    result = run(sys.executable, *launcher, TRAIN, path, *words, "train_dataloader.batch_size=10")
    assert result.returncode == 0, result.stderr
    said = call("-m", "lskd_study", "soft-labels", "verify", store)
    assert "all as they were written; complete: 96 samples, 3 epochs" in said.stdout, said.stderr
    loading = (
        "train_dataloader.num_workers=2",
        "train_dataloader.persistent_workers=True",
        "randomness.seed=3",
    )
    result = train(path, tmp_path / "one", "--cfg-options", *loading)
    assert result.returncode == 0, result.stderr
    writing = recipe("ahead.py", stored.format(str(tmp_path / "ahead")))
    ahead = call("-m", "mmcls_bnn.soft_labels", writing, "--epochs", 1)
    assert "1 epoch(s) of 96 images are stored" in ahead.stdout, ahead.stderr
    log = result.stdout + result.stderr
    assert "the teacher is not asked: all that it says is stored" in log
    assert "teacher 'test_resnet' of timm" not in log  # it was not even built
    assert [row["epoch"] for row in curves(tmp_path / "one")] == ["1", "2", "3"]
    verified = "model.distillation.soft_labels.verify=50"
    result = train(path, tmp_path / "verified", "--cfg-options", verified, "train_cfg.max_epochs=1")
    assert "soft labels: 50 images verified" in result.stdout + result.stderr, result.stderr
    result = train(path, tmp_path / "other", "--cfg-options", "model.distillation.soft_labels.seed=1")
    assert result.returncode == 2
    assert "augmentation.seed is 42 there and 1 here" in result.stderr.splitlines()[-1]


def test_step_1_then_step_2(recipe, tmp_path):
    first = recipe("step1.py", "model['backbone'].update(binarize=('activations',))")
    result = train(first, tmp_path / "step1")
    assert result.returncode == 0, result.stderr
    start = tmp_path / "step1" / "epoch_3.pth"
    second = recipe("step2.py", f"model.update(step1_checkpoint={str(start)!r})")
    result = train(second, tmp_path / "step2")
    assert result.returncode == 0, result.stderr
    end = tmp_path / "step2" / "epoch_3.pth"
    again = recipe("again.py", f"model.update(step1_checkpoint={str(end)!r})")
    result = train(again, tmp_path / "again")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith(
        "so it is not step 1; give one that a step-1 recipe (binarize=('activations',)) has written."
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("model.teacher.checkpoint=nosuch.pth", "checkpoint nosuch.pth does not exist"),
        ("", "teacher 'test_resnet' is at chance: right on "),
        ("train_dataloader.dataset.data_root=nowhere", "data folder nowhere/train does not exist"),
        ("model.backbone.width=0.3", "width 0.3 gives"),
    ],
)
def test_bad_input_is_one_line_before_the_first_iteration(recipe, tmp_path, option, words):
    chance = tmp_path / "chance.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict(), chance)
    path = recipe(extra="" if option else f"model['teacher'].update(checkpoint={str(chance)!r})")
    result = train(path, tmp_path / "run", *(["--cfg-options", option] if option else []))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert line.startswith("mmcls_bnn: error: ")
    assert words in line
    assert "Epoch(train)" not in result.stdout + result.stderr
    assert not list((tmp_path / "run").rglob("*.pth"))


def test_a_diverged_run_ends_with_status_3(recipe, tmp_path):
    path = recipe(extra="optim_wrapper = dict(_delete_=True, optimizer=dict(type='SGD', lr=1e38))")
    result = train(path, tmp_path / "run", "--auto-scale-lr")
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("mmcls_bnn: error: epoch 1: the ")
    assert not list((tmp_path / "run").glob("*.pth"))


LOADED = """
import sys
from mmcls_bnn.binary.packed import load_packed
import torch
print(load_packed(sys.argv[1])(torch.zeros(1, 1, 16, 16), mode="tensor").shape)
"""


def test_a_trained_student_is_packed_and_loaded(trained, tmp_path):
    """Each in a process of its own, to which nobody has said what a ReActNet is."""
    output, loaded = tmp_path / "student.safetensors", tmp_path / "loaded.py"
    loaded.write_text(LOADED)
    result = call("-m", "mmcls_bnn.export", trained[1] / "epoch_3.pth", output)
    assert (result.returncode, result.stderr) == (0, "")
    assert "logits equal to the bit" in result.stdout
    result = call(loaded, output)
    assert result.stdout == "torch.Size([1, 4])\n", result.stderr
    result = call("-m", "mmcls_bnn.profile", output, "--size", 16, "--rounds", 3)
    assert result.stdout.splitlines()[-1].startswith("whole network"), result.stderr
    result = call("-m", "mmcls_bnn.complexity", trained[0], "--size", 16)
    assert "OPs (BOPs / 64 + FLOPs)" in result.stdout, result.stderr


@pytest.mark.slow
def test_from_distilling_to_a_fast_file_in_the_five_documented_commands(tmp_path):
    """As docs/mmcls.md has them, in fewer epochs, and each eighth image for the student."""
    text = (ROOT / "docs" / "mmcls.md").read_text().partition("From distilling to a fast file")[2]
    commands = [shlex.split(line) for line in text.partition("```sh\n")[2].partition("```")[0].splitlines()]
    assert len(commands) == 5
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for name, epochs in (("_base_/small_teacher", 10), ("digits_kd", 20)):
        recipe = tmp_path / "recipes" / "reactnet" / f"{name}.py"
        assert f"max_epochs={epochs}" in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(f"max_epochs={epochs}", "max_epochs=3"))
    kd = tmp_path / "recipes" / "reactnet" / "digits_kd.py"
    kd.write_text(kd.read_text().replace("/epoch_10.pth", "/epoch_3.pth"))
    for program, *words in commands:
        words = [word.replace("/epoch_20.pth", "/epoch_3.pth") for word in words]
        done = run(Path(sys.executable).with_name(program), *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        if words[-1].endswith("teacher.py"):  # who must know something
            images = sorted(tmp_path.glob("data/digits/*/*/*"))
            for image in {*images} - {*images[::8]}:
                image.unlink()
    build = bits.build() or "torch"
    assert done.stdout.splitlines()[0] == f"1 x 16 x 16, 1 thread(s), {build}"
    assert done.stdout.splitlines()[-1].startswith("whole network")
    assert (tmp_path / "student.safetensors").is_file()
