"""Which run `lskd export` takes, on simulated studies; and what it asks for before it writes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lskd import LskdError
from lskd_study.base import extras
from lskd_study.cli import main as cli
from lskd_study.export.choice import best_student
from lskd_study.plan.plan import Run
from lskd_study.results.read import read_results
from lskd_study.results.results import Results

pytestmark = pytest.mark.unit


def with_scores(results: Results, scores: dict[tuple[str, float], list[float]]) -> Results:
    """Give the students of a network and smoothing these accuracies, seed by seed; the others have none."""

    def scored(result, score: float):
        correct = np.zeros(100)
        correct[: round(score)] = 1
        return dataclasses.replace(result, correct=correct)

    def score(run: Run) -> float:
        return scores.get((run.model, run.smoothing), [0.0] * 9)[run.seed] if run.role == "student" else 100.0

    finished = {name: scored(result, score(result.run)) for name, result in results.finished.items()}
    return dataclasses.replace(results, finished=finished)


@pytest.mark.parametrize(
    ("seeds", "of_best", "taken"),
    [
        ([0, 1, 2], [90, 70, 80], 2),
        ([0, 1, 2], [80, 80, 80], 1),  # of equal ones in their order
        ([0, 1, 2, 3], [90, 60, 80, 70], 3),  # the lower of two in the middle
        ([0], [90], 0),
    ],
)
def test_the_median_run_of_the_best_kind(fake_study, seeds, of_best, taken):
    results = read_results(fake_study(seeds=seeds, per_class=3))
    # Another kind has the best single run, and a lower mean; teachers do not count.
    scores = {("small", 0.1): of_best, ("big", 0.0): [95, *[0] * (len(seeds) - 1)] if len(seeds) > 1 else [1]}
    chosen = best_student(with_scores(results, scores))
    assert (chosen.run.model, chosen.run.smoothing, chosen.run.seed) == ("small", 0.1, taken)
    assert chosen.best_of == 4
    why = "by one seed" if len(seeds) == 1 else "the median score, not the best"
    assert chosen.because.endswith(why)
    asked = best_student(with_scores(results, scores), seeds[-1])
    assert (asked.run.model, asked.run.seed) == ("small", seeds[-1])


def test_a_kind_with_a_failed_seed_is_not_chosen_by_those_that_are_left(fake_study, fail):
    plan = fake_study(per_class=3)
    best = next(run for run in plan.runs if run.role == "student" and run.seed == 1)
    fail(plan, best, "the loss is not finite in epoch 1")
    results = read_results(plan)
    chosen = best_student(with_scores(results, {(best.model, best.smoothing): [99, 0, 99]}))
    assert (chosen.run.model, chosen.run.smoothing) != (best.model, best.smoothing)
    assert chosen.best_of == 3


def test_without_a_student_that_is_finished_there_is_none(fake_study):
    plan = fake_study(per_class=3)
    (plan.folder(plan.runs[0]) / "job.json").unlink()
    results = read_results(dataclasses.replace(plan, seeds=[0, 1, 2, 3]))
    with pytest.raises(LskdError, match="no student that is finished with every seed"):
        best_student(results)
    alone = [run for run in plan.runs if run.role == "teacher"]
    with pytest.raises(LskdError, match="has no students"):
        best_student(read_results(dataclasses.replace(plan, runs=alone)))


def one_line(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([*map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_missing_is_said_first(fake_study, tmp_path: Path, monkeypatch, capsys):
    plan = fake_study(per_class=3)
    monkeypatch.setattr(extras, "EXPORT_MODULES", ("onnx_that_nobody_has",))
    line = one_line(capsys, "export", plan.root)
    assert "ONNX needs onnx_that_nobody_has" in line
    assert "--no-onnx" in line
    assert "[export]" in line
    assert "last.pth.tar" in one_line(capsys, "export", plan.root, "--no-onnx")  # simulated runs have none
    assert not (plan.root / "export").exists()


def test_translation_models_are_refused(translation_study, capsys):
    plan = translation_study(sentences=5)
    assert "translation" in one_line(capsys, "export", plan.root)
    assert not (plan.root / "export").exists()


def test_the_real_valued_control_of_a_binary_student_is_refused(fake_study, capsys):
    plan = fake_study(per_class=3, ecosystem="mmcls", controls=["real"])
    run = next(run for run in plan.runs if run.real)
    assert f"{run.id} is the real-valued control" in one_line(capsys, "export", plan.folder(run), "--no-onnx")
    assert not (plan.root / "export").exists()
