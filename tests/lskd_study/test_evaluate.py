import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional

from lskd import LskdError
from lskd.base.install import how_to_install
from lskd_study.teachers.collect import Process, collect, join_processes
from lskd_study.teachers.evaluate import TeacherSpec, evaluate
from lskd_study.teachers.outputs import read_outputs, write_outputs

SAMPLES, CLASSES = 29, 3
ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of images whose number no count of processes divides."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    found = load_digits()
    chosen = [(label, i) for label in range(CLASSES) for i in np.flatnonzero(found.target == label)[:10]]
    for label, index in chosen[:SAMPLES]:
        folder = root / "val" / f"digit{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((found.images[index] * 15.9).astype(np.uint8)).save(folder / f"{index:04d}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=CLASSES).state_dict(), path)
    return path


# What is asked


@pytest.mark.unit
def test_names_and_sources():
    spec = TeacherSpec(model="resnet18", checkpoint=Path("w.pth"))
    assert (spec.default_name, spec.source) == ("resnet18", "resnet18, weights w.pth")
    assert TeacherSpec(model="resnet18").source == "resnet18, timm's pretrained weights"
    spec = TeacherSpec(config=Path("configs/net.py"), checkpoint=Path("w.pth"))
    assert (spec.default_name, spec.source) == ("net", "configs/net.py, weights w.pth")
    spec = TeacherSpec(logits=Path("runs/teacher-1/val_logits.safetensors"))
    assert (spec.default_name, spec.source) == ("teacher-1", "runs/teacher-1/val_logits.safetensors")


@pytest.mark.unit
def test_a_file_is_read_whatever_else_is_said(tmp_path):
    np.savez(tmp_path / "a.npz", logits=np.zeros((2, 2), np.float32), labels=[0, 1])
    found = evaluate(TeacherSpec(logits=tmp_path / "a.npz"), data_dir=Path("nosuch"), features=True)
    assert (found.name, found.labels.tolist()) == ("a", [0, 1])
    assert evaluate(TeacherSpec(name="b", logits=tmp_path / "a.npz")).name == "b"


@pytest.mark.unit
@pytest.mark.parametrize("device", ["nosuch", "cuda:99", "meta"])
def test_no_such_device(device):
    with pytest.raises(LskdError, match="cpu") as error:
        join_processes(device)
    assert "\n" not in str(error.value)


@pytest.mark.integration
def test_timm_model(digits, weights, capfd):
    spec = TeacherSpec(name="mine", model="test_resnet", checkpoint=weights)
    found = evaluate(spec, data_dir=digits, features=True, batch_size=8, device="cpu")
    assert found.name == "mine"
    assert found.logits.shape == (SAMPLES, CLASSES)
    assert found.labels.tolist() == sorted(found.labels.tolist())
    assert found.class_names == ["digit0", "digit1", "digit2"]
    bias = torch.load(weights, weights_only=True)["fc.bias"]
    torch.testing.assert_close(functional.linear(found.features, found.templates, bias), found.logits)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mine: {SAMPLES} images in ")  # no bar where there is no terminal
    assert captured.err.count("\n") == 1


@pytest.mark.integration
def test_torchvision_model(digits, tmp_path):
    import torchvision

    torch.save(torchvision.models.resnet18(num_classes=CLASSES).state_dict(), tmp_path / "a.pth")
    spec = TeacherSpec(model="torchvision:resnet18", checkpoint=tmp_path / "a.pth")
    found = evaluate(spec, data_dir=digits, img_size=32, device="cpu")
    assert found.logits.shape == (SAMPLES, CLASSES)
    assert found.features is found.templates is None


@pytest.mark.integration
def test_mmcls_config(digits, tmp_path):
    (tmp_path / "net.py").write_text(
        "model = dict(type='TimmClassifier', model_name='test_resnet', num_classes=3)\n"
        "val_dataloader = dict(dataset=dict(type='CustomDataset', data_root='elsewhere', data_prefix='val',\n"
        "    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackClsInputs')]))\n"
    )
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "a.pth")
    spec = TeacherSpec(config=tmp_path / "net.py", checkpoint=tmp_path / "a.pth")
    found = evaluate(spec, data_dir=digits, features=True, device="cpu")
    assert found.name == "net"
    assert found.logits.shape == (SAMPLES, CLASSES)
    with pytest.raises(LskdError, match="change img_size there"):
        evaluate(spec, data_dir=digits, img_size=32)


