"""Which students of a study read stored soft labels, and what becomes of the stores; no training."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lskd import DivergedError, LskdError, SoftLabels, SoftLabelsWriter
from lskd.checkpoints import file_checksum
from lskd.soft_labels.format import SoftLabelsLayout
from lskd_study.plan.plan import BEGUN, CHECKPOINT, JOB, PLAN, Plan, Run, Store
from lskd_study.plan.records import Size
from lskd_study.plan.schema import SoftLabels as Asked
from lskd_study.runs import job
from lskd_study.runs.__main__ import main
from lskd_study.runs.data_checksum import check_unchanged
from lskd_study.runs.scheduler import SNAKEFILE
from lskd_study.stores.decide import with_stores
from lskd_study.stores.state import contains, release_stores, renew_stores, rerun_command
from lskd_study.stores.summary import describe_stores, loss_note, page_rows
from lskd_study.trainers import TIMM, trainer_of
from lskd_study.trainers.trainer import CannotStoreError, Trainer, Views

pytestmark = pytest.mark.unit
IMAGES, CLASSES, EPOCHS = 20, 4, 3
MMCLS = trainer_of("mmcls", "student")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        (folder / f"{number}.png").touch()
    return folder


@pytest.fixture
def decided(tmp_path, plan_of, monkeypatch, data):
    """Decide about a study of two students of six teachers whose training images are the same."""
    found = {"small": Views("same", EPOCHS, EPOCHS), "big": Views("same", EPOCHS - 1, EPOCHS - 1)}

    def views(plan: Plan, run: Run) -> Views:
        view = found[run.model]
        if isinstance(view, CannotStoreError):
            raise view
        return view

    monkeypatch.setattr(TIMM, "views", views)
    monkeypatch.setattr(TIMM, "size", lambda plan, teacher: Size(parameters=1, operations=10**9))

    def decide(change=None, students=(("small", "student.yaml"), ("big", "student.yaml")), **asked) -> Plan:
        found.update(change or {})
        return with_stores(asking(plan_of(tmp_path, students=list(students)), **asked))

    return decide


def asking(plan: Plan, **asked) -> Plan:
    return replace(plan, soft_labels=Asked.model_validate(asked).model_dump())


def begin(plan: Plan, run: Run) -> None:
    plan.folder(run).mkdir(parents=True, exist_ok=True)
    (plan.folder(run) / BEGUN).write_text(json.dumps({"settings": plan.settings(run)}))


def test_one_store_for_each_teacher_and_all_its_students(decided):
    plan = decided()
    assert len(plan.stores) == 6
    assert plan.store_notes == []
    students = [run for run in plan.runs if run.role == "student"]
    for store in plan.stores:
        taught = [run.id for run in students if run.teacher == store.teacher]
        assert sorted(store.students) == sorted(taught)
        # Both arms of a seed see the same images, other seeds others.
        assert store.seed == plan.run(store.teacher).seed
        assert plan.run(store.writer).model == "small"  # which trains longest
        assert (store.epochs, store.asked) == (EPOCHS, 2 * EPOCHS - 1)
        assert (store.top_k, store.values) == (0, "float32")
        assert store.size == IMAGES * EPOCHS * (4 + CLASSES * 6)
    for run in students:
        assert plan.settings(run)["soft_labels"] == {"top_k": "all", "values": "float32"}
        words = TIMM.command(plan, run)
        assert words[words.index("--kd-soft-labels") + 1] == str(plan.labels(plan.store_of(run)))
        assert words[words.index("--kd-soft-labels-seed") + 1] == str(run.seed)
    lines = "\n".join(describe_stores(plan))
    assert "6 stores, all classes in float32, serve 12 students" in lines
    assert f"about {6 * EPOCHS * IMAGES} images instead of {6 * (2 * EPOCHS - 1) * IMAGES}" in lines
    plan.write()
    assert Plan.read(plan.root / PLAN) == plan


def test_temperatures_and_hard_weights_share_a_store(tmp_path, plan_of, decided):
    plan = asking(plan_of(tmp_path, students=[("small", "student.yaml")], temperatures=[1.0, 2.0]))
    assert [len(store.students) for store in with_stores(plan).stores] == [2] * 6


@pytest.mark.parametrize(
    ("asked", "change", "reason"),
    [
        ({"mode": "off"}, {}, None),
        ({}, {"big": Views("other", 3, 3)}, "no other student of a teacher has the same training images"),
        ({}, {"small": CannotStoreError("it mixes")}, "small: it mixes"),
        ({}, {"small": Views("same", 3, 3, "mixed one by one")}, "mixed one by one"),
        ({"limit_gb": 1e-6}, {}, "6 stores would take 10.1 kB, more than soft_labels.limit_gb, 1 kB"),
    ],
)
def test_where_students_ask_their_teachers_themselves(decided, asked, change, reason):
    plan = decided(change, **asked)
    assert plan.stores == []
    assert all("soft_labels" not in plan.settings(run) for run in plan.runs)
    if reason is None:
        assert plan.store_notes == []
        return
    assert reason in "\n".join(plan.store_notes)
    assert reason in "\n".join(describe_stores(plan))
    assert reason in dict(page_rows(plan))["Teacher asked in every run"]


def test_a_single_student_needs_no_store_and_no_look_at_its_file(decided):
    plan = decided({"small": AssertionError("looked at")}, students=[("small", "student.yaml")])
    assert plan.store_notes == ["small: each teacher has one student"]


def test_teachers_that_answer_faster_than_an_image_is_loaded(decided, monkeypatch):
    size = Size(parameters=1, operations=8_050_560)
    monkeypatch.setattr(TIMM, "size", lambda plan, teacher: size)
    assert "an image takes 8.05 million operations, less than loading" in decided().store_notes[0]
    assert len(decided(mode="always").stores) == 6


def test_room_on_the_disk(decided, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 15_000))
    assert "more than half of the 15 kB that are free" in decided().store_notes[0]


def test_data_that_is_not_there_yet(decided, data, plan_of, tmp_path):
    shutil.rmtree(data.parent)
    assert "is not known before the data is there" in decided().store_notes[0]
    for prepare, images in (("digits", 1201), ("fashion-mnist", 60_000)):
        plan = with_stores(asking(replace(plan_of(tmp_path), prepare=prepare)))
        assert plan.stores[0].size == images * EPOCHS * (4 + CLASSES * 6)


def test_a_study_goes_on_as_it_was_begun(decided):
    plan = decided(mode="off")
    begin(plan, plan.runs[-1])
    assert decided().store_notes == ["small, big: the study was begun without a store"]
    begun = decided(mode="always")
    begin(begun, begun.runs[-1])
    assert decided(limit_gb=1e-6).stores == begun.stores  # whatever has changed since


def test_what_is_asked_for_is_done_or_refused(decided, monkeypatch):
    assert len(decided(mode="always", limit_gb=1e-6).stores) == 6
    assert len(decided(mode="always", students=[("small", "student.yaml")]).stores) == 6
    plan = decided(top_k=2, limit_gb=1e-6)
    assert {(store.top_k, store.values) for store in plan.stores} == {(2, "float16")}
    assert "2 likeliest entries" in loss_note(plan)
    assert "changes the loss" in describe_stores(plan)[0]
    assert loss_note(decided()) == ""
    assert decided(top_k=CLASSES, values="float32").stores == decided().stores
    assert "stored as float16" in loss_note(decided(values="float16"))
    plan = decided(views=2, limit_gb=1e-6)
    # The students of 3 epochs read them in turn, those of 2 in the same store one after the other.
    assert {(store.epochs, store.views) for store in plan.stores} == {(2, True)}
    commands = [
        TIMM.command(plan, plan.run(plan.stores[0].students[0])),
        TIMM.store_command(plan, plan.stores[0]),
    ]
    assert all(words[words.index("--kd-soft-labels-views") + 1] == "2" for words in commands)
    assert "read 2 stored views" in loss_note(plan)
    assert plan.settings(plan.run(plan.stores[0].students[0]))["soft_labels"]["views"] == 2
    assert decided(views=9).stores == decided().stores
    with pytest.raises(LskdError, match=r"soft_labels: it mixes; fix that or remove it"):
        decided({"small": CannotStoreError("it mixes")}, mode="always")


def test_drawn_packed_and_the_rest(decided, plan_of, tmp_path):
    plan = decided(sampled=2, values="packed", limit_gb=1e-6)
    assert {(store.top_k, store.sampled, store.values) for store in plan.stores} == {(2, True, "packed")}
    assert plan.stores[0].size == IMAGES * EPOCHS * (4 + 2 + 1)  # seed, two codes, two ids of two bits
    words = " ".join(TIMM.command(plan, plan.run(plan.stores[0].writer)))
    assert "--kd-soft-labels-sampled 2 --kd-soft-labels-values packed --kd-soft-labels-seed" in words
    assert plan.settings(plan.run(plan.stores[0].writer))["soft_labels"] == {"sampled": 2, "values": "packed"}
    assert "learn from 2 drawn entries" in loss_note(plan)
    assert "6 stores, 2 drawn in packed, serve 12 students, which changes" in describe_stores(plan)[0]
    assert decided(sampled=CLASSES, values="float32").stores == decided().stores
    plan = decided(top_k=2, rest="lump")
    assert "--kd-soft-labels-top-k 2 --kd-soft-labels-values float16 --kd-rest lump" in " ".join(
        TIMM.store_command(plan, plan.stores[0])
    )
    assert "2 likeliest entries of what the teacher says, lump the rest, stored" in loss_note(plan)
    assert plan.settings(plan.run(plan.stores[0].writer))["soft_labels"]["rest"] == "lump"
    # What is asked for is asked for of a single student too.
    assert len(decided(views=2, students=[("small", "student.yaml")]).stores) == 6


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"top_k": 5}, "top_k is 5; there are 4 classes"),
        ({"sampled": 5}, "sampled is 5; there are 4 classes"),
        ({"sampled": 2, "top_k": 2}, "give one"),
        ({"sampled": 2, "rest": "lump"}, "leaves no rest"),
        ({"rest": "lump"}, "all entries are kept; add top_k"),
        ({"rest": "lump", "top_k": CLASSES}, "all entries are kept; add top_k"),
        ({"sampled": 2, "top_k": 2, "mode": "off"}, "give one"),
        ({"sampled": 2}, "right at temperature 1 and biased at 2"),
        ({"top_k": 2, "values": "packed"}, "packed, too coarse"),
        ({"top_k": 2, "values": "packed", "rest": "lump"}, "packed, too coarse"),
        ({"top_k": 2, "values": "packed", "rest": "restrict"}, None),
        ({"values": "packed"}, None),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_trained(
    decided, plan_of, tmp_path, asked, reason
):
    decided()
    plan = asking(plan_of(tmp_path, students=[("small", "student.yaml")], temperatures=[1, 2]), **asked)
    if reason is None:
        assert len(with_stores(plan).stores) == 6
        return
    with pytest.raises(LskdError, match=f"study.yaml: soft_labels.*{reason}") as error:
        with_stores(plan)
    assert "\n" not in str(error.value)


def test_translations_are_stored_only_as_top_k(tmp_path, plan_of):
    def decide(student=None, **asked):
        configs = {"student.yaml": student or {"optimization": {"max_epoch": 5}}, "teacher.yaml": {}}
        plan = replace(plan_of(tmp_path, ecosystem="fairseq"), num_classes=0, configs=configs)
        return with_stores(asking(plan, **asked))

    assert decide().stores == []
    assert "needs soft_labels.top_k" in decide().store_notes[0]
    with pytest.raises(LskdError, match="soft_labels of translations need top_k"):
        decide(mode="always")
    found = decide(top_k=8)
    assert [(store.top_k, store.epochs, store.asked) for store in found.stores] == [(8, 1, 10)] * 6
    assert "pass over the training sentences 6 times instead of 60" in "\n".join(describe_stores(found))
    student = found.runs[-1]
    command = rerun_command(found, student)
    assert command.startswith("python -m fairseq_kd.soft_labels data --path out/teachers/")
    store = found.store_of(student)
    assert f"--output rerun/soft_labels/{store.id} && " in command
    assert f"++task.kd_soft_labels=rerun/soft_labels/{store.id}" in command
    for section, reason in (
        ({"task": {"kd_soft_labels": "x"}}, "a store of its own"),
        ({"criterion": {"kd_preset": "tan2019"}}, "asks for the top 8"),
        ({"task": {"truncate_source": True}}, "truncate_source"),
        ({"criterion": {"kd_on_policy": 0.5}}, "need all words of an online teacher"),
        ({"criterion": {"kd_divergence": "reverse"}}, "need all words of an online teacher"),
    ):
        for kept in (7, 9):  # the study's page says how many words students learn from
            with pytest.raises(LskdError, match=reason):
                decide(section, top_k=kept)
    for criterion in ({"kd_preset": "tan2019"}, {"kd_preset": "tan2019", "kd_top_k": 0}):
        assert decide({"criterion": criterion}, top_k=8).stores
    drawn = decide(sampled=7)
    (words,) = {tuple(drawn_command(drawn, store)) for store in drawn.stores}
    assert words == ("--sampled", "7", "--values", "float16")
    for criterion, reason in (
        ({"kd_preset": "tan2019"}, "asks for the top 8 with kd_rest renormalise"),
        ({"kd_rest": "lump"}, "kd_rest lump, and what soft_labels.sampled draws has no rest"),
        ({"kd_sampled": 8}, "sets kd_sampled"),
    ):
        with pytest.raises(LskdError, match=reason):
            decide({"criterion": criterion}, sampled=7)
    with pytest.raises(LskdError, match="views are of images"):
        decide(mode="off", views=2)
    assert decide(mode="off").stores == decide(mode="off").store_notes == []
    found = decide(top_k=8, rest="spread")
    assert "++criterion.kd_rest=spread" in rerun_command(found, found.runs[-1])


def drawn_command(plan: Plan, store: Store) -> list[str]:
    words = trainer_of("fairseq", "student").store_command(plan, store)
    return words[words.index("--sampled") :][:4]


class Study:
    """A study whose first teacher is trained, and whose trainer's command stores half before it is killed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.store, self.calls = plan, plan.stores[0], []
        self.folder, self.labels = plan.root / self.store.folder, Path(plan.labels(self.store))
        self.students = [plan.run(name) for name in self.store.students]
        self.teacher = plan.folder(plan.run(self.store.teacher))
        self.teacher.mkdir(parents=True)
        (self.teacher / CHECKPOINT).write_text("weights")
        checkpoint = {"sha256": file_checksum(self.teacher / CHECKPOINT)}
        (self.teacher / JOB).write_text(json.dumps({"checkpoint": checkpoint}))
        plan.write()

    def write(self, words: list[str]) -> None:
        self.calls.append(words)
        layout = SoftLabelsLayout(CLASSES, CLASSES, IMAGES, EPOCHS, 1, "float32", True)
        with SoftLabelsWriter(Path(words[words.index("--kd-soft-labels") + 1]), layout, {}) as writer:
            count = layout.keys // 2 if len(self.calls) == 1 else layout.keys - writer.keys
            values, ids = np.zeros((count, CLASSES), np.float32), np.tile(np.arange(CLASSES), (count, 1))
            writer.append(values, ids, seeds=np.zeros(count, np.uint32))
            writer.commit()
            if len(self.calls) == 1:
                raise KeyboardInterrupt

    def main(self, name: str = "") -> int:
        return main([str(self.plan.root / PLAN), name or self.store.id])

    def record(self) -> dict:
        return json.loads((self.folder / JOB).read_text())


