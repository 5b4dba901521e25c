"""The study file: what may stand in it. Errors name the file, the line and the nearest valid key."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from lskd import LskdError
from lskd.base.files import read_yaml, read_yaml_nodes
from lskd.base.trackers import TrackerName
from lskd_study.base.text import did_you_mean
from lskd_study.data.options import TEXT, Value, known_classes, problem
from lskd_study.plan.kinds import TRANSLATION, Control, Ecosystem, kind_of
from lskd_study.plan.matching import OF_STUDENTS, OF_TEACHERS, problem_of_table
from lskd_study.plan.plan import STUDENT_STRIDE
from lskd_study.stats.moderated import FEWEST

Content = TypeVar("Content", bound=BaseModel)

# Set by the study itself for every run, so a trainer's file may not set them.
RESERVED = frozenset(
    (
        *("data_dir", "dataset", "model", "num_classes", "output", "experiment", "resume", "seed"),
        *("smoothing", "smoothing_convention", "kd_teacher", "kd_teacher_checkpoint"),
        *("kd_hard_weight", "kd_temperature", "kd_temperature_squared"),
    )
)


class Strict(BaseModel):
    """A mapping without unknown keys or conversions of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _distinct(values: list[Any]) -> list[Any]:
    repeated = sorted({str(value) for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} given twice; each value once")
    return values


def _with_baseline(values: list[float]) -> list[float]:
    if len(values) < 2:
        raise ValueError("a study compares at least two smoothing values, e.g. [0, 0.1]")
    return values


Alpha = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
HardWeight = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1)]
# Checked by hand, for an error that names the nearest; the list is for editors.
PapersTable = Annotated[str, Field(json_schema_extra={"enum": [*OF_TEACHERS, *OF_STUDENTS]})]
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]

# The commands of `lskd data`: of image folders, then of text.
Prepare = Literal[
    "cub200",
    "digits",
    "fashion-mnist",
    "imagenet",
    "imagenet-lt",
    "imagenet-subset",
    "imaterialist",
    "inat2019",
    "long-tail",
    "noise",
    "places-lt",
    "split",
    "subset",
    "ding",
    "iwslt14",
    "number-words",
]

Item = TypeVar("Item")
# For editors; _distinct says which one is there twice.
UNIQUE = Field(json_schema_extra={"uniqueItems": True})
Distinct = Annotated[list[Item], Field(min_length=1), UNIQUE, AfterValidator(_distinct)]


class Data(Strict):
    """An image folder with ``train/<class>/`` and ``val/<class>/``, or fairseq's data-bin."""

    path: Name = Field(description="folder of images or data-bin, relative to where the command runs")
    num_classes: int | None = Field(None, ge=2, description="of images")
    prepare: Prepare | None = Field(default=None, description="made by this `lskd data` command when absent")
    options: dict[OptionName, Value] = Field(
        default_factory=dict, description="of that command, without the dashes; its argument is `source`"
    )


class Smoothing(Strict):
    """The arms: label-smoothing values of the teachers; the smallest is the baseline."""

    values: Annotated[Distinct[Alpha], AfterValidator(_with_baseline)] = Field(
        description="0 or more and below 1; at least two",
        json_schema_extra={"minItems": 2, "uniqueItems": True},
    )
    convention: Literal["paper", "uniform"] = Field(
        "paper",
        description="paper: Eq. 1, alpha / (K - 1) to every other class; uniform: alpha / K to every one",
    )


class Network(Strict):
    """A teacher or a student: a model and the trainer's own configuration file."""

    model: Name = Field(
        description="timm's name; fairseq: model._name; mmcls' students: a name for the tables"
    )
    config: Name = Field(description="the trainer's own YAML file, relative to the study file")


class Resources(Strict):
    """What one run asks of the scheduler."""

    threads: int = Field(1, ge=1, description="CPU cores")
    extra: dict[str, int | str] = Field(
        default_factory=dict, description="passed on to Snakemake, e.g. mem_mb"
    )


