"""Trends over the teachers of several studies together (Table 8, Fig. 8).

A study trains its teachers by one protocol; the paper's "Long" and "CutMix" are studies of their own. Those
that are measured on the same samples put their teachers together: each network of each study is one, and one
that two studies trained alike counts once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lskd_study.claims.findings import Draft
from lskd_study.claims.judging import estimate_trend
from lskd_study.claims.scope import task_of
from lskd_study.claims.settings import Setting, models_of
from lskd_study.claims.statements import CLAIMS, Claim
from lskd_study.plan.plan import Plan, Run, exact
from lskd_study.results.results import Result, Results, common_seeds, failure_words, failures_of
from lskd_study.stats.trends import FEWEST

Kinds = Sequence[Mapping[int, Result]]  # results by seed, one for each smoothing value
# A student and its loss: model, file, temperature, hard weight, T^2.
Student = tuple[str, str, float, float, bool]


def pooled_trends(studies: Sequence[Results[Any]]) -> list[Draft]:
    """Return the trends over teachers of studies of equal smoothing, where several share samples."""
    drafts: list[Draft] = []
    for group in _same_samples([study for study in studies if study.finished]):
        for claim in CLAIMS:
            if claim.contrast != "networks" or task_of(group[0].plan) not in claim.tasks:
                continue
            if claim.measured_on == "teacher":
                drafts += _trend(claim, group, None)
                continue
            for student in dict.fromkeys(kind for study in group for kind in _students(study.plan)):
                sharing = [study for study in group if student in _students(study.plan)]
                drafts += _trend(claim, sharing, student)
    return drafts


def _trend(claim: Claim, studies: Sequence[Results[Any]], student: Student | None) -> list[Draft]:
    """Return the draft, or nothing where one study has all the teachers or there are too few."""
    teachers: dict[tuple[str, str], Kinds] = {}
    explained: list[Kinds] = []
    contributing = []
    for study in studies:
        plan, before = study.plan, len(teachers)
        for name in models_of(plan, "teacher"):
            run = next(run for run in plan.runs if run.role == "teacher" and run.model == name)
            key = name, content(plan, run)
            if key in teachers:
                continue
            teachers[key] = [study.teachers(name, alpha) for alpha in plan.smoothing]
            explained.append(
                teachers[key]
                if student is None
                else [study.students(student[0], name, alpha, *student[2:4]) for alpha in plan.smoothing]
            )
        if len(teachers) > before:
            contributing.append(plan)
    if len(teachers) < FEWEST or len(contributing) < 2:
        return []
    baseline, *others = contributing[0].smoothing
    t, hard = student[2:4] if student else (1.0, 0.0)
    words = f"mean over α {', '.join(f'{exact(alpha)}' for alpha in contributing[0].smoothing)}"
    if student:
        words += f"; student {student[0]}, T = {exact(t)}, λ = {exact(hard)}"
    titles = ", ".join(f"“{plan.title}”" for plan in contributing)
    draft = Draft(claim, Setting(baseline, others[-1], t, hard, f"{words}; teachers of {titles}"))
    needed = [runs for kinds in (*teachers.values(), *explained) for runs in kinds]
    if failed := failures_of(needed):
        return [Draft(claim, draft.setting, note=failure_words(failed), failed=True)]
    seeds = common_seeds(needed)
    if not seeds:
        return [Draft(claim, draft.setting, note="no seed has all of its runs")]
    return [estimate_trend(draft, list(teachers.values()), explained, seeds)]


def _same_samples(studies: Sequence[Results[Any]]) -> list[list[Results[Any]]]:
    groups: list[list[Results[Any]]] = []
    for study in studies:
        for group in groups:
            same_task = group[0].plan.num_classes == study.plan.num_classes
            if same_task and _first(group[0]).same_samples(_first(study)):
                group.append(study)
                break
        else:
            groups.append([study])
    return [group for group in groups if len(group) > 1]


def _first(study: Results[Any]) -> Result:
    found: Result = next(iter(study.finished.values()))
    return found


def _students(plan: Plan) -> list[Student]:
    return list(
        dict.fromkeys(
            (run.model, content(plan, run), run.temperature, run.hard_weight, plan.temperature_squared)
            for run in plan.runs
            if run.role == "student"
        )
    )


def content(plan: Plan, run: Run) -> str:
    """Return what the trainer's file of a run says: files of one content are one protocol."""
    return json.dumps(plan.configs.get(run.config, {}), sort_keys=True)
