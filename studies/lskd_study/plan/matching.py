"""Which row of the paper a run belongs to: networks, data sets and settings by its names, in one place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lskd_study.base.text import did_you_mean
from lskd_study.paper.printed import Paper, Row, Table, load_tables
from lskd_study.plan.plan import Plan, Run

# The trainers' names of networks, tags aside, and those of the paper's Tables 1 and 10; the other tables have
# no more than these.
NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "mobilenetv2_100": "MobileNetV2",
    "densenet121": "DenseNet121",
    "resnext50_32x4d": "ResNeXt50 32x4d",
    "wide_resnet50_2": "Wide ResNet50",
    "resnext101_32x8d": "ResNeXt101 32x8d",
    "ReActNet-18": "ReActNet (ResNet-18)",
}
# Tables that a study can say it reproduces, and what it needs for that.
OF_TEACHERS = ("Table 1", "Table 3", "Table 4", "Table 10")
OF_STUDENTS = ("Table 2", "Table 6", "Table 7", "Table 8", "Table 9", "Fig. 5", "Fig. 6")
# Rows of Table 8 whose teacher was trained without smoothing, against the text (docs/errata.md, E17).
TABLE_8_WITHOUT = ("R50", "MobileNet V2")

PAPERS_ALPHA = 0.1  # named for translation alone; assumed for images (docs/errata.md, E26)
_LONG = 160  # epochs of a teacher that Table 8 calls "Long"
_DEFAULT_DATA = "ImageNet-1K"  # of tables that have no column for it


@dataclass(frozen=True)
class RowKey:
    """What tells a table's rows apart; networks by the paper's names where it has one.

    Attributes:
        data_set: the paper's, empty for one of one's own.
        teacher: with ``+Long`` and ``+CutMix`` as in Table 1.
        smoothing: the teacher's.
        student: empty where a teacher alone is meant.
        temperature, hard_weight: of the distillation.
    """

    data_set: str
    teacher: str
    smoothing: float
    student: str = ""
    temperature: float = 1.0
    hard_weight: float = 0.0


def problem_of_table(name: str, students: bool) -> str:
    """Return why a study, with or without students, reproduces no table of that name; empty where it can."""
    known = (*OF_TEACHERS, *OF_STUDENTS)
    if name not in known:
        there = f"there are {', '.join(known)}"
        # Of "Table 5" every other table is as near, so none is offered.
        hint = there if name in load_tables().tables else did_you_mean(name, known, there)
        return f"{name!r} is no table of the paper that a study reproduces; {hint}"
    if name in OF_STUDENTS and not students:
        return f"{name!r} is about students and the study has none; add students or remove it"
    if name in ("Table 1", "Table 10") and students:
        return f"{name!r} is shown where teachers are compared alone; remove it or the students"
    return ""


def network_name(model: str) -> str:
    """Return the paper's name of a trainer's model; the model's own where the paper has none."""
    return NETWORKS.get(model.partition(".")[0], model)


def teacher_name(model: str, config: Mapping[str, Any], classes: int) -> str:
    """Return the row of Table 1 that a teacher belongs to, by its model and the trainer's options."""
    name = network_name(model)
    if classes == data_set_classes(_DEFAULT_DATA):  # elsewhere 200 epochs are the rule
        long = config.get("epochs") == _LONG
        mixed = float(config.get("cutmix") or 0) > 0
        if long or mixed:
            name = name.replace("ResNet-", "ResNet") + "+Long" * long + "+CutMix" * mixed
    return name


def data_set_classes(data_set: str) -> int:
    """Return the number of classes of one of the paper's data sets; ``KeyError`` for another."""
    paper = load_tables()
    rows = [*paper["Table 5"].rows, *paper["Table 4"].rows]
    classes = {str(row.values.get("dataset", row.name)): int(row.number("classes") or 0) for row in rows}
    return classes[data_set]


def data_sets(table: Table) -> tuple[str, ...]:
    """Return the data sets of a table, in its order."""
    if "dataset" not in table.columns:
        return (_DEFAULT_DATA,)
    return tuple(dict.fromkeys(str(row["dataset"]) for row in table.rows))


def runs_by_row(plan: Plan, table: Table) -> dict[RowKey, list[Run]]:
    """Return what a study has for a table, in the order of its file: the runs that a row could be of.

    For tables of teachers these alone, for the others the students.
    """
    # The number of classes tells a table's data sets apart.
    there = (name for name in data_sets(table) if data_set_classes(name) == plan.num_classes)
    data_set = next(there, "")
    wanted = "teacher" if table.name in OF_TEACHERS else "student"
    found: dict[RowKey, list[Run]] = {}
    for run in plan.runs:
        if run.role == wanted:
            teacher = run if wanted == "teacher" else plan.run(run.teacher)
            name = teacher_name(teacher.model, plan.configs.get(teacher.config, {}), plan.num_classes)
            student = network_name(run.model) if wanted == "student" else ""
            key = RowKey(data_set, name, run.smoothing, student, run.temperature, run.hard_weight)
            found.setdefault(key, []).append(run)
    return found


def row_of(paper: Paper, table: str, key: RowKey) -> Row | None:
    """Return the paper's row of such runs; None where the table has none."""
    if not key.data_set or key.temperature != 1 or key.smoothing not in (0, PAPERS_ALPHA):
        return None
    if table != "Table 9" and key.hard_weight:
        return None
    return next((row for row in paper[table].rows if _same(row, key)), None)


def _same(row: Row, key: RowKey) -> bool:
    values = row.values
    smoothed = bool(key.smoothing)
    if values.get("dataset", _DEFAULT_DATA) != key.data_set:
        return False
    if row.table == "Table 9":  # ResNet-50 and ResNet-18, says the caption
        networks = (key.teacher, key.student) == ("ResNet-50", "ResNet-18")
        return networks and (values["hard_ratio"], values["smoothed"]) == (key.hard_weight, smoothed)
    if row.table == "Table 8":
        networks = (key.teacher, key.student) == (values["network"], values["student"])
        return networks and smoothed == (row.name not in TABLE_8_WITHOUT)
    if "instability_with" in values:  # Tables 1 and 10, both sides in one row
        side = "with" if smoothed else "without"
        return key.teacher == row.name and values[f"instability_{side}"] is not None
    if "student" in values:
        own = (key.teacher, key.student, smoothed)
        return own == (values["teacher"], values["student"], values["smoothed"])
    return (key.teacher, smoothed) == (values["network"], values["smoothed"])


def names_table(plan: Plan, tables: Sequence[str]) -> bool:
    """Return whether a study says that it reproduces one of these tables."""
    return any(name in tables for name in plan.paper)
