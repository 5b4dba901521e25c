"""``lskd figure``: the paper's figures from any teachers or table of results."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lskd import LskdError

if TYPE_CHECKING:
    from lskd_study.drawing.class_means import ClassMeans
    from lskd_study.drawing.inputs import Split, TeacherOptions
    from lskd_study.drawing.style import Drawing

app = typer.Typer(
    help="Draw the paper's figures from teachers or tables: PNG, SVG, and the numbers as CSV.",
    no_args_is_help=True,
)

_teacher_option = partial(typer.Option, rich_help_panel="Teachers")
_data_option = partial(typer.Option, rich_help_panel="What models are asked about")
_FILES = "npz, safetensors or parquet; repeat for several teachers"
OfSplit = Annotated[Literal["train", "val"], _data_option(help="Of the data.")]
Classes = Annotated[str | None, typer.Option(help="Names or ids with commas.")]
First = Annotated[int, typer.Option(min=1, help="Else as many classes from the first on.")]
Folder = typer.Option("--study", help="Output folder of `lskd study`; repeat for several.")
Folders = Annotated[list[Path] | None, Folder]
Table = Annotated[Path | None, typer.Option("--table", help="CSV table of results.")]


def _teachers(
    outputs: Annotated[
        list[Path] | None, _teacher_option(help=f"A teacher's saved outputs: {_FILES}.")
    ] = None,
    model: Annotated[
        list[str] | None, _teacher_option(help="Model of timm, or torchvision:NAME, with --data-dir. Repeat.")
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        _teacher_option(help="Weights, one for each --model; without any, timm's pretrained weights."),
    ] = None,
    name: Annotated[
        list[str] | None, _teacher_option(help="What the figure calls them, one for each teacher.")
    ] = None,
    data_dir: Annotated[Path | None, _data_option(help="Folder of images by class.")] = None,
    batch_size: Annotated[int, _data_option(min=1)] = 64,
    workers: Annotated[int, _data_option(min=0, help="Loading processes.")] = 2,
    device: Annotated[str | None, _data_option(help="e.g. cuda or cpu.")] = None,
    img_size: Annotated[int | None, _data_option(min=1, help="Instead of the run's or model's own.")] = None,
) -> "TeacherOptions":
    """Return what the command line says about teachers."""
    from lskd_study.drawing.inputs import TeacherOptions
    from lskd_study.teachers.evaluate import teacher_specs

    evaluation: dict[str, Any] = {"data_dir": data_dir, "batch_size": batch_size, "workers": workers}
    evaluation |= {"device": device, "img_size": img_size}
    specs = teacher_specs(outputs, model, checkpoint, name, files_option="--outputs")
    return TeacherOptions(specs, evaluation)


def figure(draw: Callable[..., "Drawing | None"]) -> Callable[..., "Drawing | None"]:
    """Make a sub-command of a function that returns a drawing, or None where another process draws.

    The command has the function's parameters and ``--output``; in place of ``teachers`` it has those of
    `_teachers`.
    """
    own = dict(inspect.signature(draw).parameters)
    asked = inspect.signature(_teachers).parameters if own.pop("teachers", None) else {}
    name = draw.__name__.replace("_", "-")

    def command(*, output: Path, **values: Any) -> None:
        from lskd_study.drawing.style import check_figure, figure_stem, write_drawing

        stem = figure_stem(output)
        check_figure(stem)
        if asked:
            values["teachers"] = _teachers(**{option: values.pop(option) for option in asked})
        drawing = draw(**values)
        if drawing is not None:
            for path in write_drawing(drawing, stem):
                print(path)

    place = inspect.Parameter(
        "output",
        inspect.Parameter.KEYWORD_ONLY,
        default=Path("figures", name),
        annotation=Annotated[Path, typer.Option(help="Beginning of the files' names.")],
    )
    command.__annotations__ = {}  # typer goes by the signature
    command.__signature__ = inspect.Signature([*asked.values(), *own.values(), place])  # type: ignore[attr-defined]
    app.command(name, help=inspect.getdoc(draw))(command)
    return draw


@figure
def projection(
    teachers: "TeacherOptions",
    train_outputs: Annotated[
        list[Path] | None, _teacher_option(help="The same teachers on the training data, in their order.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Three names or ids with commas: the similar pair first. Proposed if left out."),
    ] = None,
    propose: Annotated[
        bool, typer.Option("--propose", help="Choose the classes by what the teachers confuse.")
    ] = False,
    replicates: Annotated[int, typer.Option(min=100, help="Bootstrap draws for the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
) -> "Drawing | None":
    """Fig. 1: activations of three classes in the plane of their templates; D1, D2 and Dc measured."""
    from lskd_study.drawing import inputs
    from lskd_study.drawing import projection as drawn

    if propose and classes is not None:
        raise LskdError("--propose and --classes both choose the classes; leave out one")
    if classes is not None:
        inputs.split_names(classes, 3)
    options = replace(teachers, train_outputs=train_outputs or [])
    splits = inputs.read_splits(options, ["train", "val"], features=True, classes=classes)
    if splits is None:
        return None
    drawn.check_splits(splits)
    *_, last = splits.values()
    if classes is not None:
        chosen = inputs.resolve_classes(classes, inputs.class_names(last[0]))
    else:
        chosen, reason = inputs.propose(last)
        print(f"classes: {reason}")
    panels = [
        drawn.measure_projection(teacher, split, chosen, replicates, seed)
        for split, own in splits.items()
        for teacher in own
    ]
    return drawn.projection_figure(panels)


@figure
def smoothing_loss(
    alphas: Annotated[str, typer.Option(help="Smoothing values with commas.")] = "0,0.05,0.1,0.2,0.3",
    convention: Annotated[
        Literal["paper", "uniform"], typer.Option(help="paper: 1 - alpha and alpha; uniform: alpha / 2.")
    ] = "paper",
    margin: Annotated[float, typer.Option(help="Largest margin drawn.")] = 8.0,
) -> "Drawing":
    """Fig. 3: what smoothing does to the binary logistic loss."""
    from lskd_study.drawing.class_means import smoothing_loss as draw

    if not 0 < margin <= 1e4:
        raise LskdError(f"--margin is {margin:g}; it must be a number above 0 and at most 10,000")
    return draw(_alphas(alphas), convention, margin)


@figure
def class_probabilities(
    teachers: "TeacherOptions", split: OfSplit = "val", classes: Classes = None, first: First = 100
) -> "Drawing | None":
    """Fig. 4 (1): mean probability that each class's samples give to their own class."""
    from lskd_study.drawing.class_means import major_figure

    means = _class_means(teachers, split, classes, first)
    return major_figure(means) if means else None


