import argparse
import hashlib
import io
import os
import pickle
import re
import shlex
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lskd import CheckpointError, load_teacher_weights
from lskd.checkpoints import file_checksum, is_safetensors, is_whole

pytestmark = pytest.mark.unit


@pytest.fixture
def nothing_allowed():
    """Start from an empty list of what torch.load accepts, whatever this process did before; put it back."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.fixture
def save(tmp_path):
    def save(content, zipped=True):
        torch.save(content, tmp_path / "teacher.pth", _use_new_zipfile_serialization=zipped)
        return tmp_path / "teacher.pth"

    return save


def make_weights(start=0.0):
    return {
        "fc.weight": torch.arange(6.0).reshape(2, 3) + start,
        "fc.bias": torch.zeros(2) + start,
        "bn.num_batches_tracked": torch.tensor(7),
    }


def prefixed(prefix, start=0.0):
    return {prefix + name: value for name, value in make_weights(start).items()}


def averaged(weights):
    """What torch's AveragedModel stores."""
    return {"n_averaged": torch.tensor(3)} | {f"module.{name}": value for name, value in weights.items()}


def assert_weights(found, start=0.0):
    expected = make_weights(start)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].device.type == "cpu"


def refusal(path):
    """Return the message; it must be one line that names the file and never advises unsafe loading."""
    with pytest.raises(CheckpointError) as caught:
        load_teacher_weights(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert str(path) in message
    assert "weights_only" not in message
    assert "Re-running" not in message
    return message


# Layouts


@pytest.mark.parametrize(
    "content",
    [
        make_weights(),
        {"state_dict": make_weights()},
        {"model": make_weights()},
        {"model_state_dict": make_weights()},
        {"model": "resnet50", "state_dict": make_weights(), "optimizer": {"param_groups": []}},
        {"epoch": 3, "arch": "resnet50", "state_dict": make_weights(), "version": 2},
        {"state_dict_ema": {}, "state_dict": make_weights()},
        {"state_dict_ema": None, "state_dict": make_weights()},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        {"state_dict": prefixed("module.")},
        {"state_dict": prefixed("_orig_mod.module._orig_mod.")},
        averaged(make_weights()),
        averaged(prefixed("module._orig_mod.")),
        {"state_dict": averaged(make_weights()), "epoch": 3},
        {
            "pytorch-lightning_version": "2.5",
            "state_dict": prefixed("model."),
            "hyper_parameters": {"lr": 0.1},
        },
        {"pytorch-lightning_version": "2.5", "state_dict": prefixed("model._orig_mod.")},
        {
            "pytorch-lightning_version": "2.5",
            "state_dict": prefixed("model.") | prefixed("teacher.", 9.0) | {"loss.weight": torch.ones(2)},
        },
        {"pytorch-lightning_version": "2.5", "state_dict": make_weights()},
    ],
    ids=lambda content: ",".join(list(content)[:2]),
)
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts(save, content, zipped):
    path = save(content, zipped)
    assert_weights(load_teacher_weights(path))
    assert_weights(load_teacher_weights(str(path), use_ema=False))


@pytest.mark.parametrize(
    ("averaged", "plain"),
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("model_ema", "state_dict")],
)
def test_averaged_weights_are_taken_unless_told_otherwise(save, averaged, plain):
    path = save({plain: make_weights(), averaged: prefixed("module.", start=5.0)})
    assert_weights(load_teacher_weights(path), start=5.0)
    assert_weights(load_teacher_weights(path, use_ema=False), start=0.0)


def test_prefix_of_some_names_is_no_wrapper(save):
    path = save({"module.a": torch.zeros(1), "head": torch.ones(1)})
    assert set(load_teacher_weights(path)) == {"module.a", "head"}


def test_parameters_and_half_precision(save):
    model = torch.nn.Linear(2, 2).bfloat16()
    path = save(model.state_dict(keep_vars=True))
    found = load_teacher_weights(path)
    assert found["weight"].dtype == torch.bfloat16
    assert torch.equal(found["weight"], model.weight)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "pytorch_model.bin", "model"])
def test_safetensors(tmp_path, name):
    path = tmp_path / name
    save_file(prefixed("module."), path)
    assert_weights(load_teacher_weights(path))
    assert is_safetensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_called_safetensors(tmp_path, zipped):
    path = tmp_path / "model.safetensors"
    torch.save(make_weights(), path, _use_new_zipfile_serialization=zipped)
    assert_weights(load_teacher_weights(path))
    assert not is_safetensors(path)


def test_the_layout_of_torchvisions_references(tmp_path):
    model = torch.nn.Sequential(OrderedDict(fc=torch.nn.Linear(3, 2), bn=torch.nn.BatchNorm1d(2)))
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="resnet50", lr=0.1),
        "model_ema": ema.state_dict(),
    }
    path = tmp_path / "model_3.pth"
    torch.save(content, path)
    for use_ema, expected in ((True, ema.module), (False, model)):
        found = load_teacher_weights(path, use_ema=use_ema)
        assert found.keys() == expected.state_dict().keys()
        assert torch.equal(found["fc.weight"], expected.fc.weight)


