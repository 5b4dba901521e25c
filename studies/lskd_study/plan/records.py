"""The JSON that a study leaves beside its results: each kind is validated by one model when it is read."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lskd import LskdError
from lskd.base.files import read_json
from lskd_study.base.text import first_problem


class Record(BaseModel):
    """What is read of a file; it may contain more, and a later version's file does."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Taught(Record):
    checkpoint_sha256: str


class _Checkpoint(Record):
    sha256: str


class _StoredLabels(Record):
    bytes: int


class Begun(Record):
    """``begun.json``: what a run or a store was begun as, and how often it was gone on with."""

    settings: dict[str, Any] = {}
    teacher: _Taught | None = None
    resumed: int = Field(0, ge=0)


class MadeRun(Record):
    """``job.json`` of a run, as far as other runs depend on it."""

    teacher: _Taught | None = None
    checkpoint: _Checkpoint | None = None


class MadeStore(Record):
    """``job.json`` of a store."""

    teacher: _Taught
    soft_labels: _StoredLabels | None = None  # of one that failed there are none
    wall_time_s: float


class _TrainingData(Record):
    path: str
    sha256: str


class _Code(Record):
    commit: str
    modified: bool


class _Machine(Record):
    cpu: str
    cores: int
    gpus: list[str]


class Size(Record):
    """How large a network is.

    Attributes:
        parameters: their number.
        operations: floating-point ones for one image forward, a multiply-add is two; None where unknown. Of
            64 binary multiply-adds one counts, as a machine word has so many.
        binary: of the parameters, those of one bit.
        file_bytes: of the weights as they are deployed, those of one bit packed; None where unknown.
        image_ms: of one image forward, deployed, on the CPU of the run and its threads; None where unknown.
    """

    parameters: int
    operations: int | None = None
    binary: int = 0
    file_bytes: int | None = None
    image_ms: float | None = None


class Job(MadeRun):
    """``job.json`` of a finished run, as tables and page show it."""

    run: str
    command: str
    rerun_command: str = ""
    environment: dict[str, str]
    data: _TrainingData
    versions: dict[str, str]
    git: _Code | None
    hardware: _Machine
    finished: str
    wall_time_s: float
    resumed: int
    size: Size | None = None  # of earlier versions, and of failed runs, there is none


def read_record(path: Path, kind: type[Record]) -> dict[str, Any]:
    """Return what such a file says, with what the model does not know; empty where there is no file.

    Raises:
        LskdError: it is damaged, or of another version.
    """
    if not path.exists():
        return {}
    content = read_json(path, f"what `lskd study` writes as {path.name}")
    try:
        kind.model_validate(content)
    except ValidationError as error:
        raise LskdError(f"{path} is damaged or of another version ({first_problem(error)})") from error
    found: dict[str, Any] = content
    return found
