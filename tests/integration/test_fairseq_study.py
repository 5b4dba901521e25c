"""`lskd study` in translation, in miniature: a run is killed, the same command goes on, and the page."""

import csv
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

import forked
from events import assert_are_curves
from lskd.checkpoints import file_checksum
from lskd_study.stores.decide import with_stores
from lskd_study.study.engine import make_plan
from lskd_study.trainers.fairseq import Fairseq

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RECIPES = Path(__file__).parents[2] / "recipes" / "number_words_de_en"
EPOCHS = 3
SENTENCES = 30
SIDE = {"embed_dim": 32, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 1}


def write_files(folder: Path) -> None:
    for role in ("teacher", "student"):
        content = yaml.safe_load((RECIPES / f"{role}.yaml").read_text())
        content["model"] |= {"encoder": SIDE, "decoder": SIDE}
        content["optimization"]["max_epoch"] = EPOCHS
        content["task"]["eval_bleu_args"] = '{"beam": 1, "max_len_a": 1.2, "max_len_b": 10}'
        (folder / f"{role}.yaml").write_text(yaml.safe_dump(content))
    study = yaml.safe_load((RECIPES / "study.yaml").read_text())
    options = {"train": 300, "valid": 20, "test": SENTENCES, "bpe-tokens": 50}
    study |= {
        "tracker": "tensorboard",
        "output": "runs/mini",
        "seeds": [1],
        "controls": ["smoothed"],
        "data": study["data"] | {"options": options},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))


def study(folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "lskd_study", "study", "study.yaml", "--cores", "1"]
    return subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill_the_first_run(process: subprocess.Popen[str], runs: Path) -> str:
    """Kill the job that trains, once an epoch is logged, its checkpoint written; return the run's name."""
    while process.poll() is None:
        for found in runs.glob("teachers/*/hydra_train.log"):
            if "[train][INFO] - {" not in found.read_text():
                continue
            for job in psutil.Process(process.pid).children(recursive=True):
                words = job.cmdline()
                if words[1:3] == ["-m", "lskd_study.runs"] and words[-1] == found.parent.name:
                    job.kill()
                    return found.parent.name
        time.sleep(0.01)
    raise AssertionError(f"no run was killed: {process.communicate()}")


def test_a_study_of_translation(tmp_path, monkeypatch):
    write_files(tmp_path)
    runs = tmp_path / "runs" / "mini"
    process = study(tmp_path)
    killed = kill_the_first_run(process, runs)
    _, err = process.communicate()
    assert process.returncode == 1
    assert f"2 of 5 runs are missing: {killed}, " in err
    assert not (runs / "teachers" / killed / "job.json").exists()
    assert "missing" in (runs / "index.html").read_text()

    process = study(tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert f"resumes  {killed}" in err
    assert err.count("starts ") == 1  # the killed teacher's student
    plan = json.loads((runs / "plan.json").read_text())
    assert (plan["ecosystem"], len(plan["runs"])) == ("fairseq", 5)
    folders = [runs / f"{run['role']}s" / run["id"] for run in plan["runs"]]
    references = set()
    for folder in folders:
        job = json.loads((folder / "job.json").read_text())
        assert job["resumed"] == (folder.name == killed)
        assert job["checkpoint"] == {
            "file": "checkpoint_best.pt",
            "sha256": file_checksum(folder / "checkpoint_best.pt"),
        }
        if job["role"] == "student":
            taught_by = runs / "teachers" / job["teacher"]["run"] / "checkpoint_best.pt"
            assert job["teacher"]["checkpoint_sha256"] == file_checksum(taught_by)
        with (folder / "curves.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(EPOCHS)]
        logged = {"train_hard_ce", "val_loss", "val_bleu", "val_ppl"}
        if job["role"] == "student":
            logged |= {"train_ce", "train_kl", "train_teacher_entropy", "train_agreement"}
        assert {name for row in rows for name, value in row.items() if value} == {"epoch", *logged}
        assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
        assert_are_curves(folder)
        lines = [json.loads(text) for text in (folder / "translations.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == list(range(SENTENCES))
        if job["role"] == "control":
            # The networks are one, and so are the files but for the criterion: it is the teacher's twin.
            assert (job["teacher"], job["soft_labels"]) == (None, None)
            twin = runs / "teachers" / folder.name.replace("control", "teacher")
            for name in ("translations.jsonl", "curves.csv"):
                assert (folder / name).read_bytes() == (twin / name).read_bytes()
        references.add(tuple((line["source"], line["reference"]) for line in lines))
    words = tmp_path / "data" / "number_words_de_en" / "words"
    text = [(words / f"test.{side}").read_text() for side in ("de", "en")]
    assert references == {tuple(zip(*(part.splitlines() for part in text), strict=True))}
    page = (runs / "index.html").read_text()
    assert "Fig. 7" in page
    assert killed in page

    # What the page shows can be pasted, and an unbroken run has the curve of the one that was killed.
    job = json.loads((runs / "teachers" / killed / "job.json").read_text())
    done = forked.run(*shlex.split(job["rerun_command"]), imported=("fairseq_cli.train",), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    unbroken = Fairseq().read_curves(tmp_path / "rerun" / killed, "teacher")
    assert unbroken == Fairseq().read_curves(runs / "teachers" / killed, "teacher")

    monkeypatch.chdir(tmp_path)
    check_a_store(tmp_path)


def check_a_store(folder: Path) -> None:
    """One teacher of the study above is asked once, by jobs as the workflow starts them."""
    content = yaml.safe_load((folder / "study.yaml").read_text())
    content |= {"output": "runs/stored", "soft_labels": {"sampled": 8, "values": "packed"}}
    (folder / "stored.yaml").write_text(yaml.safe_dump(content))
    plan = with_stores(make_plan("stored.yaml", None))
    store = plan.stores[0]
    (student,) = (plan.run(name) for name in store.students)
    shutil.copytree(
        folder / "runs" / "mini" / "teachers" / store.teacher, plan.root / "teachers" / store.teacher
    )
    plan.write()
    for job in (store.id, student.id):
        words = ("-m", "lskd_study.runs", plan.root / "plan.json", job)
        done = forked.run(*words, imported=("fairseq_cli.train",), cwd=folder)
        assert done.returncode == 0, done.stderr
    record = json.loads((plan.root / store.folder / "job.json").read_text())
    assert (record["soft_labels"]["samples"], record["soft_labels"]["sampled"]) == (300, 8)
    assert record["removed"]  # its only student is finished
    job = json.loads((plan.folder(student) / "job.json").read_text())
    assert job["soft_labels"]["checksum"] == record["soft_labels"]["checksum"]
    assert job["settings"]["soft_labels"] == {"sampled": 8, "values": "packed"}
    rows = Fairseq().read_curves(plan.folder(student), "student")
    online = Fairseq().read_curves(folder / "runs" / "mini" / student.folder, "student")
    # The same student by another loss: eight drawn words of each.
    assert len(rows) == len(online)
    assert rows != online
    assert float(rows[0]["train_ce"]) == pytest.approx(float(online[0]["train_ce"]), rel=0.5)
