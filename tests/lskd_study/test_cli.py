"""The ``lskd`` command: help, doctor, and what it says of a study in order."""

import json
import subprocess
import sys

import pytest

from lskd.base.install import how_to_install
from lskd_study.cli import doctor
from lskd_study.cli import main as cli
from lskd_study.plan.recipes import recipes_folder
from mmcls_bnn.binary import bits

pytestmark = pytest.mark.unit


def test_a_study_in_order_is_planned_without_a_trace(scene):
    before = scene.listing()
    out = scene.run("study", "study.yaml", "--dry-run")
    assert "4 runs: 0 finished, 4 to do" in out
    assert "to do     student-test_byobnet-of-test_resnet-smoothing0.1-T1-hard0-seed0" in out
    assert scene.listing() == before


def test_a_misspelt_command_or_option_is_one_line(scene):
    for words in (["studdy"], ["data", "digts"], ["doctor", "--jsn"], ["study"]):
        scene.refused(*words)


def test_data_digits_says_what_it_did(scene):
    for state in ("written", "already there"):
        lines = scene.run("data", "digits").splitlines()
        assert lines[0] == f"data/digits: 1201 training and 596 validation images, {state}"
        assert lines[1].startswith("10 classes; images in a class: train 116 to 122, median ")
    scene.refused("data", "digits", "--output", "data/digits/manifest.json")


def test_the_packaged_recipe_is_found_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", "recipes/digits/study.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "50 runs: 0 finished, 50 to do" in out
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
    build = bits.build() or "torch"
    assert f" {build} of " in parts["binary layers"]["found"] or build == "torch"
    monkeypatch.setattr(bits, "library", lambda: None)
    assert cli.main(["doctor"]) == 0
    assert "by torch, without the compiled xnor; for faster" in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "timm", None)  # an import that fails
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_doctor_says_how_to_get_what_is_missing():
    finding = doctor.check_adapter("nothing", ("no-such-distribution",), "timm_ls_kd")
    assert (finding.state, finding.fix) == ("missing", how_to_install("nothing"))


@pytest.mark.parametrize(("minor", "safe"), [(11, 14), (12, 12)])
def test_doctor_warns_of_a_python_whose_archives_are_unsafe(minor, safe):
    assert f"install 3.{minor}.{safe}" in doctor.check_python(3, minor, safe - 1).fix
    assert doctor.check_python(3, minor, safe).fix == ""


def test_ctrl_c_says_how_to_go_on(scene, capsys, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lskd_study.study.engine.run_study", stopped)
    assert cli.main(["study", "study.yaml"]) == 130
    assert capsys.readouterr().err == "lskd: stopped; the same command goes on from here\n"
