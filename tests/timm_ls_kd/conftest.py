"""A tiny image folder of real digits, a teacher trained on it, and the command line in this process."""

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import timm_runs
from image_folders import write_digits
from lskd import SoftLabels, SoftLabelsWriter

# Small, quick, and the same for all: 96 training and 48 validation images of 32 x 32.
COMMON = shlex.split(
    "train.py --model test_resnet --num-classes 4 --img-size 32 --batch-size 16 --workers 0 --device cpu "
    "--lr 0.05 --warmup-epochs 0 --hflip 0 --scale 0.7 1 --color-jitter 0"
)


@dataclass
class Result:
    """What a command did."""

    status: int
    out: str
    err: str

    def assert_one_clear_line(self, *words: str, status: int = 2) -> None:
        """One line on stderr that contains these words, a non-zero status, no traceback."""
        lines = self.err.strip().splitlines()
        assert self.status == status, f"status {self.status}\n{self.out}\n{self.err}"
        assert len(lines) == 1, self.err
        assert lines[0].startswith("timm: error: "), lines[0]
        assert "Traceback" not in self.err + self.out
        for word in words:
            assert word in lines[0], f"{word!r} is not in: {lines[0]}"


Timm = Callable[..., Result]
Weights = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def timm_command(capsys: pytest.CaptureFixture[str]) -> Timm:
    """Run the console script in this process."""
    from timm_ls_kd import cli

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def train(timm_command: Timm, digits: Path, tmp_path: Path) -> Timm:
    """Run the bundled trainer on the digits into tmp_path/runs/NAME."""

    def run(name: str, *arguments: object, data: Path | None = None) -> Result:
        where = ["--data-dir", data or digits, "--output", tmp_path / "runs", "--experiment", name]
        return timm_command(*COMMON, *where, *arguments)

    return run


@pytest.fixture
def ahead(timm_command: Timm, digits: Path, kd: list[str], store: Path, request: Any) -> Timm:
    """Store what the teacher says to the students of a test file, ahead of their training."""

    def run(*arguments: object) -> Result:
        options = [*COMMON[1:], "--data-dir", digits, *kd, *request.module.STUDENT]
        return timm_command("soft-labels", *options, "--kd-soft-labels", store, *arguments)

    return run


@pytest.fixture
def student(train: Timm, kd: list[str], store: Path, request: Any) -> Timm:
    """Train a student with the store, with the flags of its test file; it must end as is said."""

    def run(name: str, *arguments: object, status: int = 0, where: Path = store, **options: Any) -> Result:
        flags = [*kd, *request.module.STUDENT, "--kd-soft-labels", where, *arguments]
        result = train(name, *flags, **options)
        assert result.status == status, result.err
        return result

    return run


@pytest.fixture
def make_loader(digits: Path) -> Callable[..., Any]:
    """Make the loader that the bundled trainer would with these flags, of images of 24 x 24 on the CPU."""
    from timm.data import create_dataset

    from lskd.teachers.frozen import Normalisation
    from timm_ls_kd.data import DataConfig
    from timm_ls_kd.loader import eval_loader, train_loader
    from timm_ls_kd.store import replayed_images
    from timm_ls_kd.trainer.arguments import parse_arguments

    def make(
        *flags: object,
        data: Path = digits,
        mean: tuple[float, ...] = (0.5,) * 3,
        std: tuple[float, ...] = (0.5,) * 3,
        training: bool = True,
        stored: Any = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Any:
        args = parse_arguments([str(word) for word in ("--batch-size", 8, "--workers", 0, *flags)])
        args.num_classes, args.rank, args.world_size = 4, rank, world_size
        dataset = create_dataset("", root=str(data), split="train")
        config = DataConfig((3, 24, 24), Normalisation(mean, std), "bilinear", 0.875, "center")
        if not training:
            return eval_loader(dataset, config, args, torch.device("cpu"), rank, world_size)
        images = stored and replayed_images(dataset, stored, not args.no_prefetcher)
        return train_loader(dataset, config, args, torch.device("cpu"), args.smoothing, images)

    return make


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def rewritten(store: Path) -> Callable[..., Path]:
    """Write a store again as another one, with other rows or another identity."""

    def write(source: Path, change: Any = lambda *_: None, rows: int = 0, **identity: Any) -> Path:
        labels = SoftLabels(source)
        named = {name: value for name, value in (labels.identity | identity).items() if value is not None}
        found = labels.take(np.arange(rows or len(labels)))
        values, ids, seeds = (array.copy() for array in (found.values, found.ids, found.seeds))
        change(values, ids, seeds)
        with SoftLabelsWriter(store, labels.layout, named) as writer:
            writer.append(values, ids, seeds=seeds)
        return store

    return write


@pytest.fixture
def same_weights(runs: Path, weights: Weights) -> Callable[..., bool]:
    """Whether two runs ended with the same weights, bit for bit."""

    def compare(first: str, second: str, file: str = "last.pth.tar") -> bool:
        other = weights(runs / second, file)
        return all(torch.equal(value, other[key]) for key, value in weights(runs / first, file).items())

    return compare


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def own_digits(digits: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(digits, tmp_path / "data"))


@pytest.fixture(scope="session")
def teacher_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plain run that is clearly better than chance."""
    from timm_ls_kd import cli

    output = tmp_path_factory.mktemp("teacher")
    where = [str(digits), "--output", str(output), "--experiment", "run"]
    assert cli.main([*COMMON, *where, "--epochs", "10", "--seed", "1"]) == 0
    return output / "run"


@pytest.fixture(scope="session")
def teacher(teacher_run: Path) -> Path:
    return teacher_run / "last.pth.tar"


@pytest.fixture
def taught_by() -> Callable[..., list[str]]:
    """The flags of a teacher's student."""

    def flags(checkpoint: Path, model: str = "test_resnet") -> list[str]:
        return ["--kd-teacher", model, "--kd-teacher-checkpoint", str(checkpoint)]

    return flags


@pytest.fixture
def kd(taught_by: Callable[..., list[str]], teacher: Path) -> list[str]:
    return taught_by(teacher)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never ask the network, and know at once that there is none."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def summary() -> Callable[[Path], list[dict[str, float]]]:
    return timm_runs.summary


@pytest.fixture
def weights() -> Weights:
    return timm_runs.weights
