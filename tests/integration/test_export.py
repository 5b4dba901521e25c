"""`lskd export` on runs that were trained: its folder is loaded by timm and by onnxruntime alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import forked
from image_folders import write_digits
from lskd.terms import centred
from lskd_study.cli import main as cli
from lskd_study.results.images import read_stored
from lskd_study.study.engine import make_plan

pytestmark = pytest.mark.integration
CLASSES = ["<b>bold `x`", 'a "quoted" | one', "ä — 魚"]  # in timm's order
TRAINER = {
    "in_chans": 1,
    "img_size": 32,
    "mean": [0.4],
    "std": [0.3],
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "batch_size": 24,
    "workers": 0,
    "epochs": 3,
    "lr": 0.02,
    "sched": "none",
    "warmup_epochs": 0,
    "hflip": 0.0,
    "color_jitter": 0.0,
}
WITHOUT = """
import torch

def export(*given, **options):
    raise RuntimeError("no\\nsuch operator")

torch.onnx.export = export
from lskd_study.cli.main import main
raise SystemExit(main(["export", "out"]))
"""
IMPORTED = ("timm", "lskd_study.pages.study")


def lskd(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return forked.run("-m", "lskd_study", *words, imported=IMPORTED, cwd=folder)


@pytest.fixture
def refused(own: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Give a command that fails and leaves nothing behind; return its one line."""

    def give(*words: object) -> str:
        before = sorted(own.rglob("*"))
        assert cli.main(["export", "--no-onnx", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sorted(own.rglob("*")) == before
        return line

    return give


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two teachers and a student of each, all trained, without a page; odd names of classes."""
    root = tmp_path_factory.mktemp("export")
    write_digits(root / "data", classes=len(CLASSES))
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            (root / "data" / split / f"digit{number}").rename(root / "data" / split / name)
    (root / "t.yaml").write_text(yaml.safe_dump(TRAINER))
    # However good its teacher is.
    (root / "s.yaml").write_text(yaml.safe_dump(TRAINER | {"kd_preflight_samples": 0}))
    study = {
        "title": "Tiny <i>study</i> | `one`",
        "data": {"path": "data", "num_classes": len(CLASSES)},
        "output": "out",
        "smoothing": {"values": [0, 0.1]},
        "seeds": [0],
        "teachers": [{"model": "test_byobnet", "config": "t.yaml"}],
        "students": [{"model": "test_resnet", "config": "s.yaml"}],
    }
    (root / "study.yaml").write_text(yaml.safe_dump(study, allow_unicode=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        plan = make_plan("study.yaml", None)
        plan.root.mkdir()
        plan.write()
    for run in plan.runs:
        words = ("-m", "lskd_study.runs", "out/plan.json", run.id)
        done = forked.run(*words, imported=IMPORTED, cwd=root)
        assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy to break, its data with it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    plan = copy / "out" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"cwd": str(copy)}))
    return copy


def student_of(folder: Path) -> Path:
    (found,) = (folder / "out" / "students").glob("*-smoothing0.1-*")
    return found


def test_the_folder_is_read_by_timm_and_by_onnxruntime(folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    done = lskd(folder, "export", student_of(folder), "--output", tmp_path / "best")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "best")
    assert "logits of 36 validation images" in done.stdout
    names = ["README.md", "config.json", "model.onnx", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == names
    # No stack trace, which has the paths of the machine.
    assert b".py" not in (tmp_path / "best" / "model.onnx").read_bytes()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "best").iterdir()}
    assert len(modes) == 1  # the user's umask, whatever wrote it
    assert json.loads((tmp_path / "best" / "config.json").read_text())["label_names"] == CLASSES

    model = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    said = read_stored(student_of(folder), len(CLASSES))
    stored = said.sorted(said.logits.float().numpy())
    images = torch.stack([transform(Image.open(folder / "data" / key).convert("L")) for key in said.keys])
    with torch.inference_mode():
        logits = model(images)
    session = onnxruntime.InferenceSession(tmp_path / "best" / "model.onnx")
    by_onnx = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    spread = np.ptp(stored)
    assert float((centred(logits) - torch.from_numpy(stored)).abs().max()) < 1e-2 * spread
    torch.testing.assert_close(by_onnx, logits, rtol=0, atol=1e-4 * float(spread))


def test_the_card_says_what_it_is_and_no_text_becomes_markup(folder, tmp_path):
    assert (
        lskd(folder, "export", student_of(folder), "--output", tmp_path / "best", "--no-onnx").returncode == 0
    )
    assert not (tmp_path / "best" / "model.onnx").exists()
    card = ModelCard.load(tmp_path / "best" / "README.md")
    job = json.loads((student_of(folder) / "job.json").read_text())
    (result,) = card.data.eval_results
    stored = read_stored(student_of(folder), len(CLASSES))
    right = (stored.logits.argmax(-1) == stored.labels).double().mean()
    assert result.metric_value == pytest.approx(float(right), abs=1e-6)
    assert (card.data.library_name, result.dataset_name) == ("timm", "data")
    for said in (job["checkpoint"]["sha256"], job["rerun_command"], "smoothing of the teacher: 0.1"):
        assert said in card.text
    assert "One seed" in card.text
    assert "no verdict" in card.text
    assert "Tiny &lt;i&gt;study&lt;/i&gt; \\| \\`one\\`" in card.text
    assert "<" not in card.text


def test_a_run_is_named_by_its_folder_teachers_too(own, refused):
    (teacher,) = (own / "out" / "teachers").glob("*-smoothing0.1-*")
    shutil.rmtree(own / "data")
    done = lskd(own, "export", teacher, "--no-onnx")
    assert done.returncode == 0, done.stderr
    assert "not tried on validation images" in done.stdout
    config = json.loads((own / "out" / "export" / teacher.name / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_byobnet", 3)
    assert "exists" in refused(teacher)


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(own, refused):
    student = student_of(own)
    assert "path" in refused(own / "data")
    assert "--seed" in refused(student, "--seed", "0")
    assert "no seed 7" in refused(own / "out", "--seed", "7")
    (own / "link").symlink_to("elsewhere")
    assert "link exists" in refused(student, "--output", own / "link")

    job = json.loads((student / "job.json").read_text())
    (student / "job.json").write_text(json.dumps(job | {"failed": "the loss is nan in epoch 1"}))
    assert "failed (the loss is nan" in refused(student)
    (student / "job.json").unlink()
    assert "not finished" in refused(student)
    (student / "job.json").write_text("{")
    assert "damaged" in refused(student)
    (student / "job.json").write_text(json.dumps(job))

    weights = student / "last.pth.tar"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "checksum" in refused(student)
    weights.unlink()
    assert "last.pth.tar" in refused(student)


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"model": "hf-hub:somebody/model"}, "cannot be created: "),
        ({"img_size": 100_000_000, "input_size": None}, "cannot be written as timm reads it"),
        ({"num_classes": 7}, "has 3 classes, this run has 7"),
    ],
)
def test_a_forged_run_asks_no_hub_and_fills_no_memory(own, refused, monkeypatch, forged, message):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asks the hub"))
    settings = student_of(own) / "args.yaml"
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | forged))
    (own / "out" / "export").mkdir()
    assert message in refused(student_of(own))


def test_an_older_record_will_do_and_a_data_set_of_elsewhere_is_not_opened(own, tmp_path):
    record = student_of(own) / "job.json"
    job = json.loads(record.read_text())
    del job["checkpoint"]["file"], job["rerun_command"]
    record.write_text(json.dumps(job))
    settings = student_of(own) / "args.yaml"
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | {"dataset": "hfds/mnist"}))
    assert cli.main(["export", "--no-onnx", str(student_of(own)), "--output", str(tmp_path / "best")]) == 0
    card = (tmp_path / "best" / "README.md").read_text()
    assert job["command"] in card


def test_an_image_that_cannot_be_read_is_one_line(own, refused):
    min((own / "data" / "val").rglob("*.png")).write_bytes(b"no image")
    (own / "out" / "export").mkdir()
    assert "cannot be read; repair or remove it" in refused(student_of(own))


def test_other_images_under_the_same_names_are_noticed(own, refused):
    for path in sorted((own / "data" / "val").rglob("*.png")):
        Image.eval(Image.open(path), lambda value: 255 - value).save(path)
    (own / "out" / "export").mkdir()
    assert "differ on its validation images" in refused(own / "out")


def test_an_onnx_that_cannot_be_is_one_line_and_status_1(own):
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=own, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("cannot be exported to ONNX (no such operator); add --no-onnx to export it without")
    assert not list((own / "out" / "export").iterdir())