@figure
def minor_probabilities(
    teachers: "TeacherOptions",
    split: OfSplit = "val",
    classes: Classes = None,
    first: First = 100,
    log: Annotated[bool, typer.Option("--log", help="Logarithmic axis of probabilities.")] = False,
) -> "Drawing | None":
    """Fig. 4 (2): the mean probabilities of the other classes, enlarged."""
    from lskd_study.drawing.class_means import minor_figure

    means = _class_means(teachers, split, classes, first)
    return minor_figure(means, log) if means else None


@figure
def teacher_student(
    table: Table = None,
    paper: Annotated[bool, typer.Option("--paper", help="Draw the paper's own Table 8.")] = False,
    teacher_column: Annotated[str, typer.Option(help="Teacher's accuracy.")] = "teacher_top1_mean",
    student_column: Annotated[str, typer.Option(help="Student's accuracy.")] = "student_top1_mean",
    name_column: Annotated[str, typer.Option(help="Teacher's name.")] = "teacher",
    group_column: Annotated[str, typer.Option(help="Student's name.")] = "student",
    smoothing_column: Annotated[
        str, typer.Option(help="Teacher's smoothing, or true and false.")
    ] = "smoothing",
    study: Folders = None,
) -> "Drawing":
    """Fig. 8 (left): students' accuracy against their teachers', from studies, their table.csv or any CSV."""
    from lskd_study.drawing import scatter as drawn

    _check_source(table, paper, study)
    if study:
        return _of_studies(study, "figure8", "no teacher with a student, or too few teachers")
    columns = (teacher_column, student_column, name_column, group_column, smoothing_column)
    return drawn.teacher_student_figure(drawn.table_pairs(table, *columns) if table else drawn.paper_pairs())


@figure
def accuracy_stability(study: Annotated[list[Path], Folder]) -> "Drawing":
    """Teachers' 1-S against their accuracy (Table 1, Sec. 5), from studies."""
    return _of_studies(study, "accuracy_stability", "too few teachers")


@figure
def class_count(
    table: Table = None,
    paper: Annotated[bool, typer.Option("--paper", help="Draw the paper's own Table 4.")] = False,
    classes_column: Annotated[str, typer.Option(help="Number of classes.")] = "classes",
    network_column: Annotated[str, typer.Option(help="Network.")] = "teacher",
    smoothing_column: Annotated[str, typer.Option(help="Smoothing, or true and false.")] = "smoothing",
    accuracy_column: Annotated[str, typer.Option(help="Accuracy.")] = "teacher_top1_mean",
    study: Folders = None,
) -> "Drawing":
    """Fig. 9: what smoothing gains by the number of classes, from studies or any CSV table."""
    from lskd_study.drawing import class_count as drawn

    _check_source(table, paper, study)
    if study:
        return _of_studies(study, "figure9", "no teacher with and without smoothing")
    columns = (classes_column, network_column, smoothing_column, accuracy_column)
    return drawn.class_count_figure(
        drawn.table_accuracies(table, *columns) if table else drawn.paper_accuracies()
    )


def _check_source(table: Path | None, paper: bool, study: Sequence[Path] | None) -> None:
    if study and (table is not None or paper):
        raise LskdError("--study is another source than --table and --paper; give one")
    if not study and (table is None) != paper:
        raise LskdError(
            "name studies with --study, a table of results with --table, or the paper's own with --paper"
        )


def _of_studies(
    folders: list[Path], name: Literal["figure8", "accuracy_stability", "figure9"], nothing: str
) -> "Drawing":
    from lskd_study.pages import paper_figures

    studies = paper_figures.read_studies(folders)
    drawn: paper_figures.PageFigure | None = getattr(paper_figures, name)(studies)
    if drawn is None:
        raise LskdError(f"nothing to draw: {nothing}; name other studies, or wait for their runs")
    return drawn.drawing


def _class_means(
    options: "TeacherOptions", split: "Split", classes: str | None, first: int
) -> "list[ClassMeans] | None":
    from lskd_study.drawing.class_means import measure_class_means
    from lskd_study.drawing.inputs import class_names, read_splits, resolve_classes, split_names

    if classes is not None:
        split_names(classes)
    splits = read_splits(options, [split], features=False, classes=classes)
    if splits is None:
        return None
    teachers = splits[split]
    names = class_names(teachers[0])
    chosen = resolve_classes(classes, names) if classes is not None else list(range(min(first, len(names))))
    return [measure_class_means(teacher, chosen) for teacher in teachers]


def _alphas(text: str) -> list[float]:
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value < 1:
            raise LskdError(f"--alphas: {part.strip()!r} is no smoothing; it takes numbers from 0 to below 1")
        if value in values:
            raise LskdError(f"--alphas names {value!r} twice; name each once")
        values.append(value)
    return values