@pytest.mark.unit
def test_missing_framework(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for spec, extra in (
        (TeacherSpec(model="resnet18"), how_to_install("timm")),
        (TeacherSpec(config=Path("a.py")), how_to_install("mmcls")),
    ):
        with pytest.raises(LskdError) as error:
            evaluate(spec, device="cpu")
        assert extra in str(error.value)


# Bringing it together


def batches(order, logits, labels, features=None, size=4):
    for start in range(0, len(order), size):
        rows = torch.tensor(order[start : start + size])
        yield rows, logits[rows], labels[rows], None if features is None else features[rows]


@pytest.mark.unit
@pytest.mark.parametrize("with_features", [True, False])
def test_rows_come_to_their_places(with_features):
    logits, labels = torch.randn(11, 3), torch.arange(11) % 3
    features = torch.randn(11, 5) if with_features else None
    order = torch.randperm(11).tolist()
    rows = collect(batches(order, logits.half(), labels, features), 11, 3, ALONE, "a")
    assert torch.equal(rows[0], logits.half().float())
    assert torch.equal(rows[1], labels)
    assert rows[2] is features is None or torch.equal(rows[2], features)


@pytest.mark.unit
def test_rows_that_never_come_and_other_widths():
    logits, labels = torch.randn(11, 3), torch.arange(11) % 3
    with pytest.raises(LskdError, match="sample 5 of 11 never came"):
        collect(batches([0, 1, 2, 3, 4, 6, 7, 8, 9, 10], logits, labels), 11, 3, ALONE, "a")
    with pytest.raises(LskdError, match="gives 3 logits, not 4"):
        collect(batches(list(range(11)), logits, labels), 11, 4, ALONE, "a")


MEMORY = """
import torch
from lskd_study.teachers.collect import Process, collect
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
most = 0
def batches(samples):
    global most
    for start in range(0, samples, 500):
        rows = torch.arange(start, start + 500)
        yield rows, torch.full((500, 1000), float(start)), rows % 7, None
        most = max(most, anonymous())
process = Process(0, 1, torch.device("cpu"))
collect(batches(1000), 1000, 1000, process, "a")
before = anonymous()
found = collect(batches(50_000), 50_000, 1000, process, "a")
print(most - before, float(found[0][-1, 0]))
"""


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_does_not_grow_with_the_data_set():
    """200 MB of logits in less than 30 MB of memory."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    growth, last = map(float, done.stdout.split())
    assert last == 49_500
    assert growth < 30


SCRIPT = """
import os, sys
from pathlib import Path
from lskd_study.teachers.evaluate import TeacherSpec, evaluate
from lskd_study.teachers.outputs import write_outputs
weights, data, folder = map(Path, sys.argv[1:])
specs = [TeacherSpec(name=name, model="test_resnet", checkpoint=weights) for name in ("first", "second")]
for spec, features in zip(specs, (True, False)):
    found = evaluate(spec, data_dir=data, features=features, batch_size=4, workers=0, device="cpu")
    assert (found is None) == (os.environ.get("RANK", "0") != "0")
    if found is not None:
        write_outputs(found, folder / f"{spec.name}.safetensors")
"""


def run_processes(tmp_path, count, *arguments):
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [sys.executable, *launcher, tmp_path / "script.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.integration
def test_several_processes_give_what_one_gives(digits, weights, tmp_path):
    """Two teachers after one another; 29 images for three processes in batches of four."""
    spec = TeacherSpec(name="first", model="test_resnet", checkpoint=weights)
    alone = evaluate(spec, data_dir=digits, features=True, batch_size=4, device="cpu")
    write_outputs(alone, tmp_path / "alone.safetensors")
    alone = read_outputs(tmp_path / "alone.safetensors")
    done = run_processes(tmp_path, 3, weights, digits, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("images in") == 2  # the first process alone reports
    for name in ("first", "second"):
        found = read_outputs(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(found.logits, alone.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.labels, alone.labels)
        assert found.keys == alone.keys
        assert found.class_names == alone.class_names
    found = read_outputs(tmp_path / "first.safetensors")
    torch.testing.assert_close(found.features, alone.features, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.templates, alone.templates)


@pytest.mark.integration
def test_an_error_ends_all_processes(digits, weights, tmp_path):
    done = run_processes(tmp_path, 2, tmp_path / "nosuch.pth", digits, tmp_path)
    assert done.returncode != 0
    assert "nosuch.pth does not exist" in done.stderr
    assert not list(tmp_path.glob("*.safetensors"))
