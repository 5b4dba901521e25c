"""The plan of a study: every run of the matrix, and where it lives below the output folder.

The plan is written once, as ``plan.json`` in the output folder, and read by Snakemake and by every job, so
that all of them (on any machine that sees the folder) agree on names and settings.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lskd import LskdError
from lskd.base.files import read_json, write_text
from lskd.base.trackers import TrackerName
from lskd_study.base.files import read_object
from lskd_study.base.text import first_problem
from lskd_study.data.options import Value, arguments_of
from lskd_study.plan.kinds import IMAGES, Control, Kind, kind_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter

PLAN = "plan.json"
JOB = "job.json"
BEGUN = "begun.json"
CURVES = "curves.csv"
LOGITS = "val_logits.safetensors"  # of image studies
TRANSLATIONS = "translations.jsonl"  # of translation studies: the test set
CHECKPOINT = "last.pth.tar"
STUDENT_STRIDE = 1_000_000  # between the seeds of two students of one teacher's seed
_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)  # of a run, and so of a folder
Role = Literal["teacher", "student", "control"]
_AS_WRITTEN = {"strict": True, "extra": "forbid"}  # how the plan is read back
TEACHER_FAILED = "its teacher"  # how the reason of a student begins that was not trained


@dataclass(frozen=True)
class Run:
    """One training: a teacher, a student of the teacher named by ``teacher``, or a control.

    A control is a student's network, trained by the student's file on the labels, smoothed by ``smoothing``:
    a student without a teacher, of hard weight 1. ``real``: with the weights and activations of a binary
    student left real. ``repeat``: which of the study's ``student_seeds`` it is, from 0; ``seed`` is the one
    that the trainer gets.
    """

    __pydantic_config__ = _AS_WRITTEN

    id: str
    role: Role
    model: str
    config: str
    smoothing: float
    seed: int
    teacher: str = ""
    temperature: float = 1.0
    hard_weight: float = 0.0
    real: bool = False
    repeat: int = 0

    @property
    def study_seed(self) -> int:
        """The study's seed that it belongs to: its teacher's."""
        return self.seed - self.repeat * STUDENT_STRIDE

    @property
    def folder(self) -> str:
        """The run's folder, relative to the output folder."""
        return f"{self.role}s/{self.id}"


@dataclass(frozen=True)
class Store:
    """What one teacher says about its students' training images (or sentences), stored once.

    Attributes:
        id: name of the store.
        teacher: the teacher's run.
        students: the runs that read it.
        writer: the one of them whose settings the writing command has.
        seed: of the augmentation; the runs' own seed, so that all arms of a seed have the same images.
        top_k: entries kept of each answer, 0: all.
        values: one of :data:`lskd.soft_labels.format.ValueDtype`.
        epochs: stored, each with its own views of the images; 1 where there are no views.
        asked: epochs of all its students together: what the teacher would be asked without a store.
        size: bytes expected, 0 where that is not known before.
        views: whether these epochs are read in turn by a training that has more.
        sampled: whether the entries are drawn, and not the largest.
    """

    __pydantic_config__ = _AS_WRITTEN

    id: str
    teacher: str
    students: list[str]
    writer: str
    seed: int
    top_k: int
    values: str
    epochs: int
    asked: int
    size: int
    views: bool = False
    sampled: bool = False

    @property
    def folder(self) -> str:
        """The store's folder, relative to the output folder: its record and log, and the soft labels."""
        return f"soft_labels/{self.id}"

    @property
    def kept(self) -> dict[str, int | str]:
        """What is kept of each answer, as a study file says it."""
        return {"sampled" if self.sampled else "top_k": self.top_k or "all", "values": self.values}