def _switch(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare off as false


class SoftLabels(Strict):
    """A teacher asked once for all of its students; see docs/study.md."""

    mode: Annotated[Literal["auto", "off", "always"], BeforeValidator(_switch)] = Field(
        "auto", description="auto: where that changes no result and the disk has room"
    )
    top_k: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        "all", description="entries kept of each answer; fewer than all change the loss"
    )
    sampled: Annotated[int, Field(ge=1)] | None = Field(
        None, description="entries drawn of each answer instead, right in expectation; at temperature 1"
    )
    rest: Literal["spread", "lump", "renormalise", "restrict"] | None = Field(
        None,
        description="what becomes of the entries beyond top_k; default: spread; translations: the file's",
    )
    values: Literal["float32", "float16", "packed"] | None = Field(
        None, description="default: float32 with all entries, float16 with top_k or sampled"
    )
    views: Annotated[int, Field(ge=1)] | None = Field(
        None, description="views stored of each image, read in turn; default: a view an epoch"
    )
    limit_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        20.0, description="auto: most that all stores may take, in GB"
    )
    keep: bool = Field(False, description="keep them when all their students are finished")


class PublishedFigure(Strict):
    """What others measured of one kind of student: accuracies in percent."""

    student: Name = Field(description="a model of `students`")
    teacher: Name | None = Field(None, description="a model of `teachers`; may be left out if there is one")
    smoothing: Alpha = Field(description="one of `smoothing.values`")
    temperature: Temperature = Field(1.0, description="one of `temperatures`")
    hard_weight: HardWeight = Field(0.0, description="one of `hard_weights`")
    top1: float = Field(ge=0, le=100, description="the student's, in percent")


class Published(Strict):
    """Figures of another publication, shown beside the study's own."""

    source: Name = Field(description="authors, title, place and year")
    figures: Annotated[list[PublishedFigure], Field(min_length=1, description="one for each kind of student")]


