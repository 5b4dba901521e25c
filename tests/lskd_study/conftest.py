"""Finished studies without any training: run folders with simulated results, as a job would write them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lskd_study.base.text import csv_text
from lskd_study.plan.plan import CURVES, JOB, LOGITS, TRANSLATIONS, Plan, Run, expand
from lskd_study.runs.data_checksum import data_checksum
from lskd_study.study import engine
from lskd_study.trainers.fairseq import Fairseq
from lskd_study.trainers.timm import Timm
from scenes import Scene

NUM_CLASSES = 4


def make_plan(root: Path, **changes: object) -> Plan:
    matrix = {
        "smoothing": [0.0, 0.1],
        "seeds": [0, 1, 2],
        "teachers": [("big", "teacher.yaml")],
        "students": [("small", "student.yaml"), ("big", "student.yaml")],
        "temperatures": [1.0],
        "hard_weights": [0.0],
        "controls": [],
        "student_seeds": 1,
    }
    matrix |= {key: value for key, value in changes.items() if key in matrix}
    return Plan(
        title="Simulated study <of> nothing",
        study_file="study.yaml",
        ecosystem=str(changes.get("ecosystem", "timm")),
        cwd=str(root),
        output="out",
        data="data",
        prepare="",
        num_classes=NUM_CLASSES,
        convention="paper",
        smoothing=sorted(matrix["smoothing"]),
        seeds=matrix["seeds"],
        student_seeds=matrix["student_seeds"],
        threads=1,
        resources={},
        configs={"teacher.yaml": {"epochs": 5}, "student.yaml": {"epochs": 5}},
        runs=expand(**matrix),
    )


def write_run(plan: Plan, run: Run, logits: np.ndarray, labels: np.ndarray, curves: dict[str, float]) -> None:
    folder = plan.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    names = "\n".join(f"val/{label}/{i:04d}.png" for i, label in enumerate(labels.tolist()))
    tensors = {
        "logits": logits.astype(np.float16),
        "labels": labels.astype(np.int64),
        "keys": np.frombuffer(names.encode(), dtype=np.uint8),
    }
    save_file(tensors, folder / LOGITS)
    rows = [
        dict.fromkeys(Timm.curve_columns, "")
        | {name: str(v + 4.0**-epoch) for name, v in curves.items()}
        | {"epoch": str(epoch)}
        for epoch in range(5)
    ]
    write_curves(folder, Timm.curve_columns, rows)
    write_job(plan, run)


def write_curves(folder: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    (folder / CURVES).write_text(csv_text(columns, ([row[name] for name in columns] for row in rows)))


def write_job(plan: Plan, run: Run) -> None:
    job = {
        "run": run.id,
        "role": run.role,
        "command": f"timm train.py data --model {run.model} --seed {run.seed} --experiment {run.id}",
        "cwd": plan.cwd,
        "environment": {"OMP_NUM_THREADS": "1"},
        "settings": plan.settings(run),
        "seed": run.seed,
        "teacher": {"run": run.teacher, "checkpoint_sha256": run.teacher} if run.teacher else None,
        "checkpoint": {"file": "last.pth.tar", "sha256": run.id},
        "data": {"path": "data", "sha256": data_checksum(plan) if plan.data_dir.exists() else "0" * 64},
        "versions": {"python": "3.11.7", "lskd": "0.1.0", "torch": "2.14.1"},
        "git": {"commit": "a" * 40, "modified": True},
        "hardware": {"cpu": "A processor", "cores": 2, "gpus": [], "system": "Linux"},
        "finished": "2026-01-01T00:00:00+00:00",
        "wall_time_s": 12.3,
        "resumed": 0,
    }
    (plan.folder(run) / JOB).write_text(json.dumps(job))


def fail_run(plan: Plan, run: Run, reason: str) -> None:
    """Leave of a run what one leaves that diverged, and of a teacher's students what they leave."""
    path = plan.folder(run) / JOB
    path.write_text(json.dumps(json.loads(path.read_text()) | {"failed": reason}))
    for name in (LOGITS, CURVES, TRANSLATIONS):
        (plan.folder(run) / name).unlink(missing_ok=True)
    for student in plan.runs:
        if student.teacher == run.id:
            fail_run(plan, student, f"its teacher {run.id} failed: {reason}")


