"""A small study: how much of its time is not its trainers' own, by what they say of their epochs."""

import re
import subprocess
import sys
import time
from pathlib import Path

from lskd_study.plan.recipes import find_recipe

CORES = 2


def test_what_a_study_adds(quantity, tmp_path):
    """Handwritten digits, two seeds: 20 runs, with Snakemake, imports, evaluations and the page."""
    recipe = find_recipe("digits/study").path
    for name in ("teacher.yaml", "student.yaml"):
        (tmp_path / name).write_text((recipe.parent / name).read_text())
    study = re.sub(r"(?m)^seeds: .*$", "seeds: [0, 1]", recipe.read_text())
    (tmp_path / "study.yaml").write_text(study)
    subprocess.run([sys.executable, "-m", "lskd_study", "data", "digits"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "lskd_study", "study", "study.yaml", "--cores", str(CORES)]
    started = time.perf_counter()
    subprocess.run(command, cwd=tmp_path, check=True)
    wall = time.perf_counter() - started
    logs = [path.read_text() for path in Path(tmp_path, "runs").rglob("train.log")]
    epochs = [
        float(seconds) for log in logs for seconds in re.findall(r"(?m)^epoch \d+ done in (\S+) s", log)
    ]
    assert len(epochs) == 5 * len(logs)
    share = 1 - sum(epochs) / (CORES * wall)
    quantity(
        f"study of {len(logs)} runs of {sum(epochs) / len(logs):.0f} s: share of the time outside epochs",
        [share],
        0.25,
    )
