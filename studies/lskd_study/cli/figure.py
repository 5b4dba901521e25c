"""``lskd figure``: the paper's figures from any teachers or table of results."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lskd import LskdError

if TYPE_CHECKING:
    from lskd_study.drawing.inputs import Split, TeacherOptions
    from lskd_study.drawing.style import Drawing
    from lskd_study.teachers.outputs import Outputs

app = typer.Typer(
    help="Draw the paper's figures from teachers or tables: PNG, SVG, and the numbers as CSV.",
    no_args_is_help=True,
)

TEACHERS, DATA = "Teachers", "What models are asked about"
_FILES = "npz, safetensors or parquet; repeat for several teachers"
OutputsFiles = Annotated[
    list[Path] | None,
    typer.Option("--outputs", help=f"A teacher's saved outputs: {_FILES}.", rich_help_panel=TEACHERS),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="Model of timm, or torchvision:NAME, with --data-dir. Repeat.",
        rich_help_panel=TEACHERS,
    ),
]
Checkpoints = Annotated[
    list[Path] | None,
    typer.Option(
        "--checkpoint",
        help="Weights, one for each --model; without any, timm's pretrained weights.",
        rich_help_panel=TEACHERS,
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--name", help="What the figure calls them, one for each teacher.", rich_help_panel=TEACHERS
    ),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of images by class.", rich_help_panel=DATA)
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, rich_help_panel=DATA)]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Loading processes.", rich_help_panel=DATA)]
Device = Annotated[str | None, typer.Option("--device", help="e.g. cuda or cpu.", rich_help_panel=DATA)]
ImageSize = Annotated[
    int | None,
    typer.Option("--img-size", min=1, help="Instead of the run's or model's own.", rich_help_panel=DATA),
]
Output = Annotated[Path, typer.Option("--output", help="Beginning of the files' names.")]
Folders = Annotated[
    list[Path] | None, typer.Option("--study", help="Output folder of `lskd study`; repeat for several.")
]
Table = Annotated[Path | None, typer.Option("--table", help="CSV table of results.")]


@app.command()
def projection(
    outputs: OutputsFiles = None,
    train_outputs: Annotated[
        list[Path] | None,
        typer.Option(
            help="The same teachers on the training data, in their order.", rich_help_panel=TEACHERS
        ),
    ] = None,
    model: Models = None,
    checkpoint: Checkpoints = None,
    name: Names = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    device: Device = None,
    img_size: ImageSize = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Three names or ids with commas: the similar pair first. Proposed if left out."),
    ] = None,
    propose: Annotated[
        bool, typer.Option("--propose", help="Choose the classes by what the teachers confuse.")
    ] = False,
    replicates: Annotated[int, typer.Option(min=100, help="Bootstrap draws for the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    output: Output = Path("figures/projection"),
) -> None:
    """Fig. 1: activations of three classes in the plane of their templates; D1, D2 and Dc measured."""
    from lskd_study.drawing import projection as figure
    from lskd_study.drawing.inputs import (
        TeacherOptions,
        check_class_list,
        class_names,
        read_splits,
        resolve_classes,
    )
    from lskd_study.drawing.inputs import propose as propose_classes

    if propose and classes is not None:
        raise LskdError("--propose and --classes both choose the classes; leave out one")
    if classes is not None:
        check_class_list(classes, 3)
    options = TeacherOptions(
        outputs=outputs or [],
        train_outputs=train_outputs or [],
        models=model or [],
        checkpoints=checkpoint or [],
        names=name or [],
        data_dir=data_dir,
        batch_size=batch_size,
        workers=workers,
        device=device,
        img_size=img_size,
    )
    stem = _stem(output)
    splits = read_splits(options, ["train", "val"], features=True, classes=classes)
    if splits is None:
        return
    for split in splits:
        for teacher in split.teachers:
            figure.check_features(teacher, split.name)
    for others in splits[1:]:
        for first, second in zip(splits[0].teachers, others.teachers, strict=True):
            figure.check_splits(first, second, (splits[0].name, others.name))
    teachers = splits[-1].teachers
    if classes is not None:
        chosen = resolve_classes(classes, class_names(teachers[0]))
    else:
        proposal = propose_classes(teachers)
        print(f"classes: {proposal.reason}")
        chosen = list(proposal.classes)
    panels = [
        figure.measure_projection(teacher, split.name, chosen, replicates, seed)
        for split in splits
        for teacher in split.teachers
    ]
    _write(figure.projection_figure(panels), stem)


@app.command()
def smoothing_loss(
    alphas: Annotated[str, typer.Option(help="Smoothing values with commas.")] = "0,0.05,0.1,0.2,0.3",
    convention: Annotated[
        Literal["paper", "uniform"], typer.Option(help="paper: 1 - alpha and alpha; uniform: alpha / 2.")
    ] = "paper",
    margin: Annotated[float, typer.Option(help="Largest margin drawn.")] = 8.0,
    output: Output = Path("figures/smoothing-loss"),
) -> None:
    """Fig. 3: what smoothing does to the binary logistic loss."""
    from lskd_study.drawing.class_means import smoothing_loss as draw

    if not 0 < margin <= 1e4:
        raise LskdError(f"--margin is {margin:g}; it must be a number above 0 and at most 10,000")
    values = _alphas(alphas)
    stem = _stem(output)
    _write(draw(values, convention, margin), stem)


@app.command()
def class_probabilities(
    outputs: OutputsFiles = None,
    model: Models = None,
    checkpoint: Checkpoints = None,
    name: Names = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    device: Device = None,
    img_size: ImageSize = None,
    split: Annotated[
        Literal["train", "val"], typer.Option(help="Of the data.", rich_help_panel=DATA)
    ] = "val",
    classes: Annotated[str | None, typer.Option(help="Names or ids with commas.")] = None,
    first: Annotated[int, typer.Option(min=1, help="Else as many classes from the first on.")] = 100,
    output: Output = Path("figures/class-probabilities"),
) -> None:
    """Fig. 4 (1): mean probability that each class's samples give to their own class."""
    from lskd_study.drawing.class_means import major_figure, measure_class_means
    from lskd_study.drawing.inputs import TeacherOptions

    options = TeacherOptions(
        outputs=outputs or [],
        train_outputs=[],
        models=model or [],
        checkpoints=checkpoint or [],
        names=name or [],
        data_dir=data_dir,
        batch_size=batch_size,
        workers=workers,
        device=device,
        img_size=img_size,
    )
    stem = _stem(output)
    found = _class_inputs(options, split, classes, first)
    if found is not None:
        teachers, chosen = found
        _write(major_figure([measure_class_means(teacher, chosen) for teacher in teachers]), stem)


