"""A clock that is wrong, or jumps: what is trained is what is trained by a right one, and once.

The clock of clock.c is that of a machine whose battery is empty (1970), of one past 2038, or set to these and
the right time in turn, five times a second; so are the times of files.
"""

import os
import subprocess
import sys

import pytest
import yaml

import forked
from faults import test_kills
from faults.killing import assert_same_files
from faults.test_full_disk import note

pytestmark = pytest.mark.integration
digits, teacher = test_kills.digits, test_kills.teacher
EARLY, LATE = "-1790000000", "500000000"
JUMPING = f"0,{EARLY},{LATE}"


@pytest.fixture(scope="module")
def clock(preloaded):
    """Return the environment of a command with a clock that is wrong by some seconds."""
    if (library := preloaded("clock")) is None:
        pytest.skip("no C compiler (cc)")
    fixed = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return lambda wrong_by: os.environ | fixed | {"LSKD_CLOCK": wrong_by}


def test_training_is_the_same(clock, tmp_path, digits, teacher, request):
    """With soft labels that are stored and checked, and a tracker."""
    words = ["-m", "timm_ls_kd", "train.py", digits, *test_kills.TIMM, "--kd-teacher-checkpoint", teacher]
    words += ["--kd-soft-labels", "labels"]
    long = request.config.getoption("--long")
    for wrong_by in ("0", JUMPING, *([EARLY, LATE] if long else [])):
        folder = tmp_path / wrong_by
        folder.mkdir()
        # A server of its own, which has loaded the library.
        imported = (*test_kills.OF_TIMM, "faults")
        done = forked.run(*words, imported=imported, cwd=folder, env=clock(wrong_by))
        assert done.returncode == 0, done.stderr
        assert_same_files(tmp_path / "0", folder, unless=["manifest.json"])  # with the time that it began
    if long:
        note(
            "clock of 1970, of 2042, or that jumps",
            "timm train.py --kd-soft-labels",
            "files as by a right one",
            3,
        )


def test_a_study_trains_nothing_twice(clock, tmp_path, digits, request):
    """The same command goes on over files that are older or newer than it is, and has nothing to do."""
    if not request.config.getoption("--long"):
        pytest.skip("in make faults alone")
    content = test_kills.STUDY | {"data": {"path": str(digits), "num_classes": 4}}
    jobs = {}
    # The last with a job.json that others see only seconds after its job has ended.
    starts = [("right", "0"), ("wrong", JUMPING), ("wrong", EARLY), ("wrong", LATE), ("late", "0")]
    for folder, wrong_by in starts:
        run = tmp_path / folder
        run.mkdir(exist_ok=True)
        (run / "study.yaml").write_text(yaml.safe_dump(content))
        (run / "trainer.yaml").write_text(yaml.safe_dump(test_kills.TRAINER))
        words = [sys.executable, "-m", "lskd_study", "study", "study.yaml", "--cores", "2"]
        late = {"LSKD_LATE": "3"} if folder == "late" else {}
        done = subprocess.run(words, cwd=run, env=clock(wrong_by) | late, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        found = {path: path.read_bytes() for path in run.glob("out/*/*/job.json")}
        assert jobs.setdefault(folder, found) == found
        test_kills.assert_same_study(tmp_path / "right", run)
    expected = "results as by a right one; the same command trains nothing again"
    note("clock that jumps, then of 1970, then of 2042", "lskd study", expected, 3)
    note("results that appear 3 seconds late", "lskd study", "results as of a disk of its own", 1)
