"""The command `timm` in processes of its own: alone, distributed, killed, and around timm's own script."""

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models import save_for_hf

from timm_runs import ENVIRONMENT, SCRIPT, command, needs_script, run, summary, weights

pytestmark = pytest.mark.integration

COMMON = shlex.split(
    "--model test_resnet --num-classes 4 --img-size 32 --batch-size 16 --workers 0 --device cpu --lr 0.05 "
    "--warmup-epochs 0 --hflip 0 --scale 0.7 1 --color-jitter 0"
)
UPSTREAM = [*COMMON, "--workers", "1"]  # timm 1.0.27's create_loader cannot do without workers


@pytest.fixture(autouse=True)
def script_of_its_own(monkeypatch):
    """Upstream's script, where a test imports it, and the log that it sets up end with the test."""
    monkeypatch.delitem(sys.modules, "train", raising=False)
    monkeypatch.setattr(logging.getLogger(), "level", logging.getLogger().level)


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher")
    where = ["--output", output, "--experiment", "t"]
    result = run("train.py", digits, *COMMON, "--epochs", 6, *where, fresh=True)
    assert result.stderr == ""
    return output / "t" / "last.pth.tar"


@pytest.fixture
def kd(teacher):
    return ["--kd-teacher", "test_resnet", "--kd-teacher-checkpoint", teacher]


@pytest.fixture
def student(digits, kd, tmp_path):
    """Run upstream's script into tmp_path/NAME, with a teacher unless said otherwise."""

    def train(name, *arguments, taught=True, **options):
        where = ["--output", tmp_path, "--experiment", name]
        return run(SCRIPT, digits, *UPSTREAM, *(kd if taught else ()), *where, *arguments, **options)

    return train


def settings_of(folder, *names):
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    return [settings[name] for name in names]


def test_bad_input_in_a_process_of_its_own(digits, tmp_path, kd, teacher):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(teacher.read_bytes()[:5000])
    arguments = [*kd[:3], broken, "--output", tmp_path / "out"]
    result = run("train.py", digits, *COMMON, *arguments, fresh=True, status=2)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("timm: error: ")
    assert "broken.pth" in line
    assert not (tmp_path / "out").exists()


def test_two_processes_equal_one(digits, tmp_path, kd):
    """Same images, same order, same augmentation; a model without batch statistics."""
    options = ["train.py", digits, *COMMON, *kd, "--model", "test_vit", "--output", tmp_path, "--epochs", 2]
    options += shlex.split("--kd-hard-weight 0.3 --smoothing 0.1 --mixup-off-epoch 1")
    options += shlex.split("--model-ema --model-ema-decay 0.5")
    run(*options, "--batch-size", 32, "--experiment", "one")
    two = run(*options, "--batch-size", 16, "--experiment", "two", processes=2)
    first, second = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert len(first) == len(second) == 2
    for row, other in zip(first, second, strict=True):
        assert row == pytest.approx(other, rel=2e-4, abs=2e-4)
    found = weights(tmp_path / "two")
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
    assert two.stdout.count("epoch 1 done") == 1  # the primary process alone reports


def test_errors_of_two_processes(digits, tmp_path, kd):
    arguments = [*kd, "--kd-hard-weight", 2, "--output", tmp_path / "out"]
    result = run("train.py", digits, *COMMON, *arguments, processes=2, status=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("timm: error: ")]
    assert 1 <= len(lines) <= 2  # torchrun may end the second process before it speaks
    assert all("--kd-hard-weight" in line for line in lines)
    assert len(lines) < 2 or any(line.startswith("timm: error: [rank 1] ") for line in lines)
    assert not (tmp_path / "out").exists()