@pytest.fixture
def fail() -> Callable[[Plan, Run, str], None]:
    return fail_run


StudyMaker = Callable[..., Plan]


@pytest.fixture
def plan_of() -> StudyMaker:
    """Make a plan without any runs."""
    return make_plan


def study_maker(root: Path) -> StudyMaker:
    """Make finished studies; ``effect``: added to the right class in students of smoothed teachers.

    ``taught``: in all students.
    """

    def make(
        effect: float = 0.0,
        per_class: int = 60,
        noise: float = 0.3,
        seed: int = 0,
        taught: float = 0.0,
        **changes: object,
    ) -> Plan:
        plan = make_plan(root, **changes)
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(NUM_CLASSES), per_class)
        easy = rng.normal(2.0, 1.5, len(labels))
        own = np.eye(NUM_CLASSES)[labels]
        for run in plan.runs:
            strength = easy + noise * rng.standard_normal(len(labels))
            smoothed = run.smoothing > 0
            if run.role == "teacher" and smoothed:
                strength = 0.5 * strength + 1.5
            if run.role == "student" and smoothed:
                strength = strength + effect
            if run.role == "student":
                strength = strength + taught
            logits = own * strength[:, None] + 0.2 * rng.standard_normal((len(labels), NUM_CLASSES))
            jitter = 0.01 * rng.standard_normal()
            entropy = 0.5 if smoothed else 0.1
            curves = {"val_top1": 70 + jitter, "val_top5": 100.0, "val_loss": 0.3}
            if run.role != "student":
                curves["train_hard_ce"] = 0.2 + jitter
            else:
                parts = {"train_kl": 0.05 + jitter, "train_teacher_entropy": entropy + jitter}
                curves |= parts | {"train_ce": sum(parts.values())}
                curves |= {"train_hard_ce": 0.2, "train_agreement": 0.9}
            write_run(plan, run, logits, labels, curves)
        plan.write()
        return plan

    return make


@pytest.fixture
def leave() -> Callable[..., None]:
    """Leave what one finished run leaves: logits, labels and curves as they are given."""
    return write_run


@pytest.fixture
def finish() -> Callable[[Plan], None]:
    """Finish all runs of a plan, as if they had been trained (logits without meaning)."""

    def write_all(plan: Plan) -> None:
        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(plan.num_classes), 10)
        for run in plan.runs:
            names = ("val_top1", "train_ce", "train_kl", "train_teacher_entropy", "train_hard_ce")
            curves = {name: float(rng.random()) for name in names}
            write_run(plan, run, rng.normal(size=(len(labels), plan.num_classes)), labels, curves)
            begun = {"settings": plan.settings(run)}
            (plan.folder(run) / "begun.json").write_text(json.dumps(begun))

    return write_all


@pytest.fixture
def fake_study(tmp_path: Path) -> StudyMaker:
    return study_maker(tmp_path)


@pytest.fixture(scope="session")
def fake_study_at() -> Callable[[Path], StudyMaker]:
    return study_maker


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Scene:
    monkeypatch.chdir(tmp_path)
    capture = "capfd" if "capfd" in request.fixturenames else "capsys"  # a test has one of them
    found = Scene(tmp_path, request.getfixturevalue(capture))
    found.set_up()
    return found


WORDS = [f"word{i}" for i in range(40)]


