"""Every command that trains, stores or studies, killed at random moments: its end is that of an unbroken run.

`make faults` kills each kind 25 times and more, `make test` once. To see a failure again give it the
seed that was printed: `make faults PYTEST_ADDOPTS=--randomly-seed=SEED`.
"""

import json
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import timm
import torch
import yaml

from digit_teacher import teach
from faults.killing import Command, Moment, assert_same_content, assert_same_files, load
from image_folders import write_digits
from lskd import SoftLabels
from lskd_study.trainers.fairseq import Fairseq
from timm_runs import SCRIPT, needs_script

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TIMM = shlex.split(
    "--model test_resnet --num-classes 4 --img-size 32 --batch-size 16 --workers 0 --device cpu --lr 0.05 "
    "--warmup-epochs 0 --epochs 3 --checkpoint-hist 2 --kd-teacher test_resnet --kd-preflight-samples 0 "
    "--output . --experiment run --resume auto"
)
OF_TIMM, OF_FAIRSEQ = ("torchvision", "timm"), ("fairseq_cli.hydra_train",)
OF_MMCLS = ("mmcls.models", "mmcls.datasets", "timm", "plain_configs")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), per_class=24)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher as good as any to be asked: its weights are random."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), path)
    return path


def test_a_step_ends_within_a_write(killer, tmp_path):
    if killer.library is None:
        pytest.skip("no C compiler (cc): runs are killed after seconds alone, and none within a write")
    script = tmp_path / "writes.py"
    script.write_text("open('file', 'w').write('first')\nopen('file', 'a').write('second')")
    done = Command([script], OF_TIMM, "file").start(killer.library, tmp_path, Moment(step=2))
    assert (done.killed, done.steps, (tmp_path / "file").read_text()) == (True, "ww", "firstsec")


def test_timm(killer, tmp_path, digits, teacher):
    """Weights, their average, optimiser and curves; dropout, mixing and augmentation at random."""
    chance = "--drop 0.2 --mixup 0.4 --aa rand-m5 --opt adamw --model-ema --save-epochs 1"
    words = ["train.py", digits, *TIMM, *chance.split(), "--kd-teacher-checkpoint", teacher]
    command = Command(["-m", "timm_ls_kd", *words], OF_TIMM, "run/last.pth.tar")
    killer.kill("timm", tmp_path, command, assert_same_files)


def test_upstream(killer, tmp_path, digits, teacher):
    """timm's own script, which stores no state of its generators: its end follows from where it goes on.

    Killed once, it must end as the script does that was ended between two epochs: after one of them.
    """
    if not Path(SCRIPT).is_file():
        pytest.skip(needs_script.kwargs["reason"])
    words = ["-m", "timm_ls_kd", SCRIPT, digits, *TIMM, "--kd-teacher-checkpoint", teacher]
    command = Command(words, OF_TIMM, "run/last.pth.tar")
    ends = {}

    def last(folder):
        return load(folder / "run" / "last.pth.tar")

    def assert_same(whole, run):
        for epoch in (0, 1) if not ends else ():
            part = run.with_name(f"after{epoch}")
            (part / "run").mkdir(parents=True)
            checkpoint = part / "run" / "last.pth.tar"
            shutil.copyfile(whole / "run" / f"checkpoint-{epoch}.pth.tar", checkpoint)
            assert load(checkpoint)["epoch"] == epoch
            done = command.start(killer.library, part, Moment())
            assert done.status == 0, done.output
            ends[epoch] = last(part)
        ends["unbroken"] = last(whole)
        found = [name for name, end in ends.items() if is_same(end, last(run))]
        assert len(found) == 1
        rows = (run / "run" / "summary.csv").read_text()
        assert all(f"\n{epoch}," in rows for epoch in range(3))

    killer.kill("upstream", tmp_path, command, assert_same, in_a_row=1)


def is_same(one, other):
    try:
        assert_same_content(one, other, "")
    except AssertionError:
        return False
    return True


