"""mmcls' students: stored by `python -m mmcls_bnn.soft_labels`, read through ``model.distillation``."""

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lskd_study.plan.plan import Plan, Run, Store
from lskd_study.trainers import mmcls
from lskd_study.trainers.views import MIXED, CannotStoreError, Views

_SAMPLERS = ("DefaultSampler", "SequentialSampler")
# Transforms that draw from Python's, NumPy's or torch's generators, by the package that they come from.
_REPLAYED = ("mmcls.", "mmpretrain.", "mmcv.", "mmengine.", "mmcls_bnn.", "torchvision.")
_NOT_REPLAYED = ("Albumentations", "Albu")
_SET = ("model", "checkpoint", "smoothing", "convention")  # of the teacher, by the study


def views(plan: Plan, run: Run) -> Views:
    """Return what a student's training images follow from.

    Raises:
        CannotStoreError: its file stores by itself, or asks for what no seed repeats.
    """
    config = plan.configs[run.config]
    model, loader = config["model"], config.get("train_dataloader") or {}
    if model.get("distillation", {}).get("soft_labels"):
        raise CannotStoreError(f"{run.config} has a store of its own")
    if not any(hook.get("type") == "SoftLabelsHook" for hook in config.get("custom_hooks") or []):
        raise CannotStoreError(f"{run.config} has no SoftLabelsHook in custom_hooks")
    if not config.get("train_cfg", {}).get("by_epoch"):
        raise CannotStoreError(f"{run.config} does not train by epochs")
    preprocessors = [part["data_preprocessor"] for part in (config, model) if part.get("data_preprocessor")]
    train = model.get("train_cfg") or {}  # mmcls makes its augments those of the preprocessor
    caution = MIXED if any("augments" in key for part in (train, *preprocessors) for key in part) else ""
    sampler = (loader.get("sampler") or {}).get("type", "DefaultSampler")
    if sampler not in _SAMPLERS:
        raise CannotStoreError(f"{run.config} has {sampler}, and each image must come once in an epoch")
    dataset = dict(loader.get("dataset") or {})
    if "dataset" in dataset or "datasets" in dataset:
        raise CannotStoreError(f"{run.config} has a data set of data sets, {dataset.get('type')}")
    _check_transforms(run.config, dataset.get("pipeline"))
    epochs = int(config["train_cfg"]["max_epochs"])
    dataset.pop("data_root", None)
    taught = {name: value for name, value in model["teacher"].items() if name not in _SET}
    amp = (config.get("optim_wrapper") or {}).get("type") == "AmpOptimWrapper"
    fast = model.get("distillation", {}).get("teacher_fast")
    key = json.dumps([dataset, preprocessors, train, taught, fast, amp], sort_keys=True)
    return Views(key, epochs, epochs, caution)


def _check_transforms(path: str, part: Any) -> None:
    """Check a pipeline, transforms within transforms too."""
    from mmcls_bnn import data
    from mmcls_bnn.compat import FRAMEWORK, use_registry

    assert data  # importing it registers its transforms

    if isinstance(part, list):
        for inner in part:
            _check_transforms(path, inner)
    elif isinstance(part, Mapping):
        if "type" in part:
            use_registry()
            name = str(part["type"])
            found = import_module(f"{FRAMEWORK}.registry").TRANSFORMS.get(name)
            if found is None or name in _NOT_REPLAYED or not found.__module__.startswith(_REPLAYED):
                raise CannotStoreError(f"{path} has {name}, which may draw from a generator of its own")
        _check_transforms(path, list(part.values()))


def command(plan: Plan, store: Store, output: str | None = None) -> list[str]:
    """Return the shell command that stores, paths relative to ``plan.cwd``."""
    run = plan.run(store.writer)
    words = mmcls.command(plan, run, output)
    options = words[words.index("--cfg-options") :]
    return ["python", "-m", "mmcls_bnn.soft_labels", run.config, *options]


def write(words: list[str]) -> None:
    """Run such a command in this process.

    Raises:
        SystemExit: as the command would exit.
    """
    from mmcls_bnn.soft_labels import main

    if code := main(words[3:]):
        raise SystemExit(code)
