"""`from lskd_study import Study`: built, loaded, run by the command's engine, and what it found."""

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from lskd import LskdError
from lskd_study import Study
from lskd_study.base.stopping import StoppedError
from lskd_study.cli import main as cli
from lskd_study.pages.study import write_report
from lskd_study.plan.plan import JOB
from lskd_study.study import engine
from scenes import STUDY

pytestmark = pytest.mark.unit


def test_the_package_is_cheap_to_import():
    heavy = ["torch", "numpy", "pandas", "pydantic", "matplotlib", "scipy"]
    code = f"import lskd_study, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_nothing_else_is_there():
    import lskd_study

    with pytest.raises(AttributeError, match="no attribute 'Studies'"):
        _ = lskd_study.Studies


# Built and loaded


def test_a_study_from_a_mapping_is_that_of_the_file(scene):
    plans = [scene.plan(), *(Study(**STUDY).plan(), Study(STUDY).plan(), Study(Path("study.yaml")).plan())]
    first = plans[0]
    for plan in plans:
        assert [first.settings(run) for run in first.runs] == [plan.settings(run) for run in plan.runs]
        assert (plan.output, plan.seeds) == ("out", [0])
    assert scene.listing() == [path for path in scene.listing() if "out" not in path.parts]


def test_keys_take_the_place_of_the_files_own(scene):
    study = Study("study.yaml", seeds=[3, 5], output="elsewhere")
    assert study.plan().seeds == [3, 5]
    assert study.output == Path("elsewhere")
    assert str(study) == "Study('elsewhere/study.yaml', output='elsewhere')"
    assert Study("study.yaml", output="there").plan().output == "there"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [0]}, "unknown key 'sedes'; did you mean 'seeds'?"),
        ({"seeds": [0, 0]}, "seeds: 0 given twice; each value once"),
        ({"data": {"path": "data"}}, "'data.num_classes' is missing; add it"),
        ({"smoothing": {"values": [0, 1]}}, "smoothing.values.1: input should be less than 1 (given: 1)"),
    ],
)
def test_errors_are_those_of_a_file(scene, changes, said):
    scene.write(**changes)
    for source, where in (("study.yaml", r"study\.yaml:\d+"), ({**STUDY, **changes}, "study")):
        with pytest.raises(LskdError) as error:
            Study(source)
        (line,) = str(error.value).splitlines()
        assert line.endswith(f": {said}")
        assert re.match(where, line)


def test_values_of_python_are_those_of_a_file(scene):
    keys = {"seeds": range(2), "output": Path("there"), "hard_weights": np.array([0.0, 0.5])}
    for source in ("study.yaml", STUDY):
        plan = Study(source, temperatures=(1, np.float64(2)), **keys).plan()
        assert (plan.seeds, plan.output) == ([0, 1], "there")
        losses = {(run.temperature, run.hard_weight) for run in plan.runs if run.role == "student"}
        assert losses == {(1, 0), (1, 0.5), (2, 0), (2, 0.5)}
    with pytest.raises(LskdError, match=r"^study: <object object at .*> is nothing that a study"):
        Study(STUDY, title=object())


@pytest.mark.parametrize(
    ("arguments", "keys", "said"),
    [
        (["nothing.yaml"], {}, "no file or recipe 'nothing.yaml'; `lskd recipe list` names all"),
        (["data"], {}, "data is a folder and no study has written into it"),
        (["data"], {"seeds": [1]}, "data is a folder of results; to change seeds name a study file"),
        ([], {}, "is missing; add it"),
        (["recipes/stability/study.yaml"], {}, "is a list of teachers; measure them with `lskd stability"),
        (["stability"], {}, "is a list of teachers; measure them with `lskd stability"),
        (["reactnet_kd"], {}, "is no study; `lskd recipe show reactnet_kd` has the command that runs it"),
        (["fashion_mnist/class10"], {}, "did you mean fashion_mnist/classes10"),
    ],
)
def test_what_is_no_study_is_refused(scene, arguments, keys, said):
    with pytest.raises(LskdError, match=said):
        Study(*arguments, **keys)


def test_what_a_trainers_file_says_is_checked_when_it_is_planned(scene):
    Path("t.yaml").write_text("epochz: 1\n")
    with pytest.raises(LskdError, match="epochz"):
        Study(STUDY).plan()


def test_describe_says_what_a_dry_run_says(scene):
    printed = scene.run("study", "study.yaml", "--dry-run")
    assert printed.startswith(Study("study.yaml").describe() + "\n")


# Run


def test_a_finished_study_runs_as_the_command_does(scene, finish):
    finish(scene.plan())
    printed = scene.run("study", "study.yaml")
    study = Study("study.yaml").run()
    assert scene.capsys.readouterr().out == printed
    assert study.verdicts().headline.answer in printed
    assert Study("out").run().verdicts() == study.verdicts()