class Storing(Command):
    """A writer of soft labels, which goes on from rows that are committed."""

    def __init__(self, words, imported):
        super().__init__(words, imported, "labels/manifest.json")

    def has_begun(self, folder):
        return any(json.loads(path.read_text())["written"]["keys"] for path in folder.glob(self.checkpoint))


def test_soft_labels_of_timm(killer, tmp_path, digits, teacher):
    store = "--batch-size 2 --epochs 12 --kd-soft-labels labels --kd-soft-labels-top-k 3"
    words = ["soft-labels", digits, *TIMM, *store.split(), "--kd-teacher-checkpoint", teacher]
    command = Storing(["-m", "timm_ls_kd", *words], OF_TIMM)
    killer.kill("soft labels, timm", tmp_path, command, assert_same_store)


def assert_same_store(whole, run):
    """The same but for the error of storing, of which each writer measures its own rows."""
    whole, run = whole / "labels", run / "labels"
    assert_same_files(whole, run, unless=["manifest.json"])
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, run)]
    for manifest in manifests:
        assert manifest.pop("own_error") is not None
        del manifest["checksum"]
    assert manifests[0] == manifests[1]
    SoftLabels(run).verify()


# fairseq


@pytest.fixture(scope="module")
def numbers(killer, tmp_path_factory):
    """Number words as a data-bin, and a teacher of a few epochs."""
    folder = tmp_path_factory.mktemp("numbers")
    made = shlex.split("--train 200 --valid 20 --test 20 --bpe-tokens 50 --output text --data-bin bin")
    teaching = fairseq_words("teacher", folder / "bin", "optimization.max_epoch=6")
    for words in (["-m", "lskd_study", "data", "number-words", *made], teaching):
        done = Command(words, OF_FAIRSEQ, "out").start(killer.library, folder, Moment())
        assert done.status == 0, done.output
    return folder


def fairseq_words(role, data, *overrides):
    side = "{embed_dim: 32, ffn_embed_dim: 64, attention_heads: 2, layers: 1}"
    settings = {
        "common.user_dir": f"'{ROOT / 'plugins' / 'fairseq_kd'}'",
        "task.data": f"'{data}'",
        "task.eval_bleu_args": '\'{"beam": 1, "max_len_a": 1.2, "max_len_b": 10}\'',
        "checkpoint.save_dir": "out",
        "hydra.run.dir": "out",
        "hydra.job.chdir": "false",
        "checkpoint.save_interval_updates": 3,
        "checkpoint.keep_interval_updates": 1,
        "optimization.max_epoch": 4,
        "lr_scheduler.warmup_updates": 10,
        "model.encoder": side,
        "model.decoder": side,
    }
    words = ["--config-dir", ROOT / "recipes" / "number_words_de_en", "--config-name", role]
    given = {word.partition("=")[0] for word in overrides}
    own = [f"{name}={value}" for name, value in settings.items() if name not in given]
    return ["fairseq-hydra-train", *words, *own, *overrides]


def test_fairseq(killer, tmp_path, numbers):
    """Weights, optimiser and curves, from within an epoch too, but for what fairseq cannot promise.

    It logs an epoch's training after its checkpoint: killed in between, that epoch has no training columns.
    """
    teacher = f"criterion.kd_teacher='{numbers / 'out' / 'checkpoint_best.pt'}'"
    command = Command(
        fairseq_words("student", numbers / "bin", teacher), OF_FAIRSEQ, "out/checkpoint_last.pt"
    )
    killer.kill("fairseq", tmp_path, command, assert_same_fairseq)


def assert_same_fairseq(whole, run):
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        states = [load(folder / "out" / name) for folder in (whole, run)]
        for state in states:
            for clock in ("previous_training_time", "metrics"):
                del state["extra_state"][clock]
            del state["cfg"]["job_logging_cfg"]  # the folder's name
            state["optimizer_history"] = state["optimizer_history"][-1:]  # one for each start
            # Resumed, fairseq's scheduler is not told of the checkpoint's validation; this one does not ask.
            del state["optimizer_history"][0]["lr_scheduler_state"]["best"]
        assert_same_content(*states, name)
    curves = [Fairseq().read_curves(folder / "out", "student") for folder in (whole, run)]
    assert len(curves[0]) == len(curves[1]) == 4
    for row, other in zip(*curves, strict=True):
        trained = {name: value for name, value in other.items() if name[:6] == "train_"}
        lost = dict.fromkeys(trained, "") if not any(trained.values()) else {}  # killed between the two
        assert row | lost == other
    assert {path.name for path in (run / "out").iterdir()} == {
        path.name for path in (whole / "out").iterdir()
    }


