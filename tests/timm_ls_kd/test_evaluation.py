import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

from lskd import LskdError
from timm_ls_kd.evaluation import collect_logits

pytestmark = pytest.mark.integration


def test_logits_are_those_of_the_summary(teacher_run, digits, summary):
    found = collect_logits(teacher_run)
    last = summary(teacher_run)[-1]
    assert (found.logits.shape, found.logits.dtype, found.labels.dtype) == (
        (48, 4),
        torch.float32,
        torch.int64,
    )
    assert float(functional.cross_entropy(found.logits, found.labels)) == pytest.approx(
        last["eval_loss"], rel=1e-5
    )
    top1 = 100 * float((found.logits.argmax(-1) == found.labels).float().mean())
    assert top1 == pytest.approx(last["eval_top1"])
    assert len(set(found.keys)) == 48
    for key, label in zip(found.keys, found.labels, strict=True):
        assert key.startswith(f"val/digit{label}/")
        assert (digits / key).is_file()
    found.logits.requires_grad_()  # no inference tensors


def test_other_split_checkpoint_and_place(teacher_run, digits, tmp_path):
    moved = Path(shutil.copytree(digits, tmp_path / "moved"))
    found = collect_logits(teacher_run, data_dir=moved, split="train", checkpoint="model_best.pth.tar")
    assert len(found.labels) == 96
    assert found.keys[0].startswith("train/digit0/")


def test_arguments_of_an_upstream_run(teacher_run, tmp_path):
    """The positional data folder is under another name there."""
    folder = Path(shutil.copytree(teacher_run, tmp_path / "run"))
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    settings |= {"data": settings["data_dir"], "data_dir": None, "gp": None}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    assert torch.equal(collect_logits(folder).logits, collect_logits(teacher_run).logits)


def test_averaged_weights_are_used_where_there_are_some(train, tmp_path, summary):
    train("run", "--model-ema", "--model-ema-decay", 0.99, "--epochs", 2)
    folder = tmp_path / "runs" / "run"
    found = collect_logits(folder)
    expected = summary(folder)[-1]["eval_loss"]
    assert float(functional.cross_entropy(found.logits, found.labels)) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_evaluated(teacher_run, tmp_path):
    with pytest.raises(LskdError, match=r"args\.yaml"):
        collect_logits(tmp_path)
    with pytest.raises(LskdError, match=r"nosuch"):
        collect_logits(teacher_run, checkpoint="nosuch.pth.tar")
    with pytest.raises(LskdError, match="does not exist"):
        collect_logits(teacher_run, data_dir=tmp_path / "nosuch")
