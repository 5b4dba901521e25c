"""Files of numbers: stored soft labels, logits, weights."""

import contextlib
import copy
import io
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz import attacks
from fuzz.harness import Read, one_file, same
from lskd import LskdError
from lskd_study.plan.recipes import recipes_folder


def _store(folder: Path, **changes: Any) -> tuple[Path, Any]:
    from soft_label_stores import layout, write

    form = {"mode": "int8", "made": "x", "mean_kl": 0.1, "max_kl": 0.2, "agreement": 1.0, "images": 9}
    kind = layout(**changes)
    path = folder / "-".join(map(str, ["store", *changes.values()]))
    write(path, kind, identity={"teacher": "a", "teacher_form": form})
    return path, kind


def manifest(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd.soft_labels.format import read_manifest

    stores = [_store(folder)[0], _store(folder, rows_per_sample=1, seeds=True, values="packed")[0]]
    sound = [(path / "manifest.json").read_bytes() for path in stores]

    def read(path: Path) -> None:
        found = read_manifest(path.parent)
        if not found.own_error:
            found.write(path.parent)
            same(read_manifest(path.parent), found)

    return sound, one_file("manifest.json", read)(folder)


def checksum_again(content: Any) -> None:
    from lskd.soft_labels import format as manifest_module

    if content.pop("checksum", None) is not None:
        content["checksum"] = manifest_module._checksum(content)


def blocks(folder: Path) -> tuple[Sequence[bytes], Read]:
    """Any file of a store but the manifest: what is read of it is what was written."""
    from soft_label_stores import FILES, assert_a_right_beginning

    kinds = [{}, {"rows_per_sample": 1}, {"rows_per_sample": 2, "seeds": True}, {"values": "packed"}]
    stores = [_store(folder, **changes) for changes in kinds]
    sound = [
        bytes([number, which]) + (path / name).read_bytes()
        for number, (path, _) in enumerate(stores)
        for which, name in enumerate(FILES[:4])
    ]

    def read(data: bytes) -> None:
        head = data[:2].ljust(2, b"\0")
        path, kind = stores[head[0] % len(stores)]
        name = FILES[head[1] % 4]
        clean = (path / name).read_bytes()
        try:
            (path / name).write_bytes(data[2:])
            labels = assert_a_right_beginning(path, kind)
            labels.take(range(len(labels)))
            labels.lengths()
        finally:
            (path / name).write_bytes(clean)

    return sound, read


def urls(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd import SoftLabels
    from lskd.soft_labels.remote import local_folder, without_secrets, written_folder

    path, _ = _store(folder, rows_per_sample=1)

    def read(data: bytes) -> None:
        url = data.decode(errors="surrogateescape")
        if "://" in url and not url.startswith(("file://", "memory://", "nosuch://", "local://")):
            url = "nosuch://" + url
        assert (
            "://" not in str(Path(without_secrets(url)))
            or "@" not in without_secrets(url).partition("//")[2].partition("/")[0]
        )
        with contextlib.suppress(LskdError):
            written_folder(url)
        with contextlib.suppress(ValueError):  # NUL
            SoftLabels(local_folder(url, folder / "cache")).verify()

    texts = [
        f"file://{path}",
        f"memory://{path}",
        "nosuch://user:secret@host/x",
        f"local://{path}/",
        str(path),
    ]
    return [text.encode() for text in texts], read


def logits(suffix: str) -> Callable[[Path], tuple[Sequence[bytes], Read]]:
    def prepare(folder: Path) -> tuple[Sequence[bytes], Read]:
        from lskd_study.teachers.outputs import read_outputs, write_outputs

        dice = np.random.default_rng(0)
        arrays = {
            "logits": dice.standard_normal((5, 3)).astype(np.float32),
            "labels": np.arange(5) % 3,
            "features": dice.standard_normal((5, 2)).astype(np.float64),
            "weight": dice.standard_normal((3, 2)).astype(np.float64),
            "keys": np.array([f"val/ä/{i}.png" for i in range(5)]),
            "class_names": np.array(["a", "<b>", "=c"]),
        }

        def read(path: Path) -> None:
            found = read_outputs(path)
            write_outputs(found, folder / "again.safetensors")
            again = read_outputs(folder / "again.safetensors", found.name)
            for name, value in vars(found).items():
                other = getattr(again, name)
                if isinstance(value, torch.Tensor):
                    assert value.dtype == other.dtype
                    assert torch.equal(value.nan_to_num(), other.nan_to_num())
                else:
                    same(value, other)
            _reference(path, found)

        some = {name: arrays[name] for name in ("logits", "labels")}
        sound = [_written(folder, suffix, content) for content in (arrays, some)]
        return sound, one_file(f"x{suffix}", read)(folder)

    return prepare


def _written(folder: Path, suffix: str, arrays: dict[str, Any]) -> bytes:
    path = folder / f"sound{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    elif suffix == ".safetensors":
        from safetensors.torch import save_file

        texts = {name: "\n".join(value).encode() for name, value in arrays.items() if value.dtype.kind == "U"}
        coded = {name: np.frombuffer(text, np.uint8).copy() for name, text in texts.items()}
        save_file({name: torch.as_tensor(value) for name, value in (arrays | coded).items()}, path)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: value for name, value in arrays.items() if len(value) == len(arrays["labels"])}
        pq.write_table(pa.table({name: pa.array(list(value)) for name, value in columns.items()}), path)
    return path.read_bytes()


def _reference(path: Path, found: Any) -> None:
    """Compare with what the format's own library reads."""
    if path.stat().st_size > 1 << 16:
        return
    if path.suffix == ".npz" and not path.read_bytes().startswith(b"PK\3\4"):
        return  # bytes before the archive, which NumPy takes for a pickle
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as own:
            labels, scores = own["labels"], own.get("logits", None)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        own = pq.read_table(path, use_threads=False)
        labels = own["labels"].to_numpy()
        scores = np.array(own["logits"].to_pylist()) if "logits" in own.column_names else None
    else:
        return  # it is that library's reader
    assert np.array_equal(labels, found.labels.numpy())
    if scores is not None:
        assert np.array_equal(scores.astype(np.float64), found.logits.double().numpy(), equal_nan=True)


def _checkpoint(content: Any, zipped: bool = True) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, _use_new_zipfile_serialization=zipped)
    return data.getvalue()