def start_and_signal(options, last, number):
    """Send a signal to the run and its loading processes, as a terminal does, once there is a checkpoint."""
    process = subprocess.Popen(
        command(*options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | ENVIRONMENT,
    )
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_does_so_quietly(digits, tmp_path, number):
    last = tmp_path / "run" / "last.pth.tar"
    options = ["train.py", digits, *COMMON, "--epochs", 300, "--workers", 2]
    options += ["--output", tmp_path, "--experiment", "run", "--checkpoint-hist", 1]
    status, out, err = start_and_signal(options, last, number)
    assert (status, err) == (128 + number, "")
    assert f"go on by --resume {last}" in out
    assert weights(tmp_path / "run")


@needs_script
def test_upstream_with_a_fast_teacher(student, tmp_path, teacher):
    before = teacher.read_bytes()
    out = student("fast", "--epochs", 1, "--kd-teacher-fast", "float32").stdout
    assert "teacher 'test_resnet', fast: float32, 15 of 15 batch norms folded, channels-last" in out
    assert "KL(exact || fast)" in out
    assert settings_of(tmp_path / "fast", "kd_teacher_fast") == ["float32"]
    assert teacher.read_bytes() == before
    tight = ["--kd-teacher-fast", "bfloat16", "--kd-teacher-fast-bound", "1e-30"]
    result = student("refused", *tight, status=2)
    assert "too far from the exact one" in result.stderr.splitlines()[-1]
    store = ["--epochs", 1, "--kd-soft-labels", tmp_path / "store"]
    out = student("writes", *store, "--kd-teacher-fast", "float32").stdout
    assert "teacher 'test_resnet', fast: float32" in out
    out = student("reads", *store, "--kd-teacher-fast", "auto").stdout
    assert "of a fast teacher (float32): KL(exact || fast)" in out
    assert "the teacher is not asked" in out
    result = student("exact", *store, status=2)
    assert "this run asks for the exact teacher" in result.stderr.splitlines()[-1]


@needs_script
def test_upstream_distils_by_default_as_the_paper_does(student, tmp_path, teacher):
    before = teacher.read_bytes()
    result = student("student", "--epochs", 2)
    assert "hard term: weight 0, the labels are not trained on" in result.stdout
    assert "teacher 'test_resnet': right on" in result.stdout
    rows = summary(tmp_path / "student")
    columns = ["train_ce", "train_kl", "train_teacher_entropy", "train_hard_ce", "train_agreement"]
    assert list(rows[0])[:7] == ["epoch", "train_loss", *columns]
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["train_ce"], rel=1e-5)
        assert row["train_ce"] == pytest.approx(row["train_kl"] + row["train_teacher_entropy"], rel=1e-5)
    found = settings_of(tmp_path / "student", "kd_teacher", "kd_temperature", "smoothing")
    assert found == ["test_resnet", 1.0, 0.0]
    assert teacher.read_bytes() == before

    student("plain", "--epochs", 2, taught=False)
    assert settings_of(tmp_path / "plain", "kd_temperature", "smoothing") == [4.0, 0.1]  # upstream's own
    assert list(weights(tmp_path / "plain")) == list(weights(tmp_path / "student"))


def plainly(digits, folder, *arguments):
    """Run upstream's script as it is, without the plugin."""
    words = [SCRIPT, digits, *UPSTREAM, "--output", folder.parent, "--experiment", folder.name, *arguments]
    words = [sys.executable, *map(str, words)]
    subprocess.run(words, check=True, capture_output=True, env=os.environ | ENVIRONMENT)


def whole_checkpoint(folder):
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(folder / "last.pth.tar", weights_only=True)
    return {name: found[name] for name in ("epoch", "state_dict", "state_dict_ema", "optimizer", "metric")}


@needs_script
def test_upstream_plain_is_the_script_itself_bit_for_bit(digits, student, tmp_path):
    options = shlex.split(
        "--epochs 2 --model-ema --mixup 0.2 --drop 0.1 --hflip 0.5 --reprob 0.2 --sched-on-updates"
    )
    plainly(digits, tmp_path / "itself", *options)
    student("launched", *options, taught=False)
    itself, launched = tmp_path / "itself", tmp_path / "launched"
    torch.testing.assert_close(whole_checkpoint(launched), whole_checkpoint(itself), rtol=0, atol=0)
    assert (launched / "summary.csv").read_bytes() == (itself / "summary.csv").read_bytes()
    theirs, ours = (yaml.safe_load((each / "args.yaml").read_text()) for each in (itself, launched))
    assert ours | theirs | {"experiment": ""} == ours | {"experiment": ""}
    # The bundled trainer reads its args.yaml.
    where = ["--output", tmp_path, "--experiment", "bundled", "--epochs", 1]
    result = run("train.py", "--config", itself / "args.yaml", *where)
    assert result.stderr == ""