def test_a_study_built_here_goes_on_by_the_command(scene, finish):
    study = Study(STUDY, title="Built", seeds=[1, 2])
    finish(study.plan())
    study.run()
    content = yaml.safe_load(Path("out/study.yaml").read_text())
    assert content["title"] == "Built"
    page = Path("out/index.html").read_bytes()
    scene.run("study", "out/study.yaml")
    scene.run("study", "out")
    assert Path("out/index.html").read_bytes() == page
    # More seeds: the same file, changed.
    more = Study(STUDY, title="Built", seeds=[1, 2, 3])
    finish(more.plan())
    more.run()
    assert list(more.results()["seed"].unique()) == [1, 2, 3]
    assert yaml.safe_load(Path("out/study.yaml").read_text())["seeds"] == [1, 2, 3]


def test_files_and_results_of_others_are_not_written_over(scene, finish):
    Path("out").mkdir()
    own = "# my own\n" + Path("study.yaml").read_text()
    Path("out/study.yaml").write_text(own)
    with pytest.raises(LskdError, match=r"out/study\.yaml is a study file of your own"):
        Study(STUDY).run()
    assert Path("out/study.yaml").read_text() == own
    Path("out/study.yaml").unlink()
    finish(scene.plan())
    scene.run("study", "study.yaml")
    with pytest.raises(LskdError, match="out contains the results of another study"):
        Study(STUDY, seeds=[0, 1]).run()
    assert not Path("out/study.yaml").exists()


REFUSALS = [
    ({"data": {"path": "nowhere", "num_classes": 2}}, {}, "data folder nowhere does not exist"),
    ({"students": [{"model": "resnt18", "config": "s.yaml"}]}, {}, "unknown model 'resnt18'"),
    ({"tracker": "wandb"}, {}, "the tracker wandb is not installed here"),
    ({}, {"variance_from": "data"}, "data contains no study"),
    ({}, {"max_seeds": 9}, "one seed says nothing|made without the rule"),
    ({"seeds": [0, 1, 2]}, {"max_seeds": 3}, "has 3 seeds already|made without the rule"),
    ({}, {"options": ["--coers", "2"]}, "unrecognized arguments: --coers"),
    ({}, {"cores": 0}, "cores must be 1 or more, got 0"),
    ({"resources": {"extra": {"gpu": 99}}}, {}, "GPU"),
]


