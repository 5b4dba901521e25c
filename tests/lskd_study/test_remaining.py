"""How far a running study is: against studies whose runs take known times."""

import json
import re

import pytest

from lskd_study.plan.plan import JOB, Run, Store
from lskd_study.runs import remaining
from lskd_study.runs.remaining import Remaining
from lskd_study.runs.work import Storing
from lskd_study.stores.decide import with_stores

pytestmark = pytest.mark.unit

UNITS = {"s": 1, "min": 60, "hours": 3600, "days": 86_400}
EPOCHS = 10
SECONDS = {"teacher": 300.0, "student": 1200.0}


class Told:
    """A study that is told of what its runs do, at times that the test says."""

    def __init__(self, plan) -> None:
        self.plan, self.now, self.lines = plan, 1000.0, []
        self.remaining = Remaining(plan, self.lines.append, lambda: self.now)

    def say(self, text: str) -> None:
        self.remaining.hear(f"12:00:00  {text}")

    def end(self, run: Run | Store, seconds: float, name: str = "", **record: object) -> None:
        folder = self.plan.root / run.folder
        folder.mkdir(parents=True)
        record = {"wall_time_s": seconds, "resumed": 0, **record}
        (folder / JOB).write_text(json.dumps(record))
        self.say(f"finished {name or run.id}  val top-1 97.00 %  ({seconds:.0f} s)")

    def left(self) -> tuple[str, float] | None:
        found = re.search(r"; (about|very roughly) ([\d.]+) (\w+) left$", self.remaining.line())
        return found and (found[1], float(found[2]) * UNITS[found[3]])


@pytest.fixture
def told(tmp_path, plan_of):
    return Told(plan_of(tmp_path, students=[("small", "student.yaml")]))


def simulate(told, places: int, between: float = 0.0):
    """Run the study on so many places; yield after each epoch what is really left, in seconds."""
    waiting, now = list(told.plan.runs), told.now
    events = []
    free = [now] * places
    for run in waiting:
        begun = max(min(free), now) + between
        free[free.index(min(free))] = begun + SECONDS[run.role]
        events += [(begun, 0, run)] + [
            (begun + SECONDS[run.role] * k / EPOCHS, k, run) for k in range(1, EPOCHS + 1)
        ]
    end = max(free)
    for when, epoch, run in sorted(events, key=lambda event: event[0]):
        told.now = when
        if epoch == 0:
            told.say(f"starts   {run.id}")
        told.say(f"epoch    {run.id}  {epoch} of {EPOCHS}")
        if epoch == EPOCHS:
            told.end(run, SECONDS[run.role])
        yield run, epoch, end - when


def test_a_record_is_read_once_however_many_runs_there_are(told, monkeypatch):
    tries, read = [], remaining.read_object
    monkeypatch.setattr(remaining, "read_object", lambda path: tries.append(path) or read(path))
    for _ in simulate(told, places=2):
        pass
    assert len(tries) == len(set(tries)) == len(told.plan.runs)


@pytest.mark.parametrize(("places", "between"), [(1, 0.0), (2, 0.0), (3, 30.0), (12, 0.0)])
def test_once_each_kind_is_known_the_time_left_is_right(told, places, between):
    seen = 0
    for run, epoch, truth in simulate(told, places, between):
        if told.left() is None:
            continue
        word, left = told.left()
        trained = run.role == "student" and epoch >= 2
        if word == "about" and trained and truth > 0:
            assert left == pytest.approx(truth, rel=0.15, abs=SECONDS["student"] / places / 5), (run, epoch)
            seen += 1
        if run.role == "teacher" and places == 1:
            assert word == "very roughly"
    assert seen > 20
    assert told.remaining.line().startswith("12 of 12 runs, none is running now")


def test_nothing_is_known_before_the_first_epoch(told):
    run = told.plan.runs[0]
    assert told.remaining.line() == "0 of 12 runs, none is running yet"
    told.say(f"starts   {run.id}  CUDA_VISIBLE_DEVICES=1")
    told.say(f"epoch    {run.id}  0 of {EPOCHS}")
    told.now += 30
    assert told.remaining.line() == f"0 of 12 runs, run {run.id} epoch 1 of 10"
    told.say(f"epoch    {run.id}  1 of {EPOCHS}")
    assert told.remaining.line().startswith(
        f"0 of 12 runs, run {run.id} epoch 2 of 10; very roughly 60 min left"
    )
    told.say(f"epoch    {run.id}  10 of {EPOCHS}")
    assert f"run {run.id} is being evaluated" in told.remaining.line()


def test_epochs_of_before_an_end_take_no_time(told):
    run = told.plan.runs[0]
    told.say(f"resumes  {run.id}")
    told.say(f"epoch    {run.id}  8 of {EPOCHS}")
    assert told.left() is None
    told.now += 100
    told.say(f"epoch    {run.id}  9 of {EPOCHS}")
    # 100 seconds an epoch: 1 epoch of this run, and 11 runs of 10.
    assert told.left() == ("very roughly", pytest.approx(100 + 11 * 1000, rel=0.06))