OPTIONS = {
    "accumulated": "--grad-accum-steps 4 --clip-grad 1",
    "EMA": "--model-ema",
    "mixup_and_cutmix": "--mixup 0.2 --cutmix 1",
    "bfloat16": "--amp --amp-dtype bfloat16 --channels-last",
    "compiled": "--torchcompile eager",
}
ALL = " ".join(OPTIONS.values()) + " --mean 0.4 --std 0.3 --kd-temperature 2 --kd-temperature-squared"


@needs_script
@pytest.mark.parametrize("name", [*OPTIONS, "all_of_these"])
def test_upstream_distils(student, tmp_path, name):
    hard = shlex.split("--epochs 2 --kd-hard-weight 0.3 --smoothing 0.1 --smoothing-convention paper")
    out = student("run", *hard, *OPTIONS.get(name, ALL).split()).stdout
    assert "weight 0.3, target 0.9000 on the label and 0.0333 on each other class" in out
    if name == "all_of_these":
        assert "weight 0.7 x T^2, teacher's labels at T = 2" in out
        assert "each other class before mixing" in out
        assert "converted" in out
    rows = summary(tmp_path / "run")
    assert [row["train_ce"] for row in rows] == [
        pytest.approx(row["train_kl"] + row["train_teacher_entropy"], rel=1e-4) for row in rows
    ]
    assert settings_of(tmp_path / "run", "smoothing", "smoothing_convention") == [0.1, "paper"]


@needs_script
def test_upstream_distils_sigmoids(student, tmp_path, monkeypatch):
    """Lists of labels come from data sets that need packages of their own; a folder's label is made one."""
    if "'--task'" not in Path(SCRIPT).read_text():
        pytest.skip("a script without --task")
    (tmp_path / "sitecustomize.py").write_text(
        "from timm.data.target_transforms import MultiLabelTarget as T\n"
        "encode = T.__call__\n"
        "T.__call__ = lambda self, label: encode(self, [label, (label + 1) % self.num_classes])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    lists = ["--task", "multilabel", "--dataset", "folder/lists", "--epochs", 2]
    out = student("run", *lists, "--kd-hard-weight", 0.5, "--smoothing", 0.2, fresh=True).stdout
    assert "0.9000 on the label and 0.1000 on each other class; of the sigmoid of each class" in out
    row = summary(tmp_path / "run")[-1]
    assert 0 < row["eval_map"] <= 100
    assert row["train_loss"] == pytest.approx(0.5 * row["train_ce"] + 0.5 * row["train_hard_ce"], rel=1e-3)


@needs_script
@pytest.mark.parametrize("kind", ["logit", "feature", "token"])
def test_upstream_own_distillation_is_its_own(student, tmp_path, kind):
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_resnet", num_classes=4), tmp_path / "hub")
    teacher = f"local-dir:{tmp_path / 'hub'}"
    student("ours", "--epochs", 1, "--kd-teacher", teacher, "--kd-preflight-samples", 0, taught=False)
    assert "train_kl" in (tmp_path / "ours" / "summary.csv").read_text()
    own = ["--epochs", 1, "--kd-model-name", teacher, "--kd-distill-type", kind]
    if kind == "token":
        own += ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", "img_size=32", "depth=1"]
    student("theirs", *own, taught=False)
    assert settings_of(tmp_path / "theirs", "kd_temperature") == [4.0]
    assert "train_kl" not in (tmp_path / "theirs" / "summary.csv").read_text()


@needs_script
def test_upstream_in_two_processes_on_the_cpu(student, tmp_path):
    result = student("run", "--epochs", 1, processes=2)
    assert summary(tmp_path / "run")[0]["train_ce"] > 0
    assert result.stdout.count("teacher 'test_resnet': right on") == 1


@pytest.fixture
def refused_upstream(tmp_path, capsys, monkeypatch):
    """Run upstream's script in this process, and return the one line of its error."""
    from timm_ls_kd import cli

    def check(*arguments):
        # The script puts a handler on the root logger, for the stderr of this test.
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        argv = [SCRIPT, *UPSTREAM, "--output", tmp_path / "out", *arguments]
        assert cli.main([str(word) for word in argv]) == 2
        # Newer scripts warn of --bce-loss before.
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "deprecated" not in line]
        assert line.startswith("timm: error: ")
        assert not (tmp_path / "out").exists()
        return line

    return check


