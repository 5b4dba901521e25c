"""A small study and its data, as a user has them before the first command."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lskd_study.cli import main as cli
from lskd_study.plan.plan import Plan
from lskd_study.study import engine

STUDY = {
    "title": "T",
    "data": {"path": "data", "num_classes": 2},
    "output": "out",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "teachers": [{"model": "test_resnet", "config": "t.yaml"}],
    "students": [{"model": "test_byobnet", "config": "s.yaml"}],
}


@dataclass(frozen=True)
class Scene:
    """A study file, its trainer's files and two classes of images, in the working directory."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def set_up(self) -> None:
        """Write all of it."""
        for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
            (self.folder / "data" / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(self.folder / "data" / name / "1.png")
        for name in ("t.yaml", "s.yaml"):
            (self.folder / name).write_text("epochs: 1\nbatch_size: 2\n")
        self.write()

    def write(self, **changes: object) -> None:
        """Write the study file with other keys; None leaves a key out."""
        content = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
        (self.folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def plan(self, **changes: object) -> Plan:
        """Write the study file and return its plan."""
        self.write(**changes)
        return engine.make_plan("study.yaml", None)

    def listing(self) -> list[Path]:
        """Return all that is in the folder."""
        return sorted(self.folder.rglob("*"))

    def run(self, *words: str) -> str:
        """Run a command that succeeds; return what it prints."""
        self.capsys.readouterr()
        assert cli.main([*words]) == 0
        return self.capsys.readouterr().out

    def refused(self, *words: str) -> str:
        """Insist on one line, status 2 and an untouched folder; return the line."""
        self.capsys.readouterr()
        before = self.listing()
        assert cli.main([*words]) == 2
        out, err = self.capsys.readouterr()
        assert out == ""
        assert err.startswith("lskd: error: ")
        assert err.count("\n") == 1
        assert self.listing() == before
        return err