@app.command()
def minor_probabilities(
    outputs: OutputsFiles = None,
    model: Models = None,
    checkpoint: Checkpoints = None,
    name: Names = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    device: Device = None,
    img_size: ImageSize = None,
    split: Annotated[
        Literal["train", "val"], typer.Option(help="Of the data.", rich_help_panel=DATA)
    ] = "val",
    classes: Annotated[str | None, typer.Option(help="Names or ids with commas.")] = None,
    first: Annotated[int, typer.Option(min=1, help="Else as many classes from the first on.")] = 100,
    log: Annotated[bool, typer.Option("--log", help="Logarithmic axis of probabilities.")] = False,
    output: Output = Path("figures/minor-probabilities"),
) -> None:
    """Fig. 4 (2): the mean probabilities of the other classes, enlarged."""
    from lskd_study.drawing.class_means import measure_class_means, minor_figure
    from lskd_study.drawing.inputs import TeacherOptions

    options = TeacherOptions(
        outputs=outputs or [],
        train_outputs=[],
        models=model or [],
        checkpoints=checkpoint or [],
        names=name or [],
        data_dir=data_dir,
        batch_size=batch_size,
        workers=workers,
        device=device,
        img_size=img_size,
    )
    stem = _stem(output)
    found = _class_inputs(options, split, classes, first)
    if found is not None:
        teachers, chosen = found
        _write(minor_figure([measure_class_means(teacher, chosen) for teacher in teachers], log), stem)


