"""Every configuration of mmcls: mmengine's Runner with the recipe's hooks, two steps and one evaluation."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils.flop_counter import FlopCounterMode

import plain_configs  # noqa: F401
from lskd_study.plan.recipes import catalogue, recipes_folder
from lskd_study.trainers.trainer import quiet
from mmcls_bnn import compat, register
from mmcls_bnn.distil.classifier import NOTE

pytestmark = pytest.mark.integration

ROOT = recipes_folder()
SMALL = 64
RUNS = {
    recipe.name: recipe.path for recipe in catalogue() if recipe.ecosystem == "mmcls" and recipe.kind == "run"
}
STUDENTS = {  # of studies, with teachers of timm's
    "digits_bnn": ROOT / "digits_bnn" / "student.py",
    "fashion_mnist/binary": ROOT / "fashion_mnist" / "binary_student.py",
    "fashion_mnist/binary_two_steps": ROOT / "fashion_mnist" / "binary_two_steps_student.py",
}
RUNS |= STUDENTS


@pytest.fixture(scope="module", autouse=True)
def registered():
    assert register  # importing it is what registers
    compat.use_registry()


@pytest.mark.parametrize("name", RUNS)
def test_configuration(name, miniature, costs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT.parent)  # recipes name each other from there
    cfg = Config.fromfile(str(RUNS[name]), import_custom_modules=False)
    data = costs.data_sets[Path(cfg.data_root).name]
    assert cfg.num_classes == data["classes"]
    epochs, real, channels = cfg.train_cfg.max_epochs, side(cfg), len(cfg.data_preprocessor.mean)
    with quiet():
        student, teacher = build(cfg), teacher_of(cfg, channels)
        take_two_steps(cfg, student, teacher, miniature(data["classes"]), tmp_path)
        sizes = [operations(model, channels, real) for model in (student, teacher)]
    if name not in STUDENTS:
        costs.check(name, costs.hours(epochs, data["train"], data["val"], *sizes))


def build(cfg):
    model = {**cfg.model.to_dict(), "data_preprocessor": cfg.data_preprocessor.to_dict()}
    return compat.MODELS.build({**model, "step1_checkpoint": None} if "step1_checkpoint" in model else model)


def teacher_of(cfg, channels):
    """Return an untrained teacher of mmcls or timm; None where there is none."""
    teacher = cfg.model.get("teacher")
    if not teacher:
        return None
    if teacher.get("config"):
        return build(Config.fromfile(teacher.config, import_custom_modules=False))
    import timm

    return timm.create_model(teacher.model, num_classes=cfg.num_classes, in_chans=channels)


def operations(model, channels: int, size: int) -> float:
    """Return the operations of one image's forward pass, binary ones as real ones, as they are trained."""
    if model is None:
        return 0.0
    options = {"mode": "tensor"} if hasattr(model, "data_preprocessor") else {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval().to("meta")(torch.zeros(1, channels, size, size, device="meta"), **options)
    return counter.get_total_flops()


def take_two_steps(cfg, student, teacher, images: Path, folder: Path) -> None:
    size = side(cfg)
    for split, count in (("train", 4), ("val", 2)):
        loader = cfg[f"{split}_dataloader"]
        loader.merge({"batch_size": 2, "num_workers": 0, "persistent_workers": False, "pin_memory": False})
        loader.dataset.merge({"data_root": str(images), "indices": count})
        for step, key in sized(loader.dataset.pipeline):
            step[key] = round(step[key] * min(1.0, SMALL / size))
    for key in ("test_dataloader", "test_evaluator", "test_cfg"):
        cfg.pop(key, None)
    cfg.train_cfg.max_epochs = 1
    cfg.work_dir, cfg.experiment_name, cfg.log_level = str(folder / "work"), folder.name, "ERROR"
    for hook in cfg.custom_hooks:
        if hook["type"] == "TeacherHook":
            hook["samples"] = 0  # it has learnt nothing
        if hook["type"] == "TwoStepHook":
            cfg.train_cfg.max_epochs, hook["epochs"] = 2, 1
            cfg.param_scheduler = [{"type": "LinearDecay", "end": 1}, {"type": "LinearDecay", "begin": 1}]
    if teacher is not None:
        cfg.model.teacher.checkpoint = str(folder / "teacher.pth")
        torch.save({"state_dict": teacher.state_dict()}, folder / "teacher.pth")
    if cfg.model.get("step1_checkpoint"):
        cfg.model.step1_checkpoint = str(folder / "step1.pth")
        meta = {NOTE: {"binarize": ["activations"]}}
        torch.save({"state_dict": student.state_dict(), "meta": meta}, folder / "step1.pth")
    Runner.from_cfg(cfg).train()


def side(cfg) -> int:
    """Return the side of a training image: what its last transform with a size says."""
    step, key = sized(cfg.train_dataloader.dataset.pipeline)[-1]
    return step[key]


def sized(pipeline) -> list[tuple[dict, str]]:
    keys = ("scale", "crop_size")
    return [(step, key) for step in pipeline for key in keys if isinstance(step.get(key), int)]