@needs_script
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--kd-temperature 0", ["--kd-temperature"]),
        ("--kd-model-name resnet18", ["--kd-model-name", "--kd-teacher"]),
        ("--task-loss-weight 0.5", ["--kd-hard-weight"]),
        ("--bce-loss", ["--bce-loss"]),
        ("--smooting 0.2", ["--smooting"]),
        ("--num-classes 5", ["4 classes"]),
        ("--kd-teacher-checkpoint nosuch.pth", ["nosuch.pth"]),
        ("--model resnet5O", ["resnet5O"]),
        ("--output /proc/nothing", ["/proc/nothing"]),
        ("--resume nosuch.pth", ["--resume nosuch.pth", "no such file"]),
        ("--initial-checkpoint nosuch.pth", ["--initial-checkpoint nosuch.pth", "no such file"]),
    ],
)
def test_upstream_bad_input(digits, kd, refused_upstream, arguments, words):
    line = refused_upstream(digits, *kd, *arguments.split())
    assert all(word in line for word in words), line


@needs_script
def test_upstream_bad_input_without_a_teacher(tmp_path, refused_upstream):
    assert "nosuch does not exist" in refused_upstream(tmp_path / "nosuch")
    assert "no data folder" in refused_upstream()


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@needs_script
@pytest.mark.parametrize("flag", ["--resume", "--initial-checkpoint"])
def test_upstream_refuses_checkpoints_that_run_code(digits, tmp_path, refused_upstream, flag):
    malicious = tmp_path / "malicious.pth"
    torch.save({"state_dict": RunsCode(tmp_path / "owned")}, malicious)
    line = refused_upstream(digits, flag, malicious)
    assert flag in line
    assert "malicious.pth" in line
    assert not (tmp_path / "owned").exists()


@needs_script
def test_upstream_config_with_null_and_wrong_types(digits, tmp_path, kd, student, refused_upstream):
    config = tmp_path / "c.yaml"
    for text, word in {
        "kd_preflight_samples: some": "kd_preflight_samples",
        "kd_temperature: [1]": "kd_temperature must be one value",
        "kd_temperature_squared: 3": "kd_temperature_squared must be true or false",
        "smoothing_convention: mine": "--smoothing-convention: invalid choice: 'mine'",
    }.items():
        config.write_text(text)
        assert word in refused_upstream(digits, *kd, "--config", config)
    config.write_text(
        "smoothing: null\nsmoothing_convention: null\nkd_temperature: null\nkd_hard_weight: null\n"
        "kd_preflight_samples: 48.0\nkd_teacher_kwargs: null\nkd_temperature_squared: null\n"
    )
    student("run", "--config", config, "--epochs", 1)
    expected = {"smoothing": 0.0, "smoothing_convention": "uniform", "kd_temperature": 1.0}
    expected |= {"kd_hard_weight": 0.0, "kd_preflight_samples": 48, "kd_teacher_kwargs": {}}
    assert settings_of(tmp_path / "run", *expected) == list(expected.values())


@needs_script
def test_every_upstream_argument_is_known(monkeypatch):
    from timm_ls_kd.run_settings import UPSTREAM_ONLY
    from timm_ls_kd.trainer.arguments import create_parser
    from timm_ls_kd.upstream import MODULE_NAME, load_script

    # The script puts a module of its name in place, and is to leave none behind.
    monkeypatch.setitem(sys.modules, MODULE_NAME, sys)
    theirs = {action.dest for action in load_script(Path(SCRIPT)).parser._actions}
    ours = {action.dest for action in create_parser()._actions}
    assert theirs - ours - UPSTREAM_ONLY.keys() == set()