@dataclass(frozen=True)
class Plan:
    """A validated study with its matrix spelled out; plain values only.

    ``cwd`` is the folder that the other paths are relative to. ``configs`` is the content of the trainer's
    files by path, so that a change of theirs is noticed. ``num_classes`` is 0 where nothing is classified.
    ``margin``, in points of accuracy: what is still as good.
    """

    __pydantic_config__ = _AS_WRITTEN

    title: str
    study_file: str
    ecosystem: str
    cwd: str
    output: str
    data: str
    prepare: str
    num_classes: int
    convention: Literal["paper", "uniform"]
    smoothing: list[float]
    seeds: list[int]
    threads: int
    resources: dict[str, int | str]
    configs: dict[str, dict[str, Any]]
    runs: list[Run]
    soft_labels: dict[str, Any] = field(default_factory=dict)  # as in the study file
    stores: list[Store] = field(default_factory=list)
    store_notes: list[str] = field(default_factory=list)  # why students ask their teachers themselves
    prepare_options: dict[str, Value] = field(default_factory=dict)
    temperature_squared: bool = False
    margin: float = 0.2
    paper: list[str] = field(default_factory=list)  # tables of the paper that the study reproduces
    published: dict[str, Any] = field(default_factory=dict)  # others' figures, as in the study file
    note: str = ""  # to be said above the verdict
    tracker: TrackerName | Literal[""] = ""  # where runs are logged too
    student_seeds: int = 1  # students of each kind for one seed of their teacher
    last_epochs: int = 1  # whose mean accuracy is judged
    pool_seed_variance: bool = False  # over the settings that a claim is tested in
    looks: list[int] = field(default_factory=list)  # after how many seeds it is judged, by a rule
    looked_at: list[int] = field(default_factory=list)  # after how many it was, without one

    @property
    def kind(self) -> Kind:
        """What the models do: classify images or translate."""
        return kind_of(self.ecosystem)

    @property
    def look(self) -> int:
        """Which of its looks, from 0, the study's seeds allow."""
        return self.looks.index(len(self.seeds))

    @property
    def root(self) -> Path:
        """The output folder."""
        return Path(self.cwd, self.output)

    @property
    def data_dir(self) -> Path:
        """The data folder."""
        return Path(self.cwd, self.data)

    @cached_property
    def by_id(self) -> dict[str, Run]:
        """The runs by name."""
        return {run.id: run for run in self.runs}

    @cached_property
    def store_by_id(self) -> dict[str, Store]:
        """The stores of soft labels by name."""
        return {store.id: store for store in self.stores}

    @cached_property
    def _store_by_student(self) -> dict[str, Store]:
        return {student: store for store in self.stores for student in store.students}

    def store_of(self, run: Run) -> Store | None:
        """Return the store that a run reads; None: it asks its teacher itself, or has none."""
        return self._store_by_student.get(run.id)

    @property
    def rest(self) -> str:
        """What becomes of the entries that are not stored; empty where the study file does not say."""
        return self.soft_labels.get("rest") or ""

    def labels(self, store: Store, output: str | None = None) -> Path:
        """Return the folder of the soft labels, relative to ``cwd``; ``output``: not the study's own."""
        return Path(output, "soft_labels", store.id) if output else Path(self.output, store.folder, "labels")

    @property
    def teachers_alone(self) -> bool:
        """Whether there are no students: Tables 1, 3 and 4."""
        return all(run.role == "teacher" for run in self.runs)

    @cached_property
    def control_labels(self) -> list[float]:
        """The smoothing of the labels that controls learn from, in rising order."""
        return sorted({run.smoothing for run in self.runs if run.role == "control"})

    @property
    def controls_drawn(self) -> list[float]:
        """The smoothing of the labels of those controls that figures show: the students' own networks."""
        return sorted({run.smoothing for run in self.runs if run.role == "control" and not run.real})

    @property
    def controls(self) -> list[Control]:
        """The kinds of control that there are."""
        alphas, real = self.controls_drawn, any(run.real for run in self.runs)
        found: dict[Control, bool] = {"hard": 0.0 in alphas, "smoothed": any(alphas), "real": real}
        return [name for name, there in found.items() if there]

    @property
    def papers_loss(self) -> bool:
        """Whether every student learns by the paper's own loss: soft labels alone, temperature 1."""
        students = [run for run in self.runs if run.role == "student"]
        return {(run.temperature, run.hard_weight) for run in students} <= {(1.0, 0.0)}

    @property
    def prepare_arguments(self) -> list[str]:
        """The arguments of ``lskd`` that make the data, paths relative to ``cwd``; empty for none."""
        if not self.prepare:
            return []
        arguments = ["data", *arguments_of(self.prepare, self.prepare_options)]
        if self.kind is IMAGES:
            return [*arguments, "--output", self.data]
        text = self.data.removesuffix("-bin") if self.data.endswith("-bin") else f"{self.data}-text"
        return [*arguments, "--output", text, "--data-bin", self.data]

    def run(self, run_id: str) -> Run:
        """Return the run of that name.

        Raises:
            LskdError: for a name that is not in the plan.
        """
        if run_id not in self.by_id:
            raise LskdError(f"no run {run_id!r} in this plan; its runs are in {self.root / PLAN}")
        return self.by_id[run_id]

    def folder(self, run: Run) -> Path:
        """Return the run's folder."""
        return self.root / run.folder

    def done(self, run: Run) -> bool:
        """Return whether the run is finished: ``job.json`` is written last and whole."""
        return (self.folder(run) / JOB).exists()

    def failed(self, made: Run | Store) -> str:
        """Return why a run (or a store) that ended failed; empty where it did not, or has not ended."""
        return str(read_object(self.root / made.folder / JOB).get("failed") or "")

    def unfinished(self) -> list[Run]:
        """Return the runs still to do."""
        root = str(self.root)  # each job asks for all runs, and texts are joined ten times as fast as paths
        return [run for run in self.runs if not os.path.exists(f"{root}/{run.folder}/{JOB}")]

    def settings(self, run: Run) -> dict[str, Any]:
        """Return what defines the run's result; two runs of equal settings are the same experiment."""
        own = asdict(run)
        for name in ("real", "repeat"):  # as it was before there were such runs
            if not own[name]:
                del own[name]
        own["config"] = self.configs[run.config]
        own.update(ecosystem=self.ecosystem, data=self.data, num_classes=self.num_classes)
        if self.temperature_squared and run.role == "student":
            own["temperature_squared"] = True
        if store := self.store_of(run):
            own["soft_labels"] = store.kept
            if store.views:
                own["soft_labels"]["views"] = store.epochs
            if self.rest:
                own["soft_labels"]["rest"] = self.rest
        return {**own, "convention": self.convention}

    def write(self) -> None:
        """Write the plan into the output folder, whole or not at all."""
        write_text(self.root / PLAN, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan back.

        Raises:
            LskdError: for a file that is not a plan.
        """
        from pydantic import ValidationError

        content = read_json(path, "a plan")
        try:
            # As JSON, in which a run is a mapping; strictly, "1" is no number.
            plan = _adapter().validate_json(json.dumps(content))
            odd = plan._odd()
        except ValidationError as error:
            odd = first_problem(error)
        if odd:
            raise LskdError(f"{path} is not a plan of this version ({odd}); run `lskd study` again")
        return plan

    def _odd(self) -> str:
        """Return what does not fit together, or is no name of a folder of ours; empty where all does."""
        for name in (*self.by_id, *self.store_by_id):
            if not _NAME.fullmatch(name):
                return f"{name[:80]!r} is no name of a run"
        if self.looks and len(self.seeds) not in self.looks:
            return "its seeds are none of its looks"
        for run in self.runs:
            if run.config not in self.configs or (run.teacher or run.id) not in self.by_id:
                return f"{run.id} has no settings or no teacher"
        for store in self.stores:
            if not {store.teacher, store.writer, *store.students} <= self.by_id.keys():
                return f"{store.id} has no teacher or no students"
        return ""


@cache
def _adapter() -> "TypeAdapter[Plan]":
    """Return what reads plans. To make it takes longer than to read one, and an index reads many."""
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)


def expand(
    smoothing: list[float],
    seeds: list[int],
    teachers: list[tuple[str, str]],
    students: list[tuple[str, str]],
    temperatures: list[float],
    hard_weights: list[float],
    controls: Sequence[Control] = (),
    student_seeds: int = 1,
) -> list[Run]:
    """Return all runs of the matrix, teachers first; networks are pairs (model, trainer's file).

    A control has no teacher, temperature or hard weight to differ in: one for each student and seed. Of both
    there are ``student_seeds`` for each seed, so that a control has a student of its own seed beside it.
    """
    # Seeds vary slowest, so that a study broken off has whole pairs of arms.
    arms = list(product(seeds, teachers, smoothing))
    runs = [
        Run(_teacher_id(model, alpha, seed), "teacher", model, config, alpha, seed)
        for seed, (model, config), alpha in arms
    ]
    settings = list(product(temperatures, hard_weights))
    repeats = range(student_seeds)
    for (seed, (teacher, _), alpha), (model, config), (t, hard), repeat in product(
        arms, students, settings, repeats
    ):
        name = f"student-{slug(model)}-of-{slug(teacher)}-smoothing{exact(alpha)}"
        run_id = f"{name}-T{exact(t)}-hard{exact(hard)}-{_seed_id(seed, repeat)}"
        own, teacher_id = seed + repeat * STUDENT_STRIDE, _teacher_id(teacher, alpha, seed)
        runs.append(Run(run_id, "student", model, config, alpha, own, teacher_id, t, hard, repeat=repeat))
    # Whether the network is real-valued, and the smoothing of its labels.
    kinds_of = {
        "hard": [(False, 0.0)],
        "smoothed": [(False, alpha) for alpha in sorted(smoothing)[1:]],
        "real": [(True, 0.0)],
    }
    kinds = [kind for control in controls for kind in kinds_of[control]]
    for seed, (model, config), (real, alpha), repeat in product(seeds, students, kinds, repeats):
        name = real_name(model) if real else model
        run_id = f"control-{slug(name)}-smoothing{exact(alpha)}-{_seed_id(seed, repeat)}"
        own = seed + repeat * STUDENT_STRIDE
        runs.append(Run(run_id, "control", name, config, alpha, own, "", 1.0, 1.0, real, repeat))
    return runs


def _seed_id(seed: int, repeat: int) -> str:
    return f"seed{seed}-student{repeat}" if repeat else f"seed{seed}"


def more_seeds(seeds: Sequence[int], count: int) -> list[int]:
    """Return the next numbers that are no seeds yet."""
    first = max(seeds) + 1
    return list(range(first, first + count))


def real_name(model: str) -> str:
    """Return what the real-valued network of a binary student's width is called."""
    return f"{model}-real"


def _teacher_id(model: str, alpha: float, seed: int) -> str:
    return f"teacher-{slug(model)}-smoothing{exact(alpha)}-seed{seed}"


def rest_of(hard_weight: float) -> float:
    """Return the soft labels' weight: 1 less the hard ones', in decimals, so that 0.9 leaves 0.1.

    >>> rest_of(0.9)
    0.1
    """
    return float(1 - Decimal(repr(float(hard_weight))))


def exact(value: float) -> str:
    """Return a number in as few digits as give exactly it again: for commands, names and labels.

    >>> exact(1.0), exact(0.1), exact(0.1234567), exact(1e-05)
    ('1', '0.1', '0.1234567', '1e-05')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value)).removesuffix(".0")


def slug(model: str) -> str:
    """Return a model's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", model)
