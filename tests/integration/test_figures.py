"""Every figure command on two teachers trained on real digits, with and without smoothing."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import forked
from lskd import load_teacher_weights
from lskd_study.cli import main as cli
from simulated import rows

pytestmark = pytest.mark.integration
FIGURES = ("projection", "class-probabilities", "minor-probabilities", "smoothing-loss")
FIGURES += ("teacher-student", "class-count")
SMOOTHING = ("0", "0.1")
TRAINING = (
    "--num-classes 4 --img-size 32 --batch-size 16 --workers 0 --device cpu --lr 0.05 --warmup-epochs 0"
)
AUGMENTATION = "--hflip 0 --scale 0.7 1 --color-jitter 0 --epochs 6 --seed 1 --smoothing-convention paper"


def run(*arguments: object, cwd: Path) -> str:
    words = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``digits`` and the teachers ``runs/0`` and ``runs/0.1``."""
    root = tmp_path_factory.mktemp("figures")
    (root / "digits").symlink_to(digits)
    for alpha in SMOOTHING:
        words = ["--model", "test_resnet", "--smoothing", alpha, "--output", "runs", "--experiment", alpha]
        words += ["digits", *TRAINING.split(), *AUGMENTATION.split()]
        done = forked.run("-m", "timm_ls_kd", "train.py", *words, imported=("torchvision", "timm"), cwd=root)
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def saved(work: Path) -> Path:
    """Outputs of the teachers, asked without any code of the figures: ``NAME-SPLIT.safetensors``."""
    from timm.data import create_dataset, create_transform, resolve_data_config

    for alpha in SMOOTHING:
        model = timm.create_model("test_resnet", num_classes=4)
        model.load_state_dict(load_teacher_weights(work / "runs" / alpha / "last.pth.tar"))
        model.eval()
        settings = resolve_data_config({"img_size": 32}, model=model)
        for split in ("train", "val"):
            dataset = create_dataset("", str(work / "digits"), split=split)
            dataset.transform = create_transform(**settings)
            images = torch.stack([image for image, _ in dataset])
            with torch.inference_mode():
                features = model.forward_head(model.forward_features(images), pre_logits=True)
                logits = model.get_classifier()(features)
            tensors = {
                "logits": logits.half(),
                "labels": torch.tensor([label for _, label in dataset]),
                "features": features,
                "weight": model.get_classifier().weight.detach(),
            }
            save_file(tensors, work / f"{alpha}-{split}.safetensors")
    return work


def figure(work: Path, *words: str) -> None:
    """Run ``lskd figure`` in this process."""
    with contextlib.chdir(work):
        assert cli.main(["figure", *words]) == 0


def arguments(option: str, ending: str) -> list[str]:
    return [word for alpha in SMOOTHING for word in (option, f"{alpha}{ending}")]


OUTPUTS = [*arguments("--outputs", "-val.safetensors"), *arguments("--name", "")]
MODELS = ["--model", "test_resnet"] * 2 + ["--data-dir", "digits", "--img-size", "32", "--device", "cpu"]
MODELS += [word for alpha in SMOOTHING for word in ("--checkpoint", f"runs/{alpha}/last.pth.tar")]
MODELS += ["--workers", "0", *arguments("--name", "")]


def test_every_figure_from_saved_outputs(saved: Path) -> None:
    train = arguments("--train-outputs", "-train.safetensors")
    out = run("lskd_study", "figure", "projection", *OUTPUTS, *train, cwd=saved)
    assert out.startswith("classes: ")
    figure(saved, "class-probabilities", *OUTPUTS)
    figure(saved, "minor-probabilities", *OUTPUTS, "--log")
    figure(saved, "smoothing-loss")
    figure(saved, "teacher-student", "--paper")
    figure(saved, "class-count", "--paper")
    for name in FIGURES:
        with Image.open(saved / f"figures/{name}.png") as image:
            image.verify()
        assert (saved / f"figures/{name}.svg").read_text().rstrip().endswith("</svg>")
        assert rows(saved / f"figures/{name}.csv")
    major = rows(saved / "figures/class-probabilities.csv")
    without, smoothed = (np.mean([float(r[f"probability_{a}"]) for r in major]) for a in SMOOTHING)
    assert without > smoothed > 0.5  # both have learned, and smoothing is less sure


def test_models_give_what_their_saved_outputs_give(saved: Path) -> None:
    classes = ["--classes", "digit1,digit3,digit0", "--replicates", "100"]
    figure(saved, "projection", *MODELS, *classes, "--output", "asked/projection")
    numbered = ["--classes", "1,3,0", "--replicates", "100"]
    train = arguments("--train-outputs", "-train.safetensors")
    figure(saved, "projection", *OUTPUTS, *train, *numbered, "--output", "read/p")
    asked, read = rows(saved / "asked/projection.csv"), rows(saved / "read/p.csv")
    assert len(asked) == len(read) == 2 * 3 * 36
    for first, second in zip(asked, read, strict=True):
        assert (first["teacher"], first["split"], first["class_id"]) == (
            second["teacher"], second["split"], second["class_id"]
        )  # fmt: skip
        assert float(first["x"]) == pytest.approx(float(second["x"]), abs=2e-3)
        assert float(first["y"]) == pytest.approx(float(second["y"]), abs=2e-3)
    for name in ("class-probabilities", "minor-probabilities"):
        figure(saved, name, *MODELS, "--output", f"asked/{name}")
        figure(saved, name, *OUTPUTS, "--output", f"read/{name}")
        asked, read = rows(saved / f"asked/{name}.csv"), rows(saved / f"read/{name}.csv")
        for first, second in zip(asked, read, strict=True):
            for alpha in SMOOTHING:
                column = f"probability_{alpha}"
                assert float(first[column]) == pytest.approx(float(second[column]), abs=2e-3)