@pytest.fixture
def study(decided, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Study(decided())
    monkeypatch.setattr(TIMM, "store", found.write)
    return found


def finish(plan: Plan, run: Run) -> None:
    plan.folder(run).mkdir(parents=True, exist_ok=True)
    (plan.folder(run) / JOB).write_text("{}")


def test_a_store_is_written_gone_on_with_read_and_removed(study):
    plan, store, labels = study.plan, study.store, study.labels
    assert study.main() == 130
    assert not contains(plan, store)
    with pytest.raises(LskdError, match=r"does not contain what student-.* reads; run `lskd study` again"):
        job.run_job(plan, study.students[0])
    assert len(SoftLabels(labels)) == IMAGES * EPOCHS // 2
    assert study.main() == 0
    assert len(study.calls) == 2
    assert study.calls[1][:2] == ["timm", "soft-labels"]
    assert "--experiment" not in study.calls[1]
    assert contains(plan, store)
    assert study.record()["resumed"] == 1
    assert study.record()["soft_labels"]["rows"] == IMAGES * EPOCHS
    assert study.record()["soft_labels"]["checksum"] == SoftLabels(labels).info()["checksum"]
    # It stays until its last student is finished.
    first, second = study.students
    finish(plan, first)
    release_stores(plan)
    assert labels.exists()
    finish(plan, second)
    release_stores(replace(plan, soft_labels={**plan.soft_labels, "keep": True}))
    assert labels.exists()
    notes = labels / "mine.txt"
    notes.write_text("mine")
    release_stores(plan)
    assert list(labels.iterdir()) == [notes]  # what nobody but the user wrote stays
    notes.unlink()
    release_stores(plan)
    assert not labels.exists()
    assert study.record()["removed"] is True
    assert "removed after use" in dict(page_rows(plan))["Teacher asked once"]
    renew_stores(plan)
    assert (study.folder / JOB).exists()  # nobody needs it
    (plan.folder(second) / JOB).unlink()
    renew_stores(plan)
    assert not (study.folder / JOB).exists()  # so that it is written again


def test_a_retrained_teacher_is_asked_again_and_only_what_the_study_wrote_is_removed(study):
    study.main()
    notes = study.folder / "notes" / "mine.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    (study.teacher / CHECKPOINT).write_text("other weights")
    assert study.main() == 0
    assert study.record()["resumed"] == 0
    assert notes.read_text() == "mine"
    assert not contains(study.plan, study.store)  # the teacher's own record is still the old one
    with pytest.raises(LskdError, match="does not contain"):
        job.run_job(study.plan, study.students[0])


def test_a_failing_store_is_one_line(study, monkeypatch, capfd):
    def fail(words):
        os.write(2, b"timm: error: No space left on device\n")
        raise SystemExit(2)

    monkeypatch.setattr(TIMM, "store", fail)
    assert study.main() == 1
    last = capfd.readouterr().err.splitlines()[-1]
    name = f"soft labels of {study.store.id}"
    assert last.startswith(f"lskd: error: {name} failed: No space left on device; ")
    assert "train.log" in last


def test_soft_labels_of_others_are_moved_aside(study, capsys):
    study.labels.mkdir(parents=True)
    (study.labels / "mine").write_text("mine")
    assert study.main() == 130
    assert "it was moved to" in capsys.readouterr().err
    assert Path(f"{study.folder}.aside-1", "labels", "mine").read_text() == "mine"
    assert not (study.labels / "mine").exists()
    assert len(study.calls) == 1


@pytest.mark.parametrize("who", ["teacher", "store"])
def test_a_store_of_what_diverged_is_failed_and_so_are_its_students(study, monkeypatch, who):
    def diverge(words):
        raise DivergedError("epoch 0: the teacher's answers are nan")

    if who == "teacher":
        job_of_teacher = json.loads((study.teacher / JOB).read_text())
        (study.teacher / JOB).write_text(json.dumps(job_of_teacher | {"failed": "epoch 3: nan"}))
    else:
        monkeypatch.setattr(TIMM, "store", diverge)
    own = f"its teacher {study.store.teacher} failed: epoch 3: nan"
    reason = own if who == "teacher" else "epoch 0: the teacher's answers are nan"
    assert study.main() == 0
    assert study.plan.failed(study.store) == reason
    assert not contains(study.plan, study.store)
    assert study.main(study.students[0].id) == 0
    assert study.plan.failed(study.students[0]).endswith(reason)
    assert study.calls == []
    assert "Teacher asked once" in dict(page_rows(study.plan))


def test_soft_labels_of_other_data_are_not_read(study):
    study.main()
    assert study.main() == 0
    (study.plan.data_dir / "train" / "new").mkdir(parents=True)
    (study.plan.data_dir / "train" / "new" / "1.png").write_bytes(b"1")
    with pytest.raises(LskdError, match=r"the data in data changed since out/soft_labels/.* was written"):
        job.run_job(study.plan, study.students[0])
    with pytest.raises(LskdError, match=r"the data in data changed since 1 runs of out"):
        check_unchanged(study.plan)


def said_of(trainer: Trainer, plan: Plan, run: Run) -> str:
    """Why a student's images are not stored, or not unasked."""
    try:
        caution: str = trainer.views(plan, run).caution
    except CannotStoreError as error:
        return str(error)
    return caution


TRAINER = {"in_chans": 1, "img_size": 32, "epochs": 3, "warmup_epochs": 0, "sched": "cosine", "lr": 0.1}


@pytest.fixture
def timm_plan(tmp_path, plan_of, monkeypatch):
    """Make a plan of a file of timm's with these options, for a teacher and a student."""
    monkeypatch.chdir(tmp_path)

    def make(teacher="test_resnet", **options) -> Plan:
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(TRAINER | options))
        plan = plan_of(tmp_path, teachers=[(teacher, "one.yaml")], students=[("test_byobnet", "one.yaml")])
        return replace(plan, configs={"one.yaml": TRAINER | options})

    return make