@app.command()
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
    output: Output = Path("figures/teacher-student"),
) -> None:
    """Fig. 8 (left): students' accuracy against their teachers', from studies, their table.csv or any CSV."""
    from lskd_study.drawing import scatter as figure

    if study:
        _no_other(table, paper)
        _write_studies(study, "figure8", "no teacher with a student, or too few teachers", output)
        return
    source = _source(table, paper)
    stem = _stem(output)
    columns = (teacher_column, student_column, name_column, group_column, smoothing_column)
    pairs = figure.paper_pairs() if source is None else figure.table_pairs(source, *columns)
    _write(figure.teacher_student_figure(pairs), stem)


@app.command()
def accuracy_stability(
    study: Annotated[
        list[Path], typer.Option("--study", help="Output folder of `lskd study`; repeat for several.")
    ],
    output: Output = Path("figures/accuracy-stability"),
) -> None:
    """Teachers' 1-S against their accuracy (Table 1, Sec. 5), from studies."""
    _write_studies(study, "accuracy_stability", "too few teachers", output)


@app.command()
def class_count(
    table: Table = None,
    paper: Annotated[bool, typer.Option("--paper", help="Draw the paper's own Table 4.")] = False,
    classes_column: Annotated[str, typer.Option(help="Number of classes.")] = "classes",
    network_column: Annotated[str, typer.Option(help="Network.")] = "teacher",
    smoothing_column: Annotated[str, typer.Option(help="Smoothing, or true and false.")] = "smoothing",
    accuracy_column: Annotated[str, typer.Option(help="Accuracy.")] = "teacher_top1_mean",
    study: Folders = None,
    output: Output = Path("figures/class-count"),
) -> None:
    """Fig. 9: what smoothing gains by the number of classes, from studies or any CSV table."""
    from lskd_study.drawing import class_count as figure

    if study:
        _no_other(table, paper)
        _write_studies(study, "figure9", "no teacher with and without smoothing", output)
        return
    source = _source(table, paper)
    stem = _stem(output)
    columns = (classes_column, network_column, smoothing_column, accuracy_column)
    found = figure.paper_accuracies() if source is None else figure.table_accuracies(source, *columns)
    _write(figure.class_count_figure(found), stem)


def _no_other(table: Path | None, paper: bool) -> None:
    if table is not None or paper:
        raise LskdError("--study is another source than --table and --paper; give one")


def _write_studies(
    folders: list[Path],
    name: Literal["figure8", "accuracy_stability", "figure9"],
    nothing: str,
    output: Path,
) -> None:
    from lskd_study.pages import paper_figures as page_figures

    stem = _stem(output)
    drawn: page_figures.PageFigure | None = getattr(page_figures, name)(page_figures.read_studies(folders))
    if drawn is None:
        raise LskdError(f"nothing to draw: {nothing}; name other studies, or wait for their runs")
    _write(drawn.drawing, stem)


def _class_inputs(
    options: "TeacherOptions", split: "Split", classes: str | None, first: int
) -> "tuple[list[Outputs], list[int]] | None":
    from lskd_study.drawing.inputs import check_class_list, class_names, read_splits, resolve_classes

    if classes is not None:
        check_class_list(classes)
    splits = read_splits(options, [split], features=False, classes=classes)
    if splits is None:
        return None
    teachers = splits[0].teachers
    names = class_names(teachers[0])
    chosen = resolve_classes(classes, names) if classes is not None else list(range(min(first, len(names))))
    return teachers, chosen


def _source(table: Path | None, paper: bool) -> Path | None:
    if (table is None) != paper:
        raise LskdError("name a table of results with --table, or ask for the paper's own with --paper")
    return table


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


def _stem(output: Path) -> Path:
    from lskd_study.drawing.style import check_writable, figure_stem

    stem = figure_stem(output)
    check_writable(stem)
    return stem


def _write(drawing: "Drawing", stem: Path) -> None:
    from lskd_study.drawing.style import write_drawing

    for path in write_drawing(drawing, stem):
        print(path)
