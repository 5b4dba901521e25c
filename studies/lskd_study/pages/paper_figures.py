"""Figs. 8 and 9 from studies' own runs, with the paper's points in grey: for pages, and as files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lskd_study.base.extras import needs_study_extra
from lskd_study.base.text import Measured
from lskd_study.drawing.accuracy_stability import accuracy_stability_figure, paper_points, teacher_point
from lskd_study.drawing.class_count import Accuracy, Gain, class_count_figure, gains_of, paper_accuracies
from lskd_study.drawing.curves import Panel, themed_svg
from lskd_study.drawing.drawing import Drawing, write_drawing
from lskd_study.drawing.scatter import Point
from lskd_study.drawing.style import STYLE, note_failed
from lskd_study.drawing.teacher_student import Pair, paper_pairs, teacher_student_figure
from lskd_study.pages.tables import Arm, arms_of
from lskd_study.plan.matching import names_table, network_name, teacher_name
from lskd_study.plan.plan import exact
from lskd_study.results.images import ImageResult
from lskd_study.results.results import Results

with needs_study_extra():
    import matplotlib as mpl

_ENOUGH = 3  # kinds of teachers: two points lie on a line whatever they are
_PAGE_WIDTH = 4.4  # inches; a page's panels are about as wide as a telephone


Studies = Sequence[Results[ImageResult]]


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
    panel: Panel
    drawing: Drawing
    note: str

    @property
    def tables(self) -> list[str]:
        """The names of its CSV files."""
        return [f"{self.stem}{'-' if name else ''}{name}.csv" for name in self.drawing.tables]

    def write(self, folder: Path) -> None:
        """Write it as PNG, SVG and CSV.

        Raises:
            LskdError: when the folder cannot be written.
        """
        write_drawing(self.drawing, folder / self.stem)


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
    paper = paper_pairs() if any(names_table(r.plan, ("Table 8",)) for r in studies) else []
    pairs = [
        Pair(
            name,
            _top1(arm.teachers),
            network_name(students.model) + _setting(results, students.temperature, students.hard_weight),
            _top1(students.results),
            arm.smoothing > 0,
        )
        for results in studies
        for name, arm in _arms(results)
        for students in arm.students
        if arm.teachers and students.results
    ]
    if not pairs or (len({(p.teacher, p.smoothed) for p in pairs}) < _ENOUGH and not paper):
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
    points: list[Point] = []
    for name, arm in (named for results in studies for named in _arms(results)):
        instability = Measured.of([result.instability for result in arm.teachers]).mean
        if instability == instability:  # a diverged teacher has none
            points.append(teacher_point(name, _top1(arm.teachers), instability, arm.smoothing > 0))
    behind_it = any(names_table(r.plan, ("Table 1", "Table 8")) for r in studies)
    paper = paper_points() if behind_it else []
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
        Accuracy(name, results.plan.num_classes, arm.smoothing > 0, result.top1)
        for results in studies
        for name, arm in _arms(results)
        if arm.smoothing in (results.plan.smoothing[0], results.plan.smoothing[-1])
        for result in arm.teachers
    ]
    paper = paper_accuracies() if any(names_table(r.plan, ("Table 4",)) for r in studies) else []
    found = gains_of(accuracies)
    if not found:
        return None
    counts = len({gain.classes for gain in found})
    compared = _compared(found, {a.network for a in paper})
    accuracies = [a for a in accuracies if a.network in compared]
    alone = "" if counts > 1 else " One number of classes: how gains change with it takes several studies."
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
    drawings = [draw(width) for width in (_PAGE_WIDTH, 5.6)]
    for drawing in drawings:
        with mpl.rc_context(STYLE):
            note_failed(drawing.figure, failed)
    panel = Panel(themed_svg(drawings[0].figure, f"paper-{stem}"), label)
    return PageFigure(stem, title, panel, drawings[1], note)


def _arms(results: Results[ImageResult]) -> Iterator[tuple[str, Arm[ImageResult]]]:
    """Yield each kind of teacher that has a result, by the paper's name, with alpha if there are several."""
    plan = results.plan
    configs = {run.model: plan.configs.get(run.config, {}) for run in plan.runs if run.role == "teacher"}
    several = len([alpha for alpha in plan.smoothing if alpha]) > 1
    for arm in arms_of(results):
        if arm.teachers:
            alpha = f", α = {exact(arm.smoothing)}" if several and arm.smoothing else ""
            yield teacher_name(arm.model, configs[arm.model], plan.num_classes) + alpha, arm


def _top1(results: Sequence[ImageResult]) -> float:
    return Measured.of([result.top1 for result in results]).mean


def _setting(results: Results[ImageResult], temperature: float, hard_weight: float) -> str:
    return "" if results.plan.papers_loss else f", T = {exact(temperature)}, λ = {exact(hard_weight)}"