def test_what_a_teachers_answer_takes(timm_plan):
    work = []
    for pixels in (32, 64):
        plan = timm_plan("resnet10t", img_size=pixels)
        work.append(TIMM.size(plan, plan.runs[0]).operations)
    assert 3.5 < work[1] / work[0] < 4.5  # four times the pixels


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {"lr": 0.2, "batch_size": 8, "epochs": 4, "opt": "adamw", "drop_path": 0.1}, True),
        ({}, {"img_size": 40}, False),
        ({}, {"hflip": 0.2}, False),
        ({}, {"mean": [0.4]}, False),
        ({}, {"aa": "rand-m5-mstd0.5"}, False),
        ({}, {"kd_teacher_img_size": 40}, False),
        ({}, {"amp": True, "amp_dtype": "bfloat16"}, False),
        ({"reprob": 0.2}, {"reprob": 0.2, "lr": 0.2}, True),
    ],
)
def test_what_timms_images_follow_from(timm_plan, one, other, same):
    found = []
    for options in (one, other):
        plan = timm_plan(**options)
        found.append(TIMM.views(plan, plan.runs[-1]))
    assert (found[0].key == found[1].key) is same
    assert found[0].epochs == 3
    assert found[0].caution == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mixup": 0.2}, "mixed one by one"),
        ({"kd_soft_labels": "own"}, "one.yaml has a store of its own"),
        ({"mixup": 0.2, "mixup_mode": "pair"}, "--mixup-mode pair"),
        ({"kd_teacher_fast": "float32", "kd_teacher_dtype": "bfloat16"}, "--kd-teacher-fast"),
    ],
)
def test_what_timm_cannot_store(timm_plan, options, reason):
    plan = timm_plan(**options)
    assert reason in said_of(TIMM, plan, plan.runs[-1])


