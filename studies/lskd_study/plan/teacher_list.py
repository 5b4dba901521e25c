"""A list of teachers as a file, for ``lskd stability --list``: the paper's Tables 1 and 10."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from lskd import LskdError
from lskd.base.files import read_yaml
from lskd_study.paper.printed import load_tables
from lskd_study.plan.schema import Alpha, Name, Strict, Temperature, load


def _a_row(name: str) -> str:
    rows = [row.name for row in load_tables()["Table 1"].rows]
    if name not in rows:
        raise ValueError(f"is no row of the paper's Table 1; its rows are {', '.join(rows)}")
    return name


class Tolerance(Strict):
    """How far the measured values of public weights may be from the paper's to count as reproduced."""

    accuracy: float = Field(gt=0, description="percentage points")
    one_minus_s: float = Field(gt=0, description="1 - S, the paper's stability")


class TeacherEntry(Strict):
    """One teacher: a model and its weights, or stored logits."""

    name: Name = Field(description="in the tables")
    model: Name | None = Field(default=None, description="timm's name, or torchvision:NAME")
    config: Name | None = Field(default=None, description="a configuration file of mmcls")
    checkpoint: Name | None = Field(default=None, description="its weights")
    logits: Name | None = Field(default=None, description="stored logits and labels instead of a model")
    network: Annotated[Name, AfterValidator(_a_row)] | None = Field(
        default=None, description="the paper's row in Tables 1 and 10"
    )
    smoothing: Alpha | None = Field(default=None, description="that it was trained with")
    tolerance: Tolerance | None = Field(default=None, description="within which the row counts as reproduced")

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherEntry":
        given = [name for name in ("model", "config", "logits") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of model, config and logits")
        if self.logits is not None and self.checkpoint is not None:
            raise ValueError("stored logits need no checkpoint; give one of them")
        if (self.network is not None or self.tolerance is not None) and self.smoothing is None:
            raise ValueError("a row of the paper has two sides; say smoothing: 0 or what it was trained with")
        if self.tolerance is not None and self.network is None:
            raise ValueError("tolerance is for a row of the paper; name it as network")
        return self


def _distinct_names(teachers: list[TeacherEntry]) -> list[TeacherEntry]:
    names = [teacher.name for teacher in teachers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two teachers are called {twice[0]!r}; give each a name of its own")
    return teachers


class EvaluationData(Strict):
    """What the models are asked about."""

    path: Name = Field(description="folder of images, relative to where the command runs")
    split: Name = Field("validation", description="name of the split's folder")


class TeacherList(Strict):
    """Teachers to be measured side by side."""

    kind: Literal["stability"] = Field(description="says that the file is a list of teachers")
    title: Name = Field(description="heading of the page")
    data: EvaluationData | None = Field(default=None, description="what the models are asked about")
    output: Name = Field(description="folder of results, relative to where the command runs")
    temperatures: Annotated[
        list[Temperature],
        Field(min_length=1, default=[1.0], description="at which stability is measured; 1 in the paper"),
    ]
    teachers: Annotated[
        list[TeacherEntry],
        Field(min_length=1, description="models and their weights, or stored logits"),
        AfterValidator(_distinct_names),
    ]


def load_teachers(path: Path) -> TeacherList:
    """Read and validate a list of teachers.

    Raises:
        LskdError: one line that names the file, the line in it and what is wrong.
    """
    content = read_yaml(path)
    if isinstance(content, Mapping) and "seeds" in content and "kind" not in content:
        raise LskdError(f"{path} is a study, not a list of teachers; run it with `lskd study {path}`")
    return load(path, TeacherList, "a list of teachers is a mapping with kind, title, output and teachers")


def is_teacher_list(path: Path) -> bool:
    """Return whether a study file is a list of teachers; what cannot be read is none, said elsewhere."""
    try:
        content = read_yaml(path)
    except LskdError:
        return False
    return isinstance(content, Mapping) and content.get("kind") == "stability"
