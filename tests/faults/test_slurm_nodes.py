"""A study on real SLURM: two partitions of two nodes, each of a core and a made-up GPU, on this machine.

Needs slurmctld, slurmd and munged (Debian: slurmctld, slurmd, slurm-client, munge) and the extra `slurm`. By
hand: docs/study.md.
"""

import contextlib
import getpass
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from integration.test_study_run import STUDY, TRAINER

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
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
GresTypes=gpu
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
PartitionName=more Nodes={nodes[2]},{nodes[3]} MaxTime=INFINITE State=UP
"""
NODES = ["node1", "node2", "node3", "node4"]
NODE = (
    "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} RealMemory=2000 CPUs=1 Gres=gpu:1\n"
)
# A device that exists everywhere; what matters is that SLURM counts and hands it out.
GRES = f"AutoDetect=off\nNodeName={','.join(NODES)} Name=gpu File=/dev/null\n"
OPTIONS = ["--profile", "slurm", "--default-resources", "mem_mb=1200", "runtime=10"]
OPTIONS += ["--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5"]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")  # wider than the cluster's, so that it comes first
def long_form(request):
    if not request.config.getoption("--long"):
        pytest.skip("in the long form alone: most of its minutes are waiting for SLURM's clocks")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Yields the environment in which commands find the cluster."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    for name in ("state", "bin", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    port, *ports = free_ports(1 + len(NODES))
    lines = [
        NODE.format(node=node, host=host, port=number) for node, number in zip(NODES, ports, strict=True)
    ]
    conf = CONF.format(host=host, user=getpass.getuser(), folder=folder, port=port, nodes=NODES)
    (folder / "slurm.conf").write_text(conf.replace("PartitionName", "".join(lines) + "PartitionName", 1))
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
    slurmd = [["slurmd", "-N", node] for node in NODES]
    try:
        for daemon in (["munged", "--force", *munge], ["slurmctld"], *slurmd):
            daemon[0] = shutil.which(daemon[0], path=path)
            subprocess.run(daemon, env=environment, check=True, capture_output=True)
        while ask(environment, "sinfo", "--noheader", "--Node", "--format=%T").split() != ["idle"] * 4:
            time.sleep(0.5)
        yield environment
    finally:
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
            pid = folder / f"{name}.pid"
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGTERM)


def ask(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout


def finished(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("runs/mini/*/*/job.json")}


def write_study(folder: Path, **changes) -> list[str]:
    """Write a study of two teachers and two students; return its command."""
    (folder / "teacher.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 3}))
    (folder / "student.yaml").write_text(yaml.safe_dump({**TRAINER, "epochs": 1}))
    study = {**STUDY, "resources": {"threads": 1}, **changes}
    study["students"] = [{"model": "test_byobnet", "config": "student.yaml"}]
    study.pop("soft_labels")
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return [sys.executable, "-m", "lskd_study", "study", "study.yaml"]


def processes_of(run: str) -> list[psutil.Process]:
    """Return what trains a run, and what has started it on its node, the node's daemon aside."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "lskd_study.runs"] and process.cmdline()[-1] == run:
                found += [process, *(one for one in process.parents() if one.pid > 1)]
    return [one for one in found if one.name() != "slurmd"]


def test_a_study_on_slurm(cluster, tmp_path):
    """One run fails, the study is killed half way, and the same command brings it to its page."""
    command = write_study(tmp_path, resources={"threads": 1, "extra": {"gpu": 1}}) + OPTIONS
    log = tmp_path / "first.log"
    with log.open("w") as file:
        output = {"stdout": file, "stderr": file, "start_new_session": True}
        first = subprocess.Popen([*command, "--verbose"], cwd=tmp_path, env=cluster, **output)
    while not (processes := processes_of("teacher-test_byobnet-smoothing0.1-seed0")):
        assert first.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
    processes[0].suspend()  # or it may have ended when the next command comes
    calls = re.compile(r"(.*sbatch call.*) --wrap.*smoothing0\.1")
    while not (found := set(calls.findall(log.read_text()))):  # Snakemake logs after it has submitted
        assert first.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (call,) = found
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


@pytest.mark.usefixtures("long_form")
def test_a_job_at_its_time_limit_and_a_node_that_goes_down(cluster, tmp_path):
    """The study submits the one again, SLURM the other; the results are those of this machine alone."""
    place = tmp_path / "cluster"
    alone = tmp_path / "alone"
    for folder in (place, alone):
        folder.mkdir()
    command = write_study(place, resources={"threads": 1, "extra": {"slurm_partition": "main,more"}})
    options = [*OPTIONS, "--retries", "2"]
    options[options.index("runtime=10")] = "runtime=3"
    log = (place / "study.log").open("w")
    study = subprocess.Popen([*command, *options], cwd=place, env=cluster, stdout=log, stderr=log)
    slow, lost = (f"teacher-test_byobnet-smoothing{value}-seed0" for value in ("0", "0.1"))
    for run in (slow, lost):
        while not list(place.glob(f"runs/mini/teachers/{run}/checkpoint-*.pth.tar")):
            assert study.poll() is None, (place / "study.log").read_text()
            time.sleep(0.05)
        processes = processes_of(run)
        assert processes, f"{run} was too quick"
        if run == slow:
            processes[0].suspend()  # until SLURM ends it
            continue
        (node,) = {
            one.environ()["SLURMD_NODENAME"] for one in processes if "SLURMD_NODENAME" in one.environ()
        }
        daemon = Path(cluster["SLURM_CONF"]).with_name(f"slurmd-{node}.pid")
        for pid in (int(daemon.read_text()), *(one.pid for one in reversed(processes))):
            os.kill(pid, signal.SIGKILL)
    assert study.wait() == 0, (place / "study.log").read_text()
    assert write_study(alone) == command
    local = subprocess.run([*command, "--cores", "1"], cwd=alone, capture_output=True, text=True)
    assert local.returncode == 0, local.stderr
    for pattern in ("*/*/val_logits.safetensors", "*/*/curves.csv"):
        files = sorted(path.relative_to(alone) for path in alone.glob(f"runs/mini/{pattern}"))
        assert len(files) == 4
        assert all((alone / file).read_bytes() == (place / file).read_bytes() for file in files)
    resumed = {
        run: json.loads((place / f"runs/mini/teachers/{run}/job.json").read_text())["resumed"]
        for run in (slow, lost)
    }
    assert resumed == {slow: 1, lost: 1}
    assert node in ask(cluster, "sinfo", "--noheader", "--Node", "--states=down", "--format=%N")