@pytest.mark.parametrize(
    "metric", [np.float64(71.5), np.float32(71.5), np.float16(71.5), np.int64(7), np.bool_(True)]
)
def test_command_line_and_metric_beside_the_weights(save, metric):
    args = argparse.Namespace(model="resnet50", lr=0.1, mean=(0.5, 0.5), opt=None)
    path = save({"state_dict": make_weights(), "args": args, "metric": metric})
    assert_weights(load_teacher_weights(path))


def test_metric_that_numpy_1_wrote(tmp_path):
    """It calls its module numpy.core, which numpy 2 calls numpy._core."""
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save({"state_dict": make_weights(), "metric": np.float64(71.5)}, new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, data)
    assert_weights(load_teacher_weights(old))


def test_checkpoint_written_by_timm(tmp_path):
    utils = pytest.importorskip("timm.utils", reason="timm is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model[0].weight += 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    saver = utils.CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="tiny", lr=0.1),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(epoch=0, metric=np.float64(50.0))
    for name in ("last.pth.tar", "model_best.pth.tar", "checkpoint-0.pth.tar"):
        for use_ema, expected in ((True, average.module), (False, model)):
            found = load_teacher_weights(tmp_path / name, use_ema)
            assert found.keys() == expected.state_dict().keys()
            for key, value in expected.state_dict().items():
                assert torch.equal(found[key], value), key
    assert not torch.equal(average.module[0].weight, model[0].weight)


# Files that are missing, damaged or something else


def test_whether_a_file_is_whole_is_no_error_whatever_bit_is_wrong(save):
    path = save(make_weights())
    assert is_whole(path)
    data = path.read_bytes()
    for place in range(data.index(b"PK\x01\x02"), len(data)):  # where the file lists what is in it
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            is_whole(path)
    path.write_bytes(data[:-1])
    assert not is_whole(path)
    assert not is_whole("\0")


@pytest.mark.parametrize("name", ["none.pth", "no/such/folder.pth", "n" * 5000, "run", "run.safetensors"])
def test_missing_file_or_a_folder(tmp_path, name):
    if name.startswith("run"):
        (tmp_path / name).mkdir()
    assert re.search("does not exist or is not a file|cannot be read", refusal(tmp_path / name))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_file_that_may_not_be_read(save):
    path = save(make_weights())
    path.chmod(0)
    assert "ermission" in refusal(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, kind):
    path = tmp_path / ("teacher.safetensors" if kind == "safetensors" else "teacher.pth")
    if kind == "safetensors":
        save_file(make_weights(), path)
    else:
        torch.save({"state_dict": make_weights()}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    # In the end of a legacy file are the sizes of its tensors.
    for length in [*range(0, len(whole), len(whole) // 20), *range(len(whole) - 20, len(whole))]:
        path.write_bytes(whole[:length])
        refusal(path)


def zipped(name, data):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, data)
    return content.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello\n" * 40,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
        b"<!DOCTYPE html>\n<html>GLOBAL not found</html>\n",
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}q\x00.",
        bytes(range(256)),
        zipped("data.pkl", pickle.dumps({})),
    ],
)
def test_no_checkpoint_at_all(tmp_path, data, suffix):
    path = tmp_path / ("teacher" + suffix)
    path.write_bytes(data)
    message = refusal(path)
    assert "run code" not in message


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"state_dict": {}},
        {"epoch": 3},
        {"epoch": 3, "loss": torch.tensor(0.5)},
        {"state_dict": {"weight": "none"}},
        {"state_dict": [torch.zeros(1)]},
        {0: torch.zeros(2)},
        {"state_dict": {0: torch.zeros(2)}},
        {"state_dict_ema": {0: torch.zeros(2)}},
        [torch.zeros(2)],
        torch.zeros(2),
        None,
        "weights",
    ],
    ids=repr,
)
def test_file_without_weights_by_name(save, content):
    path = save(content)
    assert "state_dict" in refusal(path)


def test_a_file_that_would_fill_the_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 25))
    assert "would become 34 MB out of 0.03 MB" in refusal(tmp_path / "bomb.pth")


def test_shapes_alone_are_no_weights(save):
    path = save({"state_dict": make_weights() | {"fc.bias": torch.empty(10**12, device="meta")}})
    assert "has the shape of 'fc.bias' and none of its numbers" in refusal(path)


# Files that would run code


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace, function):
        self.trace, self.function = trace, function

    def __reduce__(self):
        if self.function == "system":
            return os.system, (f"touch {shlex.quote(str(self.trace))}",)
        if self.function == "exec":
            return exec, (f"open({str(self.trace)!r}, 'w').close()",)
        return Path.touch, (Path(self.trace),)