def test_soft_labels_of_fairseq(killer, tmp_path, numbers):
    """In windows of 50 sentences, of which each is committed."""
    words = [
        "fairseq_kd.soft_labels",
        numbers / "bin",
        "--path",
        numbers / "out" / "checkpoint_best.pt",
        "--output",
        "labels",
        "--cpu",
    ]
    command = Storing([Path(__file__).with_name("small_windows.py"), *words], OF_FAIRSEQ)
    killer.kill("soft labels, fairseq", tmp_path, command, assert_same_store)


# mmcls


@pytest.fixture(scope="module")
def recipe(digits, tmp_path_factory):
    """The recipe for digits, made smaller, with loading processes, and a teacher of timm's for it."""
    folder = tmp_path_factory.mktemp("recipe")
    teach(digits, folder)
    (folder / "args.yaml").write_text("model: test_resnet\nin_chans: 1\nmean: [0.5]\nstd: [0.5]\n")
    of_data = f"data_root={str(digits)!r}, num_classes=4"
    (folder / "recipe.py").write_text(
        f"""
_base_ = {str(ROOT / "recipes" / "reactnet" / "digits_kd.py")!r}
num_classes = 4
data_preprocessor = dict(num_classes=4)
model = dict(
    backbone=dict(width=0.125),
    head=dict(num_classes=4, in_channels=64),
    teacher=dict(
        _delete_=True, model="test_resnet", checkpoint={str(folder / "last.pth.tar")!r}, smoothing=0.1
    ),
)
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=False,
    worker_init_fn=dict(type="seed_worker"),
    dataset=dict({of_data}),
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict({of_data}))
test_dataloader = dict(dataset=dict({of_data}))
val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="DistillationMetric")]
test_evaluator = [dict(type="Accuracy", topk=(1,))]
train_cfg = dict(max_epochs=3)
"""
    )
    return folder / "recipe.py"


def test_mmcls(killer, tmp_path, recipe):
    script = Path(find_spec("mmcls").origin).parent / ".mim" / "tools" / "train.py"
    command = Command([script, recipe, "--work-dir", "out", "--resume"], OF_MMCLS, "out/last_checkpoint")
    killer.kill("mmcls", tmp_path, command, assert_same_mmcls)