class Study(Strict):
    """A study: {smoothing} x {seeds} x {teachers} x {students} x {temperatures} x {hard weights}."""

    title: Name = Field(description="heading of the page")
    ecosystem: Ecosystem = Field(
        "timm", description="mmcls: timm's teachers, mmcls' students; fairseq: translation"
    )
    data: Data = Field(description="what is trained and evaluated on")
    output: Name = Field(description="folder of results, relative to where the command runs")
    smoothing: Smoothing = Field(description="of the teachers' labels: the arms that are compared")
    seeds: Distinct[Seed] = Field(description="one run each; two or more for a verdict")
    student_seeds: int = Field(
        1, ge=1, le=100, description="students (and controls) of each kind for one seed of their teacher"
    )
    teachers: Annotated[list[Network], Field(min_length=1, description="trained with every smoothing value")]
    students: list[Network] = Field(default=[], description="none: teachers are trained and compared alone")
    controls: Annotated[list[Control], UNIQUE, AfterValidator(_distinct)] = Field(
        default=[],
        description="students without a teacher: hard, on the labels; smoothed, on labels smoothed as the "
        "teachers' are; real (mmcls): on the labels, weights and activations not binary",
    )
    temperatures: Distinct[Temperature] = Field(
        [1.0], description="that logits are divided by; 1 in the paper"
    )
    hard_weights: Distinct[HardWeight] = Field(
        [0.0], description="weight of the labels in the students' loss; 0 in the paper, 0.1 in translation"
    )
    last_epochs: int = Field(
        1, ge=1, description="accuracy (top-1) is the mean over so many last epochs, after the last decay"
    )
    pool_seed_variance: bool = Field(
        False,
        description="the variance between seeds is pooled over smoothing values, temperatures, hard weights",
    )
    temperature_squared: bool = Field(False, description="the soft term times T^2 (Hinton et al., 2015)")
    soft_labels: SoftLabels = Field(
        default_factory=lambda: SoftLabels.model_validate({}),
        description="each teacher asked once, for all of its students",
    )
    margin: float = Field(
        0.2,
        gt=0,
        allow_inf_nan=False,
        description="points of top-1 accuracy: a model that much worse is as good",
    )
    note: str = Field("", description="what the page says above the verdict, e.g. what was cut and why")
    tracker: TrackerName | None = Field(
        None, description="where the curves of runs are logged too, while they train; only wandb sends them"
    )
    resources: Resources = Field(Resources(threads=1), description="what one run asks of the scheduler")
    paper: PapersTable | list[PapersTable] = Field(
        default=[], description="tables and figures of the paper that the study reproduces, e.g. Table 8"
    )
    published: Published | None = Field(None, description="figures of another publication, beside the own")

    @property
    def papers_tables(self) -> list[str]:
        """The names in ``paper``, one or several."""
        return [self.paper] if isinstance(self.paper, str) else list(dict.fromkeys(self.paper))

    @model_validator(mode="before")
    @classmethod
    def _labels_share_in_translation(cls, content: Any) -> Any:
        # Images are taught by soft labels alone; translation keeps the labels, with the share of Tan et al.
        if isinstance(content, dict) and kind_of(content.get("ecosystem", "")) is TRANSLATION:
            return {"hard_weights": [0.1], **content}
        return content

    @model_validator(mode="after")
    def _data_of_the_ecosystem(self) -> Self:
        data, translation = self.data, kind_of(self.ecosystem) is TRANSLATION
        if data.num_classes is None and not translation:
            raise _error(None, data, "data", "num_classes")
        if data.num_classes is not None and translation:
            message = "a fairseq study has no classes; remove it"
            raise _error(message, data.num_classes, "data", "num_classes")
        if translation and not self.students:
            raise _error("a fairseq study needs students; list at least one", self.students, "students")
        if data.prepare is None:
            if data.options:
                message = "they belong to data.prepare, which is not given"
                raise _error(message, data.options, "data", "options")
            return self
        if (data.prepare in TEXT) != translation:
            commands = [name for name in get_args(Prepare) if (name in TEXT) == translation]
            message = f"it makes no data for {self.ecosystem}, which takes {', '.join(commands)}"
            raise _error(message, data.prepare, "data", "prepare")
        if found := problem(data.prepare, data.options):
            where, message = found
            raise _error(message, data.options, "data", "options", *where)
        classes = known_classes(data.prepare, data.options)
        if data.num_classes is not None and classes not in (None, data.num_classes):
            message = f"`lskd data {data.prepare}` makes {classes} classes; fix one of them"
            raise _error(message, data.num_classes, "data", "num_classes")
        return self

    @model_validator(mode="after")
    def _known_beside_the_own(self) -> Self:
        for name in self.papers_tables:
            if message := problem_of_table(name, bool(self.students)):
                raise _error(message, name, "paper")
        if kind_of(self.ecosystem) is TRANSLATION and (self.paper or self.published):
            message = "the figures are accuracies, of images; remove it"
            raise _error(message, self.ecosystem, "paper" if self.paper else "published")
        if kind_of(self.ecosystem) is TRANSLATION and self.last_epochs > 1:
            message = "a translation model is that of its best epoch by validation BLEU; remove it"
            raise _error(message, self.last_epochs, "last_epochs")
        matrix: dict[str, list[Any]] = {
            "student": [network.model for network in self.students],
            "teacher": [network.model for network in self.teachers],
            "smoothing": self.smoothing.values,
            "temperature": self.temperatures,
            "hard_weight": self.hard_weights,
        }
        if self.controls and not self.students:
            message = "a control is a student's network, and the study has no students; remove it"
            raise _error(message, self.controls, "controls")
        settings = len(self.smoothing.values) - 1
        settings *= len(self.temperatures) * len(self.hard_weights) if self.students else 1
        if self.pool_seed_variance and min(settings, len(self.seeds)) < FEWEST:
            message = (
                f"it takes {FEWEST} seeds and {FEWEST} settings (smoothing values, temperatures, hard "
                f"weights), the study has {len(self.seeds)} and {settings}; add some, or remove it"
            )
            raise _error(message, True, "pool_seed_variance")
        if self.student_seeds > 1 and not self.students:
            message = "they are of students, and the study has none; remove it"
            raise _error(message, self.student_seeds, "student_seeds")
        if self.student_seeds > 1 and max(self.seeds) >= STUDENT_STRIDE:
            message = (
                f"with student_seeds they must be below {STUDENT_STRIDE:,}, the step to the next student"
            )
            raise _error(message, self.seeds, "seeds")
        if "real" in self.controls and self.ecosystem != "mmcls":
            message = "only mmcls' students are binary, so that a real-valued one is another; remove real"
            raise _error(message, self.controls, "controls")
        for index, figure in enumerate(self.published.figures if self.published else ()):
            for key, known in matrix.items():
                given = getattr(figure, key)
                if given not in known and not (given is None and len(known) == 1):
                    message = f"the study has no such {key}; it has {', '.join(map(str, known))}"
                    raise _error(message, given, "published", "figures", index, key)
        return self


