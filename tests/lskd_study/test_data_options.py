"""`data.prepare` and `data.options` of a study: the commands of `lskd data`, by their own signatures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.main import get_command

from lskd import LskdError
from lskd_study.cli import main as cli
from lskd_study.data import commands as command
from lskd_study.data.options import TEXT, arguments_of, known_classes, problem, valid_options
from lskd_study.plan.plan import Plan
from lskd_study.plan.schema import Prepare
from lskd_study.study.checks import check_preparation
from lskd_study.study.engine import make_plan

pytestmark = pytest.mark.unit

STUDY = {
    "title": "T",
    "output": "out",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "teachers": [{"model": "test_resnet", "config": "t.yaml"}],
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text("epochs: 1\n")

    def write(prepare: str, num_classes: int = 10, path: str = "data/made", **options: object) -> Plan:
        data = {"path": path, "num_classes": num_classes, "prepare": prepare, "options": options}
        Path("study.yaml").write_text(yaml.safe_dump({"data": data, **STUDY}, sort_keys=False))
        return make_plan("study.yaml", None)

    return write


def test_every_command_of_lskd_data_can_stand_in_a_study():
    assert set(get_args(Prepare)) == set(get_command(command.app).commands)
    for prepare in get_args(Prepare):
        assert not {"output", "data-bin", "help"} & set(valid_options(prepare))
        parameters = {parameter.name for parameter in get_command(command.app).commands[prepare].params}
        assert (prepare in TEXT) == ("data_bin" in parameters)


@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        ("noise", {"source": "d", "rate": 0.3, "seed": 4}, ["d", "--rate", "0.3", "--seed", "4"]),
        ("long-tail", {"head": 20, "source": "d", "copy": True}, ["--head", "20", "d", "--copy"]),
        ("subset", {"source": "d", "classes": 3, "copy": False}, ["d", "--classes", "3"]),
        ("fashion-mnist", {}, []),
        ("cub200", {"source": "d", "no-checksum": True}, ["d", "--no-checksum"]),
        ("imagenet-lt", {"source": "d", "evaluate-on": "test"}, ["d", "--evaluate-on", "test"]),
        ("ding", {"sentences-only": False}, ["--no-sentences-only"]),
    ],
)
def test_options_become_the_commands_words(prepare, options, words):
    assert arguments_of(prepare, options) == [prepare, *words]
    assert problem(prepare, options) is None
    get_command(command.app).commands[prepare].make_context(prepare, [*words, "--output", "x"])


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        ("noise", {"source": "d", "rte": 1}, r":7: data.options.rte: unknown option.*did you mean 'rate'\?"),
        ("noise", {"source": "d", "zzz": 0.3}, "valid here: copy, rate, seed, source"),
        ("digits", {"classes": 3}, "classes: unknown option of `lskd data digits`; valid here: none"),
        ("noise", {"source": "d", "rate": "much"}, "lskd data noise: Invalid value for '--rate'"),
        ("noise", {}, "(?i)lskd data noise: Missing argument 'SOURCE'"),
        ("long-tail", {"source": "d"}, "lskd data long-tail: Missing option '--head'"),
        ("noise", {"source": "d", "output": "x"}, "data.options.output: the study sets the folders itself"),
        ("ding", {}, "data.prepare: it makes no data for timm, which takes cub200, digits, "),
    ],
)
def test_options_are_checked_by_the_signature_before_anything_runs(make, prepare, options, message):
    with pytest.raises(LskdError, match=message) as caught:
        make(prepare, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "options", "classes"),
    [
        ("digits", {}, 10),
        ("cub200", {"source": "d"}, 200),
        ("cub200", {"source": "d", "expect": "train=6,val=3,classes=3"}, 3),
        ("imagenet-subset", {"source": "d"}, 100),
        ("subset", {"source": "d", "classes": 7}, 7),
        ("subset", {"source": "d", "list": "f.txt"}, None),
        ("noise", {"source": "d"}, None),
    ],
)
def test_class_counts_that_a_command_decides(make, prepare, options, classes):
    assert known_classes(prepare, options) == classes
    if classes is not None:
        with pytest.raises(
            LskdError, match=rf"study.yaml:3: data.num_classes: `lskd data {prepare}` makes {classes}"
        ):
            make(prepare, num_classes=classes + 1, **options)
    assert make(prepare, num_classes=classes or 5, **options).num_classes == classes or 5


def folder_of(path: Path, classes: int, images: int = 3) -> None:
    for split in ("train", "val"):
        for label in range(classes):
            (path / split / str(label)).mkdir(parents=True)
            for image in range(images):
                (path / split / str(label) / f"{image}.png").write_bytes(b"x")


def test_the_source_is_looked_at_first(make, tmp_path):
    plan = make("noise", num_classes=3, source="data/own")
    with pytest.raises(LskdError, match="data/own, which `lskd data noise` is to read, is not there"):
        check_preparation(plan)
    folder_of(tmp_path / "data" / "own", 4)
    with pytest.raises(LskdError, match="data/own has 4 classes but num_classes is 3"):
        check_preparation(plan)
    check_preparation(make("noise", num_classes=4, source="data/own"))


def test_data_made_otherwise_are_not_taken(make, tmp_path, capsys):
    folder_of(tmp_path / "own", 4)
    for option, value, another in (("rate", 0.2, 0.25), ("seed", 2, 3)):
        plan = make("noise", num_classes=4, source="own", **{option: value})
        assert cli.main(plan.prepare_arguments) == 0
        check_preparation(plan)
        other = make("noise", num_classes=4, source="own", **{option: another})
        with pytest.raises(LskdError, match=rf"data/made was made with {option} \S+, the study asks for"):
            check_preparation(other)
        with pytest.raises(LskdError, match="data/made contains noise, the study asks for long-tail"):
            check_preparation(make("long-tail", num_classes=4, source="own", head=1))
        shutil.rmtree(tmp_path / "data")
    subset = make("subset", num_classes=2, source="own", classes=2)
    assert cli.main(subset.prepare_arguments) == 0
    check_preparation(subset)
    with pytest.raises(LskdError, match="made with classes 2, the study asks for 3"):
        check_preparation(make("subset", num_classes=3, source="own", classes=3))
    (tmp_path / "data" / "made" / "manifest.json").unlink()
    with pytest.raises(LskdError, match="was not made by `lskd data subset`, it has no manifest"):
        check_preparation(subset)


def test_the_plan_makes_the_data_in_a_real_process(make, tmp_path):
    folder_of(tmp_path / "own", 2)
    plan = make("long-tail", num_classes=2, source="own", head=1, tail=1)
    plan.write()
    plan = Plan.read(plan.root / "plan.json")
    command = [sys.executable, "-m", "lskd_study", *plan.prepare_arguments]
    done = subprocess.run(command, cwd=plan.cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((plan.data_dir / "manifest.json").read_text())
    assert (manifest["name"], manifest["head"]) == ("long-tail", 1)
