"""Figs. 8 and 9 from studies' own runs, with the paper's points in grey: for pages, and as files.

And what several studies fill together: their tables of the paper, with these figures.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
from markupsafe import Markup

from lskd import LskdError
from lskd_study.base.text import Measured
from lskd_study.drawing.class_count import Accuracy, Gain, class_count_figure, gains, paper_accuracies
from lskd_study.drawing.curves import student_kinds
from lskd_study.drawing.scatter import (
    Point,
    accuracy_stability_figure,
    paper_pairs,
    paper_points,
    teacher_point,
    teacher_student_figure,
)
from lskd_study.drawing.style import STYLE, Drawing, note_failed, themed_svg
from lskd_study.pages.paper_tables import PaperTable, Studies, paper_table
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.matching import names_table, network_name, teacher_name
from lskd_study.plan.plan import PLAN, Plan, exact
from lskd_study.results.images import ImageResult
from lskd_study.results.read import read_results
from lskd_study.results.results import Results

_ENOUGH = 3  # kinds of teachers: two points lie on a line whatever they are
_PAGE_WIDTH, _FILE_WIDTH = 4.4, 5.6  # inches; a page's panels are about as wide as a telephone


@dataclass(frozen=True)
class PageFigure:
    """A figure for a page, with its files.

    Attributes:
        stem: of its files.
        title: its heading.
        panel: for the page, in the page's colours.
        drawing: for the files.
        note: what there is to say below it.
    """

    stem: str
    title: str
    panel: Markup
    drawing: Drawing
    note: str

    @property
    def tables(self) -> list[str]:
        """The names of its CSV files."""
        return [f"{self.stem}{'-' if name else ''}{name}.csv" for name in self.drawing.tables]


def study_figures(results: Results[ImageResult]) -> list[PageFigure]:
    """Return what there is to draw of one study: Fig. 8, stability against accuracy, Fig. 9."""
    drawn = [figure8([results]), accuracy_stability([results])]
    if names_table(results.plan, ("Table 4",)):
        drawn.append(figure9([results]))
    return [figure for figure in drawn if figure is not None]


def figure8(studies: Studies) -> PageFigure | None:
    """Return Fig. 8 (left), means over seeds; None where there are too few teachers to compare.

    The paper's Table 8 is drawn behind it where a study names that table, and then two teachers are enough.
    """
    paper = paper_pairs() if _name(studies, "Table 8") else []
    pairs = [
        Point(arm.name, _mean(arm.teachers, "top1"), _mean(students, "top1"), student, arm.smoothing > 0)
        for results in studies
        for arm in _arms(results)
        for student, students in arm.students
        if students
    ]
    if not pairs or (len({(p.name, p.smoothed) for p in pairs}) < _ENOUGH and not paper):
        return None
    behind = " Grey: the paper’s Table 8." if paper else ""
    return _figure(
        studies,
        "teacher-student",
        "Fig. 8 (left): students against their teachers",
        "Top-1 accuracy of students against that of their teachers",
        lambda width: teacher_student_figure(pairs, paper, width),
        f"Means over seeds; correlations over the teachers of each kind of student.{behind}",
    )


def accuracy_stability(studies: Studies) -> PageFigure | None:
    """Return the teachers' 1-S against their accuracy; None where there are too few teachers.

    The paper's Table 1 is drawn behind it where a study names a table of these teachers on ImageNet-1K.
    """
    points = [
        teacher_point(arm.name, _mean(arm.teachers, "top1"), instability, arm.smoothing > 0)
        for results in studies
        for arm in _arms(results)
        if not math.isnan(instability := _mean(arm.teachers, "one_minus_s"))  # a diverged teacher has none
    ]
    paper = paper_points() if _name(studies, "Table 1", "Table 8") else []
    if not points or (len(points) < _ENOUGH and not paper):
        return None
    behind = " Grey: the paper’s Table 1." if paper else ""
    return _figure(
        studies,
        "accuracy-stability",
        "Stability against accuracy",
        "1−S of teachers against their top-1 accuracy",
        lambda width: accuracy_stability_figure(points, paper, width),
        "Sec. 5 calls stability highly aligned with accuracy: points would then fall to the right. 1−S by "
        f"Algorithm 1, means over seeds.{behind}",
    )


def figure9(studies: Studies) -> PageFigure | None:
    """Return Fig. 9 over studies of different numbers of classes; None where no teacher has both arms.

    A gain is the mean over seeds with smoothing (the study's largest alpha) minus that without. As in the
    paper, gains are averaged over networks: those that were trained on every number of classes, and of these
    the paper's two alone if both are there. Its own average (Table 4) is drawn behind where a study names it.
    """
    accuracies = [
        Accuracy(arm.name, results.plan.num_classes, arm.smoothing > 0, result.top1)
        for results in studies
        for arm in _arms(results)
        if arm.smoothing in (results.plan.smoothing[0], results.plan.smoothing[-1])
        for result in arm.teachers
    ]
    paper = paper_accuracies() if _name(studies, "Table 4") else []
    found = gains(accuracies)
    if not found:
        return None
    compared = _compared(found, {a.network for a in paper})
    accuracies = [a for a in accuracies if a.network in compared]
    counts = {gain.classes for gain in found}
    alone = (
        "" if len(counts) > 1 else " One number of classes: how gains change with it takes several studies."
    )
    behind = " Grey: the paper’s average (Table 4)." if paper else ""
    return _figure(
        studies,
        "class-count",
        "Fig. 9: the gain from smoothing by the number of classes",
        "Gain in top-1 accuracy from smoothing, by the number of classes",
        lambda width: class_count_figure(accuracies, paper, width),
        f"Accuracy with smoothing minus without, means over seeds.{alone}{behind}",
    )


def _compared(found: Sequence[Gain], papers: set[str]) -> set[str]:
    """Return the networks to average over: the paper's if all are there, else those with every count."""
    counts: dict[str, set[int]] = {}
    for gain in found:
        counts.setdefault(gain.network, set()).add(gain.classes)
    everywhere = {name for name, own in counts.items() if own == set.union(*counts.values())}
    return papers if papers and papers <= everywhere else everywhere or set(counts)


def _figure(
    studies: Studies, stem: str, title: str, label: str, draw: Callable[[float], Drawing], note: str
) -> PageFigure:
    failed = sum(len(results.failed) for results in studies)
    drawings = [draw(width) for width in (_PAGE_WIDTH, _FILE_WIDTH)]
    for drawing in drawings:
        with mpl.rc_context(STYLE):
            note_failed(drawing.figure, failed)
    panel = themed_svg(drawings[0].figure, f"paper-{stem}", label)
    return PageFigure(stem, title, panel, drawings[1], note)


@dataclass(frozen=True)
class _Arm:
    """The teachers of one kind that have a result, by the paper's name, and their students of each kind."""

    name: str
    smoothing: float
    teachers: list[ImageResult]
    students: list[tuple[str, list[ImageResult]]]


def _arms(results: Results[ImageResult]) -> Iterator[_Arm]:
    """Yield the arms in the order of the study's file; alpha is in the name if there are several."""
    plan = results.plan
    configs = {run.model: plan.configs.get(run.config, {}) for run in plan.runs if run.role == "teacher"}
    several = len([alpha for alpha in plan.smoothing if alpha]) > 1
    for model, config in configs.items():
        for alpha in plan.smoothing:
            if teachers := list(results.teachers(model, alpha).values()):
                name = teacher_name(model, config, plan.num_classes)
                name += f", α = {exact(alpha)}" if several and alpha else ""
                students = [
                    (network_name(own.model) + own.setting, list(own.arms(results)[alpha].values()))
                    for own in student_kinds(plan)
                    if own.teacher == model
                ]
                yield _Arm(name, alpha, teachers, students)


def _mean(results: Sequence[ImageResult], quantity: str) -> float:
    return Measured.of([result.value(quantity) for result in results]).mean


def _name(studies: Studies, *tables: str) -> bool:
    return any(names_table(results.plan, tables) for results in studies)


# Several studies

_ORDER = ("Table 2", "Table 3", "Table 4", "Table 6", "Table 7", "Table 8", "Table 9", "Fig. 5", "Fig. 6")
_WITH = {"Table 8": (figure8, accuracy_stability), "Table 4": (figure9,)}


def plans_of(folders: Sequence[Path]) -> dict[Path, Plan]:
    """Return the studies' plans by output folder, which may have been moved; without what is no study."""
    # Only the results may have been moved: the training data are where they were.
    return {
        folder: replace(Plan.read(folder / PLAN), output=str(folder.resolve()))
        for folder in folders
        if (folder / PLAN).is_file()
    }


def read_studies(folders: Sequence[Path]) -> list[Results[ImageResult]]:
    """Return the results of the studies of images in these output folders, which may have been moved.

    Raises:
        LskdError: for a folder that has no study of images, or whose runs are damaged.
    """
    plans = plans_of(folders)
    for folder in folders:
        if folder not in plans:
            raise LskdError(f"{folder} contains no study ({PLAN} is missing); name the output folder of one")
        if plans[folder].kind is TRANSLATION:
            raise LskdError(
                f"{folder} contains a study of translation, which has no accuracies; leave it out"
            )
    return [read_results(plans[folder]) for folder in folders]


def shared_tables(folders: Sequence[Path]) -> tuple[list[PaperTable], list[PageFigure]]:
    """Return the paper's tables that two or more of these studies name, filled by all of them, and figures.

    With Table 8 come Fig. 8 and stability against accuracy, with Table 4 Fig. 9. Studies that no other shares
    a table with are not read.

    Raises:
        LskdError: for runs that are damaged.
    """
    plans = plans_of(folders)
    named = Counter(name for plan in plans.values() for name in plan.paper)
    shared = [name for name in _ORDER if named[name] > 1]
    wanted = [
        folder for folder, plan in plans.items() if plan.kind is not TRANSLATION and names_table(plan, shared)
    ]
    studies = [results for results in read_studies(wanted) if results.finished]
    tables, figures = [], []
    for name in shared:
        own = [results for results in studies if name in results.plan.paper]
        tables.append(paper_table(name, own))
        figures += [figure for draw in _WITH.get(name, ()) if (figure := draw(own)) is not None]
    return tables, figures