def _error(message: str | None, value: object, *place: str | int) -> ValidationError:
    """Return an error with a place in the file, which a validator's own ValueError does not have.

    ``message``: None where something is missing.
    """
    kind = "missing" if message is None else PydanticCustomError("refused", message)
    details = InitErrorDetails(type=kind, loc=place, input=value)
    return ValidationError.from_exception_data("Study", [details])


def load_study(path: Path) -> Study:
    """Read and validate a study file.

    Raises:
        LskdError: one line that names the file, the line in it and what is wrong.
    """
    return load(path, Study, "a study file is a mapping of keys such as title, data, smoothing, seeds")


def load(path: Path, model: type[Content], what: str) -> Content:
    """Read a YAML file and validate it; ``what`` says what it should be where it is no mapping.

    Raises:
        LskdError: one line that names the file, the line in it and what is wrong.
    """
    root, content = read_yaml_nodes(path, "study file")
    if not isinstance(root, yaml.MappingNode):
        raise LskdError(f"{path}: {what}")
    return validated(content, model, str(path), _line_numbers(root, path))


def validated(
    content: Any, model: type[Content], name: str, lines: dict[tuple[Any, ...], int] | None = None
) -> Content:
    """Validate what a file says, or would say; ``lines``: where in the file called ``name`` each key stands.

    Raises:
        LskdError: one line that names the file, the line in it and what is wrong.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise LskdError(_one_line(error, name, lines or {}, model)) from error


def read_trainer_config(path: Path, reserved: frozenset[str] = RESERVED) -> dict[str, Any]:
    """Read a trainer's own YAML file; a key of ``reserved``, which the study sets itself, is an error.

    Raises:
        LskdError: for a file that is missing, not a YAML mapping or that sets a reserved key.
    """
    content = read_yaml(path, "trainer's file")
    try:
        kept = json.loads(json.dumps(content, allow_nan=False)) == content  # as the plan will contain it
    except (TypeError, ValueError):
        kept = False
    if not isinstance(content, dict):
        raise LskdError(f"{path} is not a mapping of the trainer's options")
    if not kept:
        fix = "put keys such as 1, on and ~ in quotes, and leave out dates, tags (!!omap), .inf and .nan"
        raise LskdError(f"{path} contains more than numbers, text, lists and mappings of names; {fix}")
    taken = sorted(reserved & {str(key).replace("-", "_") for key in content})
    if taken:
        raise LskdError(f"{path} sets {', '.join(taken)}, which the study sets for each run; remove it there")
    return content


def _line_numbers(node: yaml.Node, path: Path, prefix: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    lines = {prefix: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*prefix, key.value)
            if here in lines:
                raise LskdError(
                    f"{path}:{key.start_mark.line + 1}: key {key.value!r} is given twice; keep one"
                )
            lines.update(_line_numbers(value, path, here))
            lines[here] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines.update(_line_numbers(value, path, (*prefix, index)))
    return lines


def _one_line(
    error: ValidationError, name: str, lines: dict[tuple[Any, ...], int], root: type[BaseModel]
) -> str:
    first = min(
        error.errors(), key=lambda item: (item["type"] != "extra_forbidden", _line(item["loc"], lines))
    )
    location, key = first["loc"], str(first["loc"][-1])
    where = f"{name}:{_line(location, lines)}" if lines else name
    name = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(location, root)
        hint = did_you_mean(key, valid, f"valid here: {', '.join(valid)}")
        return f"{where}: unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"{where}: {name!r} is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | list) else f" (given: {first['input']!r})"
    return f"{where}: {name}: {message[0].lower()}{message[1:]}{given}"


def _line(location: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> int:
    while location and location not in lines:
        location = location[:-1]
    return lines.get(location, 0)


def _valid_keys(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    model = root
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
            model = next(a for a in inner if issubclass(a, BaseModel))
    return list(model.model_fields)