@pytest.mark.parametrize("function", ["system", "exec", "touch"])
@pytest.mark.parametrize("layout", ["alone", "beside the weights", "in a command line", "plain pickle"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["teacher.pth", "teacher.safetensors"])
def test_malicious_file_is_refused_and_not_run(tmp_path, function, layout, zipped, name):
    trace, path = tmp_path / "trace", tmp_path / name
    payload = Payload(trace, function)
    content = {
        "alone": payload,
        "plain pickle": payload,
        "beside the weights": {"state_dict": make_weights(), "extra": payload},
        "in a command line": {"state_dict": make_weights(), "args": argparse.Namespace(model=payload)},
    }[layout]
    if layout == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "refused" in message
    assert "run code" in message
    assert not trace.exists()
    # The trap is real: an unsafe reader falls into it.
    if layout == "plain pickle":
        pickle.loads(path.read_bytes())  # noqa: S301
    else:
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # of a name torch asks the suffix
    assert trace.exists()


LINEAR = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    "content",
    [
        LINEAR,
        {"model": LINEAR},
        {
            "pytorch-lightning_version": "2.5",
            "state_dict": prefixed("model."),
            "hyper_parameters": {"model": LINEAR},
        },
    ],
    ids=["alone", "as a model", "hyper-parameters of Lightning"],
)
def test_a_pickled_module_is_refused_by_name(save, content):
    path = save(content)
    message = refusal(path)
    assert "refused: it contains torch.nn.modules.linear.Linear" in message
    assert "model.state_dict()" in message


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
def test_torchscript_archive_is_called_by_its_name(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own would be more lines on stderr
        assert "TorchScript" in refusal(path)


@pytest.mark.usefixtures("nothing_allowed")
def test_allowed_types_are_allowed_here_alone(save):
    """Reading a teacher must not widen what torch.load accepts elsewhere in the program."""
    path = save({"state_dict": make_weights(), "args": argparse.Namespace()})
    load_teacher_weights(path)
    assert torch.serialization.get_safe_globals() == []
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


# Checksum


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_checksum(tmp_path, size):
    path = tmp_path / "file"
    data = bytes(i % 251 for i in range(size))
    path.write_bytes(data)
    assert file_checksum(path) == file_checksum(str(path)) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["none", ".", "n" * 5000])
def test_checksum_of_what_cannot_be_read(tmp_path, name):
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        file_checksum(tmp_path / name)
    assert "\n" not in str(caught.value)


class HistoryBuffer:
    """As mmengine's: arrays, and methods that pickle looks up with getattr."""

    def __init__(self):
        self.values = np.arange(3.0)
        self.methods = {"mean": HistoryBuffer.mean}

    def mean(self):
        return self.values.mean()


@pytest.fixture
def mmengine_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(HistoryBuffer, "__module__", "mmengine.logging.history_buffer")
    package = types.ModuleType("mmengine.logging.history_buffer")
    package.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    path = tmp_path / "epoch_1.pth"
    hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {}}
    torch.save({"meta": {"epoch": 1}, "state_dict": make_weights(), "message_hub": hub}, path)
    monkeypatch.undo()
    return path


def test_training_log_of_mmengine(mmengine_checkpoint):
    assert_weights(load_teacher_weights(mmengine_checkpoint))


@pytest.mark.usefixtures("nothing_allowed")
def test_training_log_of_mmengine_where_a_plugin_allowed_arrays(mmengine_checkpoint):
    """Of two entries of one name torch's list keeps either, as their addresses will have it."""
    reconstruct = np._core.multiarray._reconstruct
    names = ["numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"]

    class Refuses:
        def __new__(cls, *_):
            raise AssertionError("read by what the plugin allowed")

    # Many under our names, so that chance does not spare the test.
    kinds = [type(f"Refuses{number}", (Refuses,), {}) for number in range(8)]
    torch.serialization.add_safe_globals([np.ndarray, reconstruct])
    torch.serialization.add_safe_globals([(kind, name) for kind in kinds for name in names])
    allowed = set(torch.serialization.get_safe_globals())
    assert_weights(load_teacher_weights(mmengine_checkpoint))
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_getattr_in_a_file_leads_nowhere(save):
    """The name is known to the reader, for mmengine's sake; what it stands for looks up nothing."""

    class Looked:
        def __call__(self, *_): ...

        def __reduce__(self):
            return getattr, (OrderedDict, "fromkeys")

    class Called:
        def __reduce__(self):
            return Looked(), ("ab",)

    path = save({"state_dict": make_weights(), "extra": Looked()})
    assert_weights(load_teacher_weights(path))
    save({"state_dict": {"w": Looked()}})
    assert "no weights by name" in refusal(path)
    save({"state_dict": make_weights(), "extra": Called()})
    assert torch.load(path, weights_only=False)["extra"] == {"a": None, "b": None}
    refusal(path)


@pytest.mark.usefixtures("nothing_allowed")
def test_what_the_process_allowed_before_stays_allowed(tmp_path):
    """A trainer's plugin has a list of its own, of which some is in ours."""
    torch.save({"w": torch.zeros(1)}, tmp_path / "a.pth")
    torch.serialization.add_safe_globals([argparse.Namespace, np.dtype])
    load_teacher_weights(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == {argparse.Namespace, np.dtype}
