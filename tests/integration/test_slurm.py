"""A study on real SLURM: one node of two cores and two made-up GPUs, its daemons started for the test.

Needs slurmctld, slurmd and munged (Debian: slurm-wlm, munge) and the extra `slurm`. By hand: docs/study.md.
"""

import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from .test_study_run import STUDY, TRAINER

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed here: no {', '.join(MISSING)}"),
]

CONF = """
ClusterName=lskd
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 CoresPerSocket=2 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# Two devices that exist everywhere; what matters is that SLURM counts and hands them out.
GRES = "AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
OPTIONS = ["--profile", "slurm", "--default-resources", "mem_mb=1200", "runtime=10"]
OPTIONS += ["--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5"]


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Yields the environment in which commands find the cluster."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=free_ports())
    )
    (folder / "gres.conf").write_text(GRES)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    # Within a job the executor forgets all variables of SLURM's, this one too, and starts srun.
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    path = f"{folder}/bin:{os.environ['PATH']}:/usr/sbin"
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "seed")]
    munge += [f"--key-file={key}", f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"]
    try:
        for daemon in (["munged", "--force", *munge], ["slurmctld"], ["slurmd"]):
            daemon[0] = shutil.which(daemon[0], path=path)
            subprocess.run(daemon, env=environment, check=True, capture_output=True)
        while "idle" not in ask(environment, "sinfo", "--noheader", "--format=%T"):
            time.sleep(0.5)
        yield environment
    finally:
        for name in ("slurmd", "slurmctld", "munged"):
            pid = folder / f"{name}.pid"
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)


def ask(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout


def finished(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("runs/mini/*/*/job.json")}


def test_a_study_on_slurm(cluster, tmp_path):
    """One run fails, the study is killed half way, and the same command brings it to its page."""
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 3}))
    (tmp_path / "student.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 1}))
    study = {**STUDY, "seeds": [0], "resources": {"threads": 1, "extra": {"gpu": 1}}}
    study["students"] = [{"model": "test_byobnet", "config": "student.yaml"}]
    study.pop("soft_labels", None)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "lskd_study", "study", "study.yaml", *OPTIONS]
    log = tmp_path / "first.log"
    with log.open("w") as file:
        output = {"stdout": file, "stderr": file, "start_new_session": True}
        first = subprocess.Popen([*command, "--verbose"], cwd=tmp_path, env=cluster, **output)
    while " starts " not in log.read_text():
        assert first.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (call,) = {
        line.split(" --wrap")[0]
        for line in log.read_text().splitlines()
        if "smoothing0.1" in line and "sbatch call" in line
    }
    assert "--gpus=1" in call
    assert "--cpus-per-task=1" in call
    assert "--mem 1200" in call
    # A run that cannot succeed: its place is taken.
    lost = "student-test_byobnet-of-test_byobnet-smoothing0.1-T1-hard0-seed0"
    place = tmp_path / "runs" / "mini" / "students" / lost
    place.parent.mkdir(exist_ok=True)
    place.write_text("")

    second = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True)
    assert second.returncode == 1, second.stderr
    assert "jobs that a killed study had left in the queue" in second.stderr
    assert f"1 of 4 runs are missing: {lost}" in second.stderr
    assert len(finished(tmp_path)) == 3
    assert lost in (tmp_path / "runs" / "mini" / "index.html").read_text()
    record = json.loads(next(tmp_path.glob("runs/mini/teachers/*/job.json")).read_text())
    assert "CUDA_VISIBLE_DEVICES" not in record["environment"]  # SLURM gave the device

    place.unlink()
    third = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert "[4 of 4 done]" in third.stderr
    assert len(finished(tmp_path)) == 4
    assert ask(cluster, "squeue", "--noheader") == ""
