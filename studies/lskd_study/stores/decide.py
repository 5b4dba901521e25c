"""Which students of a study read what is stored, and why the others do not."""

import hashlib
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lskd import LskdError, SoftLabelsError
from lskd.base.images import class_folders, class_images
from lskd.soft_labels.format import SoftLabelsLayout, ValueDtype
from lskd_study.base.text import gigabytes
from lskd_study.data.expected import known_numbers
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import BEGUN, Plan, Run, Store
from lskd_study.plan.records import Begun, read_record
from lskd_study.trainers import TIMM, trainer_of
from lskd_study.trainers.trainer import CannotStoreError, Views

# Floating-point operations an image below which a store costs more than it saves: on one core they take about
# as long as loading and augmenting a small image, which the store's own pass does once more.
_WORTH = 100_000_000


def with_stores(plan: Plan) -> Plan:
    """Return the plan with the stores that its students are to read.

    A study goes on as it was begun: students that were begun without a store stay without.

    Raises:
        LskdError: for a store that is asked for and cannot be.
    """
    asked = plan.soft_labels
    students = [run for run in plan.runs if run.role == "student"]
    if not students or not asked:
        return plan
    form = _form(plan)
    if asked["mode"] == "off":
        return plan
    must = asked["mode"] == "always" or bool(form.top_k) or form.values != "float32" or bool(asked["views"])
    if plan.kind is TRANSLATION and not form.top_k:
        if must:
            raise LskdError(
                f"{plan.study_file}: soft_labels of translations need top_k, e.g. 8, or sampled; add one"
            )
        return replace(plan, store_notes=["all students: a store of translations needs soft_labels.top_k"])
    stores: list[Store] = []
    notes: list[str] = []
    for views, group in _groups(plan, students, must):
        names = ", ".join(dict.fromkeys(run.model for run in group))
        try:
            if isinstance(views, CannotStoreError):
                raise views
            made = _stores(plan, views, group, form)
            if not must:
                _check(plan, views[0], group, [*stores, *made])
            for view, run in zip(views, group, strict=True):
                _check_reading(form, run, plan.rest or view.rest)
            stores += made
        except CannotStoreError as reason:
            if must:
                raise LskdError(f"{plan.study_file}: soft_labels: {reason}; fix that or remove it") from None
            notes.append(f"{names}: {reason}")
    return replace(plan, stores=stores, store_notes=notes)


class _Form(NamedTuple):
    """What is kept of each answer, as :class:`Store` says it."""

    top_k: int
    values: ValueDtype
    sampled: bool


def _form(plan: Plan) -> _Form:
    """Return what the study file asks for.

    Raises:
        LskdError: for keys that do not go together.
    """
    asked, classes = plan.soft_labels, plan.num_classes
    sampled, rest = asked["sampled"], asked["rest"]
    key = "sampled" if sampled else "top_k"
    kept = 0 if asked[key] == "all" else int(asked[key])
    wrong = {
        "sampled draws entries, top_k takes the largest; give one": sampled and asked["top_k"] != "all",
        "sampled leaves no rest; remove rest": sampled and rest,
        "rest is what top_k leaves, and all entries are kept; add top_k, or remove it": (
            rest and kept in (0, classes)
        ),
        "views are of images; sentences have one, remove it": plan.kind is TRANSLATION and asked["views"],
        f"{key} is {kept}; there are {classes} classes": classes and kept > classes,
    }
    if found := next((message for message, is_so in wrong.items() if is_so), None):
        raise LskdError(f"{plan.study_file}: soft_labels.{found}")
    values: ValueDtype = asked["values"] or ("float16" if kept else "float32")
    kept = 0 if kept == classes else kept
    return _Form(kept, values, bool(asked["sampled"] and kept))


def _check_reading(form: _Form, run: Run, rest: Any) -> None:
    """Check that a student's temperature can be had from what is stored.

    Raises:
        CannotStoreError: it cannot.
    """
    if not form.top_k or run.temperature == 1:
        return
    from lskd.soft_labels.forms import check_reading  # torch takes a while

    layout = SoftLabelsLayout(form.top_k + 1, form.top_k, 0, values=form.values, sampled=form.sampled)
    try:
        check_reading(Path("the store"), layout, run.temperature, rest)
    except SoftLabelsError as error:
        raise CannotStoreError(str(error)) from None


def _groups(
    plan: Plan, students: Sequence[Run], must: bool
) -> list[tuple[list[Views] | CannotStoreError, list[Run]]]:
    """Return students whose training images are the same, with the views of each; or why they have none."""
    kinds: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in students:
        kinds[run.model, run.config].append(run)
    groups: dict[str, tuple[list[Views] | CannotStoreError, list[Run]]] = {}
    alone = _each_alone(students) and not any(_begun(students, plan))
    for kind, runs in kinds.items():
        try:
            if alone and not must:
                raise CannotStoreError(
                    f"each teacher has one student{' of a seed' * (plan.student_seeds > 1)}"
                )
            views = trainer_of(plan.ecosystem, "student").views(plan, runs[0])
        except CannotStoreError as reason:
            groups[f"{kind}"] = reason, runs
            continue
        found, members = groups.setdefault(views.key, ([], []))
        assert isinstance(found, list)
        found += [views] * len(runs)
        members += runs
    return list(groups.values())


