"""The ``lskd`` command: what bad input gets, before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lskd.base.install import how_to_install
from lskd_study.cli import doctor
from lskd_study.cli import main as cli
from lskd_study.plan.recipes import recipes_folder

pytestmark = pytest.mark.unit

STUDY = {
    "title": "T",
    "data": {"path": "data", "num_classes": 2},
    "output": "out",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0],
    "teachers": [{"model": "test_resnet", "config": "t.yaml"}],
    "students": [{"model": "test_vit", "config": "t.yaml"}],
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a study that is in order, and its data."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "1.png")
    (tmp_path / "t.yaml").write_text("epochs: 1\nbatch_size: 2\n")
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: object) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(capsys, here: Path, *words: str) -> str:
    """Run ``lskd study`` and insist on one line, exit status 2 and an untouched folder."""
    before = listing(here)
    assert cli.main(["study", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lskd: error: ")
    assert err.count("\n") == 1
    assert listing(here) == before
    return err


def test_a_study_in_order_is_planned_without_a_trace(here, capsys):
    before = listing(here)
    assert cli.main(["study", "study.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 runs: 0 finished, 4 to do" in out
    assert "to do     student-test_vit-of-test_resnet-smoothing0.1-T1-hard0-seed0" in out
    assert listing(here) == before


def test_missing_study_file_lists_the_recipes(here, capsys):
    assert "recipes/digits/study.yaml" in refused(capsys, here, "none.yaml")


def test_the_study_file_comes_first(here, capsys):
    assert "comes before the options for Snakemake" in refused(
        capsys, here, "--executor", "local", "study.yaml"
    )


def test_errors_of_the_study_file_come_through(here, capsys):
    write(here, sedes=[1])
    assert "unknown key 'sedes'; did you mean 'seeds'?" in refused(capsys, here, "study.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": [{"model": "test_resnett", "config": "t.yaml"}]}, "did you mean test_resnet"),
        (
            {"students": [{"model": "resnet18.nope", "config": "t.yaml"}]},
            "unknown model 'resnet18.nope'; timm has",
        ),
        (
            {"teachers": [{"model": "test_resnet", "config": "u.yaml"}]},
            "cannot read the trainer's file u.yaml",
        ),
        (
            {"students": [{"model": "torchvision:resnet18", "config": "t.yaml"}]},
            "unknown model 'torchvision:resnet18'",
        ),
        ({"students": STUDY["students"] * 2}, "the same run is asked for twice"),
        ({"data": {"path": "nowhere", "num_classes": 2}}, "data folder nowhere does not exist"),
        (
            {"data": {"path": "x/digits", "num_classes": 10}},
            "make it with `lskd data digits --output x/digits`",
        ),
        (
            {"data": {"path": "data", "num_classes": 11, "prepare": "digits"}},
            "`lskd data digits` makes 10 classes; fix one",
        ),
        ({"data": {"path": "data", "num_classes": 3}}, "data/train has 2 class folders but num_classes is 3"),
    ],
)
def test_what_the_study_file_names_is_checked(here, capsys, changes, message):
    write(here, **changes)
    assert message in refused(capsys, here, "study.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epcohs: 3", "t.yaml: unknown key 'epcohs'; did you mean 'epochs'?"),
        ("img-size: 32", "t.yaml: unknown key 'img-size'; did you mean 'img_size'?"),
        ("zzzzz: 1", "t.yaml: unknown key 'zzzzz'; timm train.py --help lists them"),
        ("epochs: many", "t.yaml: epochs must be a whole number, got 'many'"),
        ("sched: zigzag", "t.yaml: argument --sched: invalid choice: 'zigzag'"),
        ("batch_size: 0", "t.yaml: batch_size must be at least 1, got 0"),
        ("bce_loss: true", "t.yaml, as a student's file: --bce-loss has no meaning with --kd-teacher"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_the_trainers_files_are_checked_by_the_trainers_parser(here, capsys, line, message, more):
    (here / "t.yaml").write_text(f"epochs: 1\n{line}\n" if "epochs" not in line else f"{line}\n")
    assert message in refused(capsys, here, "study.yaml", *more)


def test_the_data_folder_is_checked(here, capsys):
    (here / "data" / "val" / "dog" / "1.png").rename(here / "data" / "val" / "dog" / "1.txt")
    assert "data/val/dog has no images" in refused(capsys, here, "study.yaml")
    (here / "data" / "val" / "dog" / "1.txt").rename(here / "data" / "val" / "dog" / "1.png")
    (here / "data" / "val" / "dog").rename(here / "data" / "val" / "cow")
    assert "different classes, e.g. cow" in refused(capsys, here, "study.yaml")
    (here / "data" / "val").rename(here / "data" / "other")
    assert "data has no val folder" in refused(capsys, here, "study.yaml")


def test_an_output_that_cannot_be_written(here, capsys):
    (here / "taken").write_text("")
    assert "cannot write the folder taken/x" in refused(capsys, here, "study.yaml", "--output", "taken/x")


def test_a_place_for_the_data_that_cannot_be_written(here, capsys):
    (here / "taken").write_text("")
    write(here, data={"path": "taken/digits", "num_classes": 10, "prepare": "digits"}, output=".")
    assert "cannot write the folder taken" in refused(capsys, here, "study.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coers", "2"], "unrecognized arguments: --coers"),
        (["--cores", "none"], "--cores"),
        (["--cores", "0"], "--cores"),
        (["--retries", "many"], "invalid int value: 'many'"),
        (["--directory", "elsewhere"], "--directory is set by lskd study itself"),
        (["--executor", "slrum"], "slrum"),
    ],
)
def test_options_are_checked_before_anything_runs(here, capsys, words, message):
    assert message in refused(capsys, here, "study.yaml", *words)


def test_a_misspelt_command_or_option_is_one_line(capsys):
    for words in (["studdy"], ["data", "digts"], ["doctor", "--jsn"], ["study"]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("lskd: error: ")
        assert err.count("\n") == 1


def test_data_digits_says_what_it_did(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for state in ("written", "already there"):
        assert cli.main(["data", "digits"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"data/digits: 1201 training and 596 validation images, {state}"
        assert lines[1].startswith("10 classes; images in a class: train 116 to 122, median ")
    assert cli.main(["data", "digits", "--output", "data/digits/manifest.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_packaged_recipe_is_found_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", "recipes/digits/study.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "18 runs: 0 finished, 18 to do" in out
    assert list(tmp_path.iterdir()) == []
    header = (recipes_folder() / "digits" / "study.yaml").read_text().split("\ntitle:")[0]
    assert "lskd study recipes/digits/study.yaml --cores 2" in header


def test_help_and_a_clear_line_with_the_base_dependencies_only(tmp_path):
    """The extra's modules are hidden from a fresh interpreter, as if they had never been installed.

    Not all of them: torch needs jinja2, and torchmetrics goes by the metadata of scipy and matplotlib.
    """
    script = (
        "import sys\n"
        # An import of None fails, and find_spec says that there is no such module.
        "sys.modules.update(dict.fromkeys(['sklearn', 'snakemake', 'timm']))\n"
        "from lskd_study.cli.main import main\n"
        "for words in ([], ['--help'], ['study', '--help'], ['data', 'digits', '--help']):\n"
        "    main(words)\n"
        "slow = ('torch', 'numpy', 'pandas', 'scipy')\n"
        "assert not set(slow) & set(sys.modules), 'printing help takes long'\n"
        "assert main(['data', 'digits']) == 2\n"
        "assert main(['study', 'recipes/digits/study.yaml']) == 2\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == 4
    for line in done.stderr.splitlines():
        assert line.startswith("lskd: error: this needs ")
        assert line.endswith(how_to_install("study"))
    assert done.stderr.count("\n") == 2
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_and_exits_by_what_is_broken(capsys, monkeypatch):
    assert cli.main(["doctor", "--json"]) == 0
    parts = {part["part"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert parts["timm adapter"]["state"] == "usable"
    assert parts["timm adapter"]["found"].startswith("timm 1.")
    assert parts["study"]["state"] == "usable"
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(parts)

    monkeypatch.setitem(sys.modules, "timm", None)  # an import that fails
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_doctor_says_how_to_get_what_is_missing():
    finding = doctor.check_adapter("nothing", ("no-such-distribution",), "timm_ls_kd")
    assert (finding.state, finding.mend) == ("missing", how_to_install("nothing"))


@pytest.mark.parametrize(("minor", "safe"), [(11, 14), (12, 12)])
def test_doctor_warns_of_a_python_whose_archives_are_unsafe(minor, safe):
    assert f"install 3.{minor}.{safe}" in doctor.check_python(3, minor, safe - 1).mend
    assert doctor.check_python(3, minor, safe).mend == ""


def test_ctrl_c_says_how_to_go_on(here, capsys, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lskd_study.study.engine.run_study", stopped)
    assert cli.main(["study", "study.yaml"]) == 130
    assert capsys.readouterr().err == "lskd: stopped; the same command goes on from here\n"