def assert_same_mmcls(whole, run):
    """Weights, optimiser and curves; not what names a folder or a time, and mmengine's own log."""
    folders = [folder / "out" for folder in (whole, run)]
    assert_same_files(*folders, unless=["*.pth", "*.log", "vis_data", "last_checkpoint", "recipe.py"])
    names = [sorted(path.name for path in folder.glob("*.pth")) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        states = [load(folder / name) for folder in folders]
        for state in states:
            for other in ("time", "experiment_name", "cfg"):
                state["meta"].pop(other)
            state["message_hub"] = None
        assert_same_content(*states, name)


def test_soft_labels_of_mmcls(killer, tmp_path, recipe):
    """In blocks that are committed every ten seconds, here with each batch."""
    words = [
        "mmcls_bnn.soft_labels",
        recipe,
        "--cpu",
        "--epochs",
        4,
        "--cfg-options",
        "model.distillation.soft_labels.path=labels",
    ]
    command = Storing([Path(__file__).with_name("small_windows.py"), *words], OF_MMCLS)
    killer.kill("soft labels, mmcls", tmp_path, command, assert_same_store)


# A study

TRAINER = {"in_chans": 1, "img_size": 32, "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "batch_size": 32}
TRAINER |= {"validation_batch_size": 48, "workers": 0, "opt": "sgd", "lr": 0.05, "sched": "step", "epochs": 3}
TRAINER |= {"warmup_epochs": 0, "scale": [0.9, 1.0], "hflip": 0.0, "color_jitter": 0.0, "checkpoint_hist": 1}
TRAINER["kd_preflight_samples"] = 0  # these networks are as good as any
STUDY = {
    "title": "Killed",
    "output": "out",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "teachers": [{"model": "test_byobnet", "config": "trainer.yaml"}],
    "students": [{"model": "test_resnet", "config": "trainer.yaml"}],
    "soft_labels": {"mode": "always"},
    "resources": {"threads": 1},
}


class Study(Command):
    """`lskd study`, of which one process is killed, or all."""

    def __init__(self, whom):
        words = ["-m", "lskd_study", "study", "study.yaml", "--cores", "2"]
        super().__init__(words, ("timm", "lskd_study.pages.study"), "out/teachers/*/last.pth.tar")
        self.whom = whom
        self.ends = {"all": "all", "job": "itself"}.get(whom, "nothing")

    def kill(self, process):
        """Kill; while something lives on, the same command is refused, or fails, in one line."""
        if self.whom == "all":
            return super().kill(process)
        try:
            top = psutil.Process(process)
            folder, family = top.cwd(), top.children(recursive=True)
            jobs = [one for one in family if "lskd_study.runs" in one.cmdline() and one.children() == []]
            scheduler = [one for one in top.children() if "snakemake" in one.cmdline()]
        except psutil.NoSuchProcess:  # ended meanwhile
            return False
        victims = {"top": [top], "scheduler": scheduler, "job": jobs}[self.whom]
        if not victims:
            return False
        victims[-1].kill()
        if self.whom != "job":
            top.wait()
            if psutil.wait_procs(family, 0)[1]:
                words = [sys.executable, *self.words]
                again = subprocess.run(words, cwd=folder, capture_output=True, text=True)
                assert "Traceback" not in again.stderr
                errors = [line for line in again.stderr.splitlines() if line.startswith("lskd: error: ")]
                assert bool(errors) == bool(again.returncode), again.stderr
            psutil.wait_procs(family)
        return True


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder, so that all are compared with one unbroken study."""
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("whom", ["top", "scheduler", "all", "job"])
def test_study(killer, studies, digits, whom):
    """Teachers, what they said, students, results and the page; in the short form in test_study_run.py."""
    if not killer.long:
        pytest.skip("a study is killed by make faults, and once by tests/integration/test_study_run.py")
    content = STUDY | {"data": {"path": str(digits), "num_classes": 4}}

    def begin(run):
        run.mkdir()
        (run / "study.yaml").write_text(yaml.safe_dump(content))
        (run / "trainer.yaml").write_text(yaml.safe_dump(TRAINER))

    killer.kill(f"study, {whom}", studies, Study(whom), assert_same_study, begin)


def assert_same_study(whole, run):
    """Whatever it came to; not when, how long, and how often something went on."""
    unless = [".snakemake", "*.log", "*.lock", "index.html", "plan.json", "begun.json", "job.json"]
    unless += ["args.yaml", "runs.csv", "costs.csv", "verdicts.json"]  # the first names what was resumed
    assert_same_files(whole, run, unless)
    verdicts = [json.loads((folder / "out" / "verdicts.json").read_text()) for folder in (whole, run)]
    for verdict in verdicts:
        for finding in verdict["findings"]:
            del finding["outlook"]  # in hours
    assert verdicts[0]["findings"] == verdicts[1]["findings"]
    for path in whole.glob("out/*/*/job.json"):
        job, other = (json.loads((folder / path.relative_to(whole)).read_text()) for folder in (whole, run))
        for name in ("settings", "data", "command"):
            assert job.get(name) == other.get(name)
        assert ("teacher" in job) == ("teacher" in other)
        if teacher := other.get("teacher"):  # as it now is: a checkpoint names what it was resumed from
            made = json.loads((run / "out" / "teachers" / teacher["run"] / "job.json").read_text())
            assert teacher["checkpoint_sha256"] == made["checkpoint"]["sha256"]
