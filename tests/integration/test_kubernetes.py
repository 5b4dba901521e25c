"""A study through Snakemake's executor for Kubernetes, with a stand-in for the API server.

The stand-in keeps Jobs and secrets, and runs a Job's command as a process in an empty folder with its
container's variables; whether a cluster would accept the image, the volume and the resources it cannot say.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from .test_study_run import STUDY, TRAINER

pytest.importorskip("snakemake_executor_plugin_kubernetes", reason="the extra kubernetes is not installed")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("rsync") is None, reason="the volume's storage plugin needs rsync"),
]

KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "users": [{"name": "user", "user": {}}],
    "contexts": [{"name": "here", "context": {"cluster": "stand-in", "user": "user"}}],
    "current-context": "here",
}


class StandIn(ThreadingHTTPServer):
    """An API server that fails every Job but those whose command holds ``runs``."""

    def __init__(self, folder: Path, runs: str) -> None:
        self.folder, self.runs = folder, runs
        self.secrets: dict[str, dict[str, str]] = {}
        self.jobs: dict[str, dict] = {}
        self.states: dict[str, subprocess.Popen | None] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    def start(self, job: dict) -> None:
        name = job["metadata"]["name"]
        (container,) = job["spec"]["template"]["spec"]["containers"]
        self.jobs[name], self.states[name] = job, None
        if self.runs not in container["args"][-1]:
            return
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for variable in container["env"]:
            where = variable["valueFrom"]["secretKeyRef"]
            secret = self.secrets[where["name"]][where["key"]]
            environment[variable["name"]] = base64.b64decode(secret).decode()
        workdir = self.folder / name
        workdir.mkdir()
        with (workdir / "log").open("w") as log:
            command = [*container["command"], *container["args"]]
            output = {"stdout": log, "stderr": log}
            self.states[name] = subprocess.Popen(command, cwd=workdir, env=environment, **output)

    def status(self, name: str) -> dict[str, int]:
        process = self.states[name]
        if process is None:
            return {"failed": 1}
        if process.poll() is None:
            return {"active": 1}
        return {"failed": 1} if process.returncode else {"succeeded": 1}


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def content(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def do_POST(self) -> None:
        content = self.content()
        if self.path.endswith("/secrets"):
            self.server.secrets[content["metadata"]["name"]] = content["data"]
        else:
            self.server.start(content)
        self.answer(content)

    def do_GET(self) -> None:
        if "/pods" in self.path:
            self.answer({"kind": "PodList", "apiVersion": "v1", "items": []})
            return
        name = self.path.split("/")[-2]
        self.answer({"kind": "Job", "metadata": {"name": name}, "status": self.server.status(name)})

    def do_DELETE(self) -> None:
        self.content()
        self.answer({"kind": "Status", "status": "Success"})


@pytest.fixture
def api(tmp_path, monkeypatch):
    (tmp_path / "pods").mkdir()
    server = StandIn(tmp_path / "pods", "run=teacher-test_byobnet-smoothing0-seed0")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = {"name": "stand-in", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump({**KUBECONFIG, "clusters": [cluster]}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def volume():
    """That of the tests may have spaces in its name, which is refused."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_study_on_a_stand_in_for_kubernetes(api, tmp_path, volume):
    """One of two Jobs runs for real, the other one fails; the page has the one."""
    for split, label in (("train", 0), ("train", 1), ("val", 0), ("val", 1)):
        folder = volume / "data" / "tiny" / split / str(label)
        folder.mkdir(parents=True)
        for index in range(8):
            grey = np.full((32, 32), 200 * label + index, dtype=np.uint8)
            Image.fromarray(grey).save(folder / f"{index}.png")
    trainer = {**TRAINER, "epochs": 1, "batch_size": 8, "validation_batch_size": 8}
    (volume / "teacher.yaml").write_text(yaml.safe_dump(trainer))
    study = {**STUDY, "seeds": [0], "data": {"path": "data/tiny", "num_classes": 2}}
    study |= {"resources": {"threads": 1, "extra": {"gpu": 1, "mem_mb": 2000}}}
    for name in ("students", "soft_labels"):
        study.pop(name, None)
    (volume / "study.yaml").write_text(yaml.safe_dump(study))

    words = [sys.executable, "-m", "lskd_study", "study", "study.yaml", "--profile", "kubernetes"]
    words += ["--container-image", "registry/lskd:0.1.0", "--seconds-between-status-checks", "1"]
    words += ["--kubernetes-persistent-volumes", f"claim:{volume}"]
    done = subprocess.run(words, cwd=volume, capture_output=True, text=True)
    logs = "".join(path.read_text() for path in (tmp_path / "pods").glob("*/log"))
    assert done.returncode == 1, done.stderr + logs
    lost = "teacher-test_byobnet-smoothing0.1-seed0"
    assert f"1 of 2 runs are missing: {lost}" in done.stderr, done.stderr + logs
    assert "[1 of 2 done]" in done.stderr
    assert "Traceback" not in done.stderr
    (found,) = volume.glob("runs/mini/teachers/*/job.json")
    assert found.parent.name == "teacher-test_byobnet-smoothing0-seed0"
    assert "Collecting" not in logs  # pip installed nothing
    assert lost in (volume / "runs" / "mini" / "index.html").read_text()

    assert len(api.jobs) == 2
    for job in api.jobs.values():
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry/lskd:0.1.0"
        assert {"mountPath": str(volume), "name": "claim"} in container["volumeMounts"]
        assert {"name": "claim", "persistentVolumeClaim": {"claimName": "claim"}} in pod["volumes"]
        # Kubernetes gives GPUs by limits alone.
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert container["resources"]["requests"]["memory"] == "2000M"