def _stores(plan: Plan, views: list[Views], group: list[Run], form: _Form) -> list[Store]:
    """Return one store for each teacher of a group."""
    digest = hashlib.sha256(views[0].key.encode()).hexdigest()[:8]
    by_teacher: dict[tuple[str, int], list[tuple[Views, Run]]] = defaultdict(list)
    for view, run in zip(views, group, strict=True):
        # Students of another seed see other images; sentences are the same for all.
        repeat = 0 if plan.kind is TRANSLATION else run.repeat
        by_teacher[run.teacher, repeat].append((view, run))
    size = _bytes_an_epoch(plan, form.top_k, form.values)
    stores = []
    for (teacher, repeat), pairs in by_teacher.items():
        longest, writer = max(pairs, key=lambda pair: pair[0].stored)
        epochs = min(longest.stored, plan.soft_labels["views"] or longest.stored)
        stores.append(
            Store(
                id=f"{teacher}{f'-student{repeat}' if repeat else ''}-{digest}",
                teacher=teacher,
                students=[run.id for _, run in pairs],
                writer=writer.id,
                seed=writer.seed,
                **form._asdict(),
                epochs=epochs,
                asked=sum(view.epochs for view, _ in pairs) if all(view.epochs for view, _ in pairs) else 0,
                size=size * epochs,
                views=epochs < longest.stored,
            )
        )
    return stores


def _check(plan: Plan, views: Views, group: list[Run], stores: list[Store]) -> None:
    """Check that nothing speaks against the last stores of a list.

    Raises:
        CannotStoreError: something does.
    """
    begun = _begun(group, plan)
    if begun and None in begun:
        raise CannotStoreError("the study was begun without a store")
    if begun:
        return
    if _each_alone(group):
        raise CannotStoreError("no other student of a teacher has the same training images")
    if views.caution:
        raise CannotStoreError(f"{views.caution}; soft_labels.mode: always would do so")
    teachers = {(run.model, run.config): run for run in (plan.run(student.teacher) for student in group)}
    if (work := max(TIMM.size(plan, run).operations or 0 for run in teachers.values())) < _WORTH:
        raise CannotStoreError(
            f"a teacher's answer to an image takes {work / 1e6:.3g} million operations, less than loading "
            "the image once more to store it; soft_labels.mode: always would do so"
        )
    own = [store for store in stores if store.students[0] in {run.id for run in group}]
    if not all(store.size for store in own):
        fix = f"; make it first by `lskd {shlex.join(plan.prepare_arguments)}`" if plan.prepare else ""
        raise CannotStoreError(f"how large a store would be is not known before the data is there{fix}")
    total, limit = sum(store.size for store in stores), float(plan.soft_labels["limit_gb"]) * 1e9
    if total > limit:
        small = sum(_bytes_an_epoch(plan, 10, "float16") * store.epochs for store in own)
        other = f"; with top_k: 10 they would take {gigabytes(small)}" if plan.num_classes > 10 else ""
        raise CannotStoreError(
            f"{len(stores)} stores would take {gigabytes(total)}, more than soft_labels.limit_gb, "
            f"{gigabytes(limit)}{other}"
        )
    root = plan.root.absolute()
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    if total > free / 2:
        raise CannotStoreError(
            f"{len(stores)} stores would take {gigabytes(total)}, more than half of the {gigabytes(free)} "
            f"that are free at {plan.output}"
        )


def _each_alone(students: Sequence[Run]) -> bool:
    """Whether no two students have the same teacher and the same seed, and so the same images."""
    return len({(run.teacher, run.repeat) for run in students}) == len(students)


def _begun(runs: Iterable[Run], plan: Plan) -> list[Any]:
    """Return what the runs that were begun had of stored soft labels: their settings, or None."""
    found = []
    for run in runs:
        if begun := read_record(plan.folder(run) / BEGUN, Begun):
            found.append(begun.get("settings", {}).get("soft_labels"))
    return found


def _bytes_an_epoch(plan: Plan, top_k: int, values: ValueDtype) -> int:
    """Return the bytes of one epoch of images; 0 where that is not known yet."""
    images, classes = image_count(plan, "train"), plan.num_classes
    if not images:
        return 0
    kept = min(top_k, classes) or classes
    layout = SoftLabelsLayout(classes, kept, images, rows_per_sample=1, values=values, seeds=True)
    return images * int(layout.row.itemsize)


def image_count(plan: Plan, split: str) -> int:
    """Return how many images there are, or will be; 0 where that is not known before, and in translation."""
    if plan.kind is TRANSLATION:
        return 0
    if (folder := plan.data_dir / split).is_dir():
        return _count(folder)
    return known_numbers(plan.prepare, plan.prepare_options.get("expect")).get(split, 0)


@cache
def _count(folder: Path) -> int:
    return sum(len(class_images(folder / label)[0]) for label in class_folders(folder))