def weights(folder: Path) -> tuple[Sequence[bytes], Read]:
    from safetensors.torch import save

    from lskd import load_teacher_weights
    from lskd.checkpoints import is_safetensors
    from timm_ls_kd.trainer.run_folder import whole_checkpoint

    state = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.zeros(2), "n": torch.tensor(7)}
    beside = {
        "state_dict": state,
        "args": Namespace(model="x", lr=0.1),
        "metric": np.float64(1.5),
        "epoch": 3,
    }
    sound = [_checkpoint(content, zipped) for content in (state, beside) for zipped in (True, False)]
    sound += [save(state), _checkpoint({"model": state, "message_hub": {"log": np.arange(3.0)}})]
    trap = folder / "trap"
    small = [data for _, data in attacks.checkpoints(str(trap)) if len(data) < 9000]

    def read(path: Path) -> None:
        try:
            is_safetensors(path)
            whole_checkpoint(path)
            found = load_teacher_weights(path)
            assert found
            assert all(isinstance(value, torch.Tensor) for value in found.values())
            for value in found.values():
                assert value.numel() == 0 or value.sum().numel() == 1  # all of it can be read
        finally:
            assert not trap.exists(), "a file ran code"

    return [*sound, *small], one_file("x.pth", read)(folder)


HISTORY = [
    {"criterion_name": "x", "optimizer_name": "x", "lr_scheduler_state": {"best": 1.0}, "num_updates": 3}
]


def fairseq_checkpoint(folder: Path) -> tuple[Sequence[bytes], Read]:
    from fairseq_kd import safe_loading

    safe_loading.install()
    model = Namespace(_name="transformer", arch="transformer", encoder_layers=1, dropout=0.1)
    cfg = {"model": model, "task": {"_name": "translation", "source_lang": "de", "target_lang": "en"}}
    cfg |= {"criterion": {"_name": "ls_kd"}, "common": {"seed": 1}}
    state = {"cfg": cfg, "args": None, "model": {"w": torch.zeros(2)}, "optimizer_history": HISTORY}
    state |= {"extra_state": {"train_iterator": {"epoch": 1}, "val_loss": 1.5}, "task_state": {}}
    trap = folder / "trap"
    sound = [_checkpoint(state), _checkpoint(state, zipped=False)]
    for _, sections, flat in attacks.fairseq_settings(f"__import__('pathlib').Path({str(trap)!r}).touch()"):
        changed = copy.deepcopy(cfg)
        attacks.forged(sections, flat, changed)
        sound.append(_checkpoint(state | {"cfg": changed}))
        if flat:
            sound.append(_checkpoint(state | {"cfg": None, "args": changed["model"]}))

    def read(path: Path) -> None:
        from omegaconf import OmegaConf

        try:
            state = safe_loading.read_checkpoint(path)
            safe_loading.check_settings(state["cfg"], path)
            assert OmegaConf.is_config(state["cfg"])
        finally:
            assert not trap.exists(), "a setting was run"

    return sound, one_file("x.pt", read)(folder)


def mmcls_checkpoint(folder: Path) -> tuple[Sequence[bytes], Read]:
    from mmcls_bnn.distil.classifier import NOTE, read_note

    state = {"backbone.w": torch.zeros(2), "head.b": torch.ones(1)}
    meta = {"epoch": 1, NOTE: {"model": json.dumps({"type": "x"}), "binarize": ["activations"]}}
    sound = [_checkpoint({"meta": meta, "state_dict": state}, zipped) for zipped in (True, False)]

    def read(path: Path) -> None:
        assert isinstance(read_note(str(path)), dict)

    return sound, one_file("x.pth", read)(folder)


def packed_student(folder: Path) -> tuple[Sequence[bytes], Read]:
    from mmcls_bnn.binary.packed import build_student, load_packed, pack, save_packed
    from mmcls_bnn.recipe import read_recipe

    description = read_recipe(str(recipes_folder() / "digits_bnn" / "student.py"))
    save_packed(pack(build_student(description)), description, folder / "sound.safetensors")
    return [(folder / "sound.safetensors").read_bytes()], one_file("x.safetensors", load_packed)(folder)
