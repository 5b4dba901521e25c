"""`lskd study --own` as a user runs it: stopped, its files changed, gone on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STUDY = [sys.executable, "-m", "lskd_study", "study"]


@pytest.fixture
def folder(tmp_path, digits) -> Path:
    """Small grey images of four classes in train/ and test/, as Fashion-MNIST is often kept."""
    (tmp_path / "garments").mkdir()
    (tmp_path / "garments" / "train").symlink_to(digits / "train")
    (tmp_path / "garments" / "test").symlink_to(digits / "val")
    return tmp_path


def test_from_a_folder_to_the_answer(folder):
    study = folder / "runs" / "own-garments" / "study.yaml"
    own = [*STUDY, "--own", "garments", "--yes"]
    with (folder / "first.log").open("w") as log:
        first = subprocess.Popen(own, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    while not all(study.with_name(f"{name}.yaml").exists() for name in ("study", "teacher", "student")):
        assert first.poll() is None, (folder / "first.log").read_text()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    said = (folder / "first.log").read_text()
    assert "garments: 4 classes, 96 training and 48 validation images, 8 x 8 pixels (median), grey" in said
    assert re.search(
        r"10 x teacher test_resnet, 30 epochs of 12 steps \([\d.]+ ms\) .*: [\d.]+ (s|min) each", said
    )
    assert re.search(r"in all [\d.]+ (s|min): 50 runs, one after the other, and the page", said)

    # What a person would change to see something sooner.
    text = study.read_text()
    text = text.replace("- {model: test_byobnet, config: student.yaml}\n", "")
    text = text.replace("seeds: [0, 1, 2, 3, 4]", "seeds: [5]")
    text = text.replace("controls: [hard, smoothed]", "controls: [hard]")
    study.write_text(text)
    for name in ("teacher.yaml", "student.yaml"):
        path = study.with_name(name)
        changed = path.read_text().replace("epochs: 30\n", "epochs: 6\n")
        changed = re.sub(r"decay_milestones: .*", "decay_milestones: [4]", changed)
        path.write_text(re.sub(r"\blr: .*", "lr: 0.05", changed))
    again = subprocess.run(
        [*STUDY, "runs/own-garments/study.yaml", "--cores", "2"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert "[5 of 5 done]" in again.stderr
    assert again.stdout.splitlines()[-2] == "runs/own-garments/index.html"
    assert again.stdout.splitlines()[-1].startswith("No recommendation")
    assert "top-1 accuracy" in again.stdout.splitlines()[0]
    jobs = [json.loads(path.read_text()) for path in study.parent.glob("*/*/job.json")]
    assert {job["seed"] for job in jobs} == {5}
    # The listing is that of the images behind the links, not of an empty folder.
    assert {job["data"]["sha256"] for job in jobs} - {sha256().hexdigest()}
    assert len({job["data"]["sha256"] for job in jobs}) == 1