PIPELINE = "train_dataloader = dict(dataset=dict(pipeline="
BINARY = str(Path(__file__).parents[2] / "recipes" / "digits_bnn" / "student.py")


@pytest.fixture(scope="module")
def recipe():
    return MMCLS.read_config(Path(BINARY))


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ("optim_wrapper = dict(optimizer=dict(lr=1e-3))", True),
        ("model = dict(backbone=dict(width=0.5))", True),
        ("train_dataloader = dict(batch_size=16)", True),
        ("train_cfg = dict(max_epochs=20)", True),
        ("train_dataloader = dict(dataset=dict(data_prefix='other'))", False),
        ("model = dict(teacher=dict(mean=[1.0]))", False),
        ("model = dict(train_cfg=dict(augments=dict(type='Mixup', num_classes=10)))", "one by one"),
        ("model = dict(distillation=dict(soft_labels=dict(path='x')))", "a store of its own"),
        ("custom_hooks = [dict(type='TeacherHook')]", "no SoftLabelsHook"),
        ("train_dataloader = dict(sampler=dict(type='RepeatAugSampler'))", "has RepeatAugSampler"),
        (f"{PIPELINE}[dict(type='RandomApply', transforms=[dict(type='Albumentations')])]))", "has Albument"),
        (f"{PIPELINE}[dict(type='Mine')]))", "has Mine"),
    ],
)
def test_what_mmcls_images_follow_from(tmp_path, plan_of, recipe, change, outcome):
    (tmp_path / "other.py").write_text(f"_base_ = {BINARY!r}\n{change}\n")
    configs = {"one.py": recipe, "other.py": MMCLS.read_config(tmp_path / "other.py")}
    plan = plan_of(tmp_path, ecosystem="mmcls", students=[("one", "one.py"), ("two", "other.py")])
    plan = replace(plan, configs=configs)
    one, two = (next(run for run in plan.runs if run.model == model) for model in ("one", "two"))
    if isinstance(outcome, str):
        assert outcome in said_of(MMCLS, plan, two)
    else:
        assert said_of(MMCLS, plan, two) == ""
        assert (MMCLS.views(plan, two).key == MMCLS.views(plan, one).key) is outcome


def test_mixed_precision_of_another_type_is_another_store(tmp_path, plan_of, recipe):
    plan = plan_of(tmp_path, ecosystem="mmcls", students=[("one", "one.py")])
    run = next(run for run in plan.runs if run.model == "one")
    amp = {"type": "AmpOptimWrapper"}
    keys = set()
    for wrapper in ({}, amp, amp | {"dtype": "bfloat16"}, amp | {"dtype": torch.float16}):
        configs = {"one.py": recipe | {"optim_wrapper": wrapper}}
        keys.add(MMCLS.views(replace(plan, configs=configs), run).key)
    assert len(keys) == 4


def test_jobs_that_share_no_files_with_the_scheduler_hand_over_their_records(decided):
    """On Kubernetes Snakemake looks for job.json in a folder of its own, of soft labels too."""
    plan = decided()
    plan.write()
    words = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--directory", str(plan.root)]
    words += ["--cores", "1", "--dry-run", "--printshellcmds", "--config", "copied=true"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    printed = found.stdout + found.stderr
    for made in (plan.runs[0], plan.stores[0]):
        record = Path(made.folder, JOB)
        assert f"{made.id} && cp {shlex.quote(str(plan.root / record))} {record}\n" in printed