def translation_maker(root: Path) -> StudyMaker:
    """Make finished studies of translation out of random words.

    ``level``: the odds (logarithm) that a word is right; ``effect`` and ``teacher_effect``: added to them in
    students of smoothed teachers and in smoothed teachers; ``perplexity_effect``: of smoothed teachers.
    """

    def make(
        effect: float = 0.0,
        teacher_effect: float = 0.0,
        perplexity_effect: float = 0.0,
        sentences: int = 120,
        length: int = 8,
        level: float = 1.0,
        seed: int = 0,
        **changes: object,
    ) -> Plan:
        plan = make_plan(root, ecosystem="fairseq", **changes)
        rng = np.random.default_rng(seed)
        references = [list(rng.choice(WORDS, rng.integers(2, 2 * length))) for _ in range(sentences)]
        easy = level + rng.standard_normal(sentences)
        for run in plan.runs:
            smoothed = float(run.smoothing > 0)
            odds = easy + 0.3 * rng.standard_normal(sentences) + 0.03 * rng.standard_normal()
            odds = odds + smoothed * (effect if run.role == "student" else teacher_effect)
            lines = []
            for number, (reference, own) in enumerate(zip(references, odds, strict=True)):
                right = rng.random(len(reference)) < 1 / (1 + np.exp(-own))
                tokens = [w if ok else str(rng.choice(WORDS)) for w, ok in zip(reference, right, strict=True)]
                lines.append(sentence_line(number, reference, tokens))
            folder = plan.folder(run)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRANSLATIONS).write_text("".join(lines))
            write_curves(folder, Fairseq.curve_columns, translation_curves(run, rng, perplexity_effect))
            write_job(plan, run)
        plan.write()
        return plan

    return make


def sentence_line(number: int, reference: list[str], hypothesis: list[str]) -> str:
    """A line of the file of translations; tokenised, the full stop stands apart."""
    content: dict[str, object] = {"id": number, "source": f"satz {number} ."}
    for name, words in (("reference", reference), ("hypothesis", hypothesis)):
        content[name] = " ".join(words) + "."
        content[f"{name}_tokens"] = " ".join([*words, "."])
    right = [int(word == own) for word, own in zip(reference, hypothesis, strict=True)]
    content |= {"confidence": [0.9] * len(right), "correct": right}
    return json.dumps(content) + "\n"


def translation_curves(
    run: Run, rng: np.random.Generator, perplexity_effect: float, epochs: int = 6
) -> list[dict[str, str]]:
    jitter = 0.02 * rng.standard_normal()
    rows = []
    for epoch in range(epochs):
        # The best validation BLEU comes before the last epoch; the perplexity goes on rising.
        bleu = 30 - 20 / (epoch + 1) + jitter - (2 if epoch == epochs - 1 else 0)
        loss = 1.5 + 0.1 * abs(epoch - 2) + jitter + perplexity_effect * (run.smoothing > 0)
        row = {"epoch": epoch, "val_bleu": round(bleu, 2), "val_loss": loss, "val_ppl": np.exp(loss)}
        row["train_hard_ce"] = 2 + jitter
        if run.role == "student":
            parts = {"train_kl": 0.3 + jitter, "train_teacher_entropy": 1 + (run.smoothing > 0) + jitter}
            row |= {**parts, "train_ce": sum(parts.values()), "train_agreement": 0.7}
        rows.append(
            dict.fromkeys(Fairseq.curve_columns, "") | {name: str(value) for name, value in row.items()}
        )
    return rows


@pytest.fixture
def translation_study(tmp_path: Path) -> StudyMaker:
    return translation_maker(tmp_path)


@pytest.fixture(scope="session")
def translation_study_at() -> Callable[[Path], StudyMaker]:
    return translation_maker


CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing outside, not even the distribution's start page
    "--homepage=about:blank",
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium, one for all pages; the log of its console and of its requests is kept."""
    selenium = pytest.importorskip("selenium.webdriver")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if path is None or driver is None:
        reason = "no chromium with chromedriver here; on Debian: apt install chromium chromium-driver"
        if os.environ.get("LSKD_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    options = selenium.ChromeOptions()
    options.binary_location = path
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    found.get("about:blank")
    found.get_log("browser")  # of Chromium's own first page
    yield found
    found.quit()


@pytest.fixture
def scheduled(monkeypatch) -> list[list[str]]:
    """Commands that would have started Snakemake; nothing is run."""
    commands: list[list[str]] = []
    real = subprocess.Popen

    class Process:
        def wait(self):
            return 1

    def start(command, **options):
        if "snakemake" not in command:  # what plugins of Snakemake ask the machine
            return real(command, **options)
        assert options["pass_fds"]
        commands.append(command)
        return Process()

    monkeypatch.setattr(engine.subprocess, "Popen", start)
    return commands