def test_runs_of_an_earlier_command_tell_how_long_one_takes(tmp_path, plan_of):
    told = Told(plan_of(tmp_path, students=[("small", "student.yaml")]))
    teachers = [run for run in told.plan.runs if run.role == "teacher"]
    students = [run for run in told.plan.runs if run.role == "student"]
    for run in teachers:
        told.end(run, 50)
    told.end(students[0], 400)
    told.end(students[1], 10, resumed=1)
    told.end(students[2], 10, failed="diverged")
    again = Told(told.plan)
    again.say(f"starts   {students[3].id}")
    again.now += 100
    word, left = again.left()
    assert (word, left) == ("about", pytest.approx(300 + 400 + 400, rel=0.06))


def test_what_is_made_once_more_is_not_done(told):
    """By `--forceall`, or because somebody has removed a folder."""
    first, second = (run for run in told.plan.runs[:2])
    for run in (first, second):
        told.end(run, 100)
    again = Told(told.plan)
    assert again.remaining.line().startswith("2 of 12 runs")
    for run in (first, second):
        (told.plan.folder(run) / JOB).unlink()
    again.say(f"starts   {first.id}")
    again.say(f"epoch    {first.id}  0 of {EPOCHS}")
    again.now += 40
    again.say(f"epoch    {first.id}  1 of {EPOCHS}")
    # 40 seconds an epoch: 9 of this run, and all of 11 others.
    assert again.remaining.line().startswith("0 of 12 runs")
    assert again.left() == ("very roughly", pytest.approx(360 + 11 * 400, rel=0.06))
    again.now += 360
    told.plan.folder(first).rmdir()
    again.end(first, 400)
    assert again.left() == ("very roughly", pytest.approx(11 * 400, rel=0.06))


def test_a_record_that_cannot_be_read_is_of_a_finished_run(told):
    run = told.plan.runs[0]
    told.end(run, 100)
    (told.plan.folder(run) / JOB).write_text("{")
    assert Told(told.plan).remaining.line().startswith("1 of 12 runs")
    (told.plan.folder(run) / JOB).write_text(f'{{"wall_time_s": {10**400}}}')
    assert Told(told.plan).remaining.line().startswith("1 of 12 runs")


def test_a_minute_of_silence_is_broken_once(told):
    run = told.plan.runs[0]
    told.say(f"starts   {run.id}")
    before = len(told.lines)
    for second in range(1, 200):
        told.now = 1000.0 + second
        told.say(f"epoch    {run.id}  {second // 30} of {EPOCHS}")
        told.remaining.look()
    assert len(told.lines) == before + 3  # after 60, 120 and 180 seconds
    assert all(re.match(r"\d\d:\d\d:\d\d  0 of 12 runs, run teacher-", line) for line in told.lines[before:])
    assert not any("epoch    " in line for line in told.lines)


def test_runs_at_a_time_and_those_that_failed_are_counted(told):
    first, second, third = told.plan.runs[:3]
    for run in (first, second, third):
        told.say(f"starts   {run.id}")
        told.now += 1
    told.say(f"epoch    {second.id}  3 of {EPOCHS}")
    assert f"run {second.id} epoch 4 of 10 and 2 more" in told.remaining.line()
    told.remaining.hear(f"lskd: error: {second.id} failed: no reason; the whole log is x")
    assert f"{third.id} for 1 s and 1 more" in told.remaining.line()
    told.say(f"failed   {third.id}  its teacher diverged")
    told.remaining.hear("something else, as `lskd data` says it")
    assert told.remaining.line() == f"0 of 12 runs, run {first.id} for 3 s"
    assert told.lines[-3:] == [
        f"lskd: error: {second.id} failed: no reason; the whole log is x",
        f"12:00:00  failed   {third.id}  its teacher diverged",
        "something else, as `lskd data` says it",
    ]


def test_a_store_is_life_too(told):
    run = told.plan.runs[0]
    students = [one.id for one in told.plan.runs if one.teacher == run.id]
    store = Store("s", run.id, students, students[0], 0, 0, "float32", 1, 1, 0)
    told.plan.stores.append(store)
    told = Told(told.plan)
    told.say("starts   soft labels of s")
    told.now += 90
    assert told.remaining.line() == "0 of 12 runs, soft labels of s for 1.5 min"


def test_each_store_of_a_teacher_counts(scene):
    """With several students of a seed a teacher has a store for each."""
    changes = {"student_seeds": 2, "temperatures": [1, 2], "soft_labels": {"mode": "always"}}
    told = Told(with_stores(scene.plan(**changes)))
    first, *stores = told.plan.stores
    for made in [*told.plan.runs, *stores]:
        name = Storing(told.plan, made).name if isinstance(made, Store) else made.id
        told.say(f"starts   {name}")
        told.now += 100
        told.end(made, 100, name=name)
    told.say(f"starts   {Storing(told.plan, first).name}")
    told.now += 50
    assert told.left() == ("about", 50)