@pytest.mark.parametrize("there", [False, True])
def test_a_refused_run_leaves_all_as_it_was(scene, finish, monkeypatch, there):
    """Also the file and the results of a study that was built before, in the same folder."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    if there:
        before = Study(STUDY, title="Before")
        finish(before.plan())
        before.run()

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in scene.listing()}

    kept = content()
    for changes, asked, said in REFUSALS:
        with pytest.raises(LskdError, match=said) as error:
            Study(STUDY, title="Now", temperatures=[1, 3], **changes).run(**asked)
        assert "\n" not in str(error.value)
        assert content() == kept


def test_what_was_read_before_a_run_that_ends_early_is_read_again(scene, finish, monkeypatch):
    plan = scene.plan(seeds=[0, 1])
    finish(plan)
    study = Study("study.yaml").run()
    assert len(study.results()) == 8

    def stopped(plan, schedule, held):
        shutil.rmtree(plan.folder(plan.runs[-1]))
        raise StoppedError("stopped", signal.SIGINT)

    (plan.folder(plan.runs[-1]) / JOB).unlink()
    monkeypatch.setattr(engine, "_snakemake", stopped)
    with pytest.raises(LskdError, match=r"^stopped$"):
        study.run()
    assert len(study.results()) == 7


def test_results_whose_study_file_was_moved_say_so_and_go_on_by_its_new_name(scene, finish, monkeypatch):
    finish(scene.plan())
    page = Study("study.yaml").run().verdicts()
    Path("study.yaml").rename("moved.yaml")
    study = Study("out")
    assert len(study.results()) == 4
    with pytest.raises(LskdError, match=r"^study\.yaml, the study file of out, is not there; name it"):
        study.run()
    assert "moved.yaml" in Study("moved.yaml", output="out").run().verdicts().study_file
    assert study.verdicts().findings == page.findings
    monkeypatch.chdir("data")
    with pytest.raises(LskdError, match=f"the study in ../out was started in {scene.folder}; give the"):
        Study("../out").run()


def test_missing_and_failed_runs_are_an_error(scene, finish, fail, scheduled):
    plan = scene.plan(seeds=[0, 1])
    finish(plan)
    lost = plan.runs[-1]
    (plan.folder(lost) / JOB).unlink()
    study = Study("study.yaml")
    with pytest.raises(LskdError, match=f"1 of 8 runs in out failed or are missing, e.g. {lost.id}"):
        study.run(cores=2)
    assert scheduled[0][scheduled[0].index("--cores") + 1] == "2"
    assert len(study.results()) == 7
    finish(plan)
    fail(plan, plan.runs[0], "the loss is not finite in epoch 1")
    with pytest.raises(LskdError, match="2 of 8 runs in out failed or are missing"):
        study.run()
    failed = study.results().dropna(subset="failed")
    assert list(failed["run"]) == [
        plan.runs[0].id,
        *(r.id for r in plan.runs if r.teacher == plan.runs[0].id),
    ]


def test_it_runs_in_the_main_thread_alone(scene):
    before = scene.listing()
    with ThreadPoolExecutor() as pool:
        error = pool.submit(Study(STUDY).run).exception()
    assert "a study runs in the main thread" in str(error)
    assert scene.listing() == before


def test_seeds_until_it_is_decided_are_the_engines(scene):
    with pytest.raises(LskdError, match="one seed says nothing about how much seeds vary"):
        Study("study.yaml").run(max_seeds=9)


# What it found


@pytest.fixture(scope="module")
def found(tmp_path_factory, fake_study_at):
    """A finished study, its page written, and then moved."""
    root = tmp_path_factory.mktemp("simulated")
    plan = fake_study_at(root)(effect=1.0)
    write_report(plan)
    return Study(shutil.move(root / "out", root / "moved"))


def test_results_are_one_row_for_each_run(found):
    frame = found.results()
    assert len(frame) == len(found._results.plan.runs) == 18
    for row in frame.itertuples():
        tensors = load_file(found.output / f"{row.role}s" / row.run / "val_logits.safetensors")
        right = tensors["logits"].argmax(1) == tensors["labels"]
        assert row.top1 == pytest.approx(100 * right.mean())
    students = frame[frame["role"] == "student"]
    taught = students.merge(frame, left_on="teacher", right_on="run", suffixes=("", "_of_teacher"))
    assert len(taught) == 12
    assert (taught["seed"] == taught["seed_of_teacher"]).all()
    assert (taught["smoothing"] == taught["smoothing_of_teacher"]).all()
    assert {str(frame[name].dtype) for name in ("top1", "smoothing", "train_ce")} == {"float64"}


def test_curves_are_the_files_numbers(found):
    frame = found.curves()
    assert len(frame) == 18 * 5
    (last,) = frame.query("run == 'student-small-of-big-smoothing0.1-T1-hard0-seed2' and epoch == 4")[
        "train_ce"
    ]
    result = found.results().set_index("run").loc["student-small-of-big-smoothing0.1-T1-hard0-seed2"]
    assert last == pytest.approx(result["train_ce"])


def test_findings_and_verdicts_are_the_pages(found):
    findings, record = found.findings(), found.verdicts()
    assert [(one.claim.id, one.verdict) for one in findings] == [
        (f.claim, f.verdict) for f in record.findings
    ]
    frame = found.results().query("role == 'student'")
    mean = frame.groupby("smoothing")["top1"].mean()
    assert findings[0].interval.estimate == pytest.approx(mean[0.1] - mean[0.0])
    assert record.headline.verdict == "supported"


def test_figures_are_those_beside_the_page(found):
    before = dict(mpl.rcParams)
    figures = found.figures()
    assert set(figures) == {path.stem for path in (found.output / "figures").glob("*.png")} >= {"difference"}
    (axes,) = figures["difference"].axes
    assert "points" in axes.get_xlabel()
    assert dict(mpl.rcParams) == before


def test_nothing_is_read_of_a_study_that_has_not_run(scene):
    study = Study(STUDY)
    for read in (study.results, study.curves, study.findings, study.figures):
        with pytest.raises(LskdError, match=r"no run in out has finished; run\(\) trains them"):
            read()
    with pytest.raises(LskdError, match="out contains no study"):
        study.verdicts()


def test_teachers_alone_have_results_too(scene, finish):
    plan = scene.plan(students=None, seeds=[0, 1])
    finish(plan)
    study = Study("study.yaml").run()
    assert list(study.results()["role"].unique()) == ["teacher"]
    assert np.isfinite(study.results()["one_minus_s"]).all()
    assert study.figures().keys() == {path.stem for path in Path("out/figures").glob("*.png")}


def test_a_missing_extra_is_one_line(monkeypatch):
    import lskd_study
    from lskd_study.base import extras

    monkeypatch.setattr(extras, "STUDY_MODULES", ("nothing_of_that_name",))
    with pytest.raises(LskdError, match="this needs nothing_of_that_name, not installed here; "):
        _ = lskd_study.Study
    assert cli.main(["--help"]) == 0
