"""What a trained model says about the images of a split."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lskd import LskdError, load_teacher_weights
from lskd.checkpoints import settings_beside
from lskd.teachers.outputs import Answers, Evaluation, answer_batches
from timm_ls_kd.data import check_data, open_dataset, resolve_data
from timm_ls_kd.loader import eval_loader
from timm_ls_kd.models import (
    PREFIX,
    classifier_names,
    create,
    create_for_run,
    create_torchvision,
    fit_weights,
    input_arguments,
    input_channels,
    load_weights,
)
from timm_ls_kd.run_settings import read_config


def evaluate_model(
    name: str,
    checkpoint: Path | None,
    data_dir: Path | None,
    split: str = "validation",
    *,
    features: bool = False,
    img_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Answers:
    """Ask a model about a split, through its own validation transform.

    Image size, cropping, normalisation and interpolation are those of the run beside the checkpoint
    (args.yaml) where it is a run of this model, and the model's own defaults elsewhere; what is given here
    comes before both.

    Args:
        checkpoint: weights, the averaged ones where it has some; None: timm's pretrained weights.
        features: give the input of the classifier and its weight too.
        crop_pct: part of the resized image that is looked at.
        device: where to compute; None: CUDA where there is one.
        amp: mixed precision: float16 on CUDA, bfloat16 on CPU.
        world_size: number of processes; process r is asked about every world_size-th image from the r-th on.

    Raises:
        LskdError: an unknown model, weights that cannot be had or do not fit, data that cannot be read or has
            other classes, features of a model without a linear classifier.
        DivergedError: a weight is not finite; while the batches are taken, a logit is not.
    """
    given = {"img_size": img_size, "crop_pct": crop_pct}
    given = {key: value for key, value in given.items() if value is not None}
    settings: dict[str, Any] = {}
    if name.startswith(PREFIX):
        model, settings = create_torchvision(name.removeprefix(PREFIX), checkpoint)
        settings |= given
    else:
        if checkpoint is not None:
            settings = settings_beside(checkpoint, name)
        if img_size is not None and settings.get("input_size"):  # of the two the one that is given counts
            settings |= {"in_chans": input_channels(settings), "input_size": None}
        settings |= given
        model = _create(name, checkpoint, settings)
    settings |= {
        "dataset": "",
        "data_dir": None if data_dir is None else str(data_dir),
        "batch_size": batch_size,
        "validation_batch_size": None,
        "workers": workers,
    }
    check_data(
        "",
        settings["data_dir"],
        [split],
        class_map=settings.get("class_map") or "",
        other_split="rename the folder, or name another split",
    )
    return _ask(model, name, settings, split, features, device, amp, rank, world_size)


def collect_logits(
    run_dir: Path, checkpoint: str = "last.pth.tar", data_dir: Path | None = None
) -> Evaluation:
    """Run a trained model over its run's validation split, through its run's own validation transform.

    Arguments and errors are those of `open_run` and `ask_run`.
    """
    model, settings = open_run(run_dir, checkpoint)
    return ask_run(model, settings, data_dir).evaluation()


def open_run(run_dir: Path, checkpoint: str = "last.pth.tar") -> tuple[nn.Module, dict[str, Any]]:
    """Return a run's trained model and its settings.

    Args:
        checkpoint: file in it; where it has averaged weights these are used, as in the run's summary.csv.

    Raises:
        LskdError: a folder that is no run, a checkpoint that does not fit.
        DivergedError: a weight is not finite.
    """
    run_dir = Path(run_dir)
    settings = read_config(run_dir / "args.yaml")
    if "model" not in settings:
        raise LskdError(f"{run_dir / 'args.yaml'} names no model; give the folder of a timm run.")
    settings = {"batch_size": 128, "workers": 0, **settings}
    name = settings["model"]
    model = create_for_run(name, "model", settings, settings.get("num_classes"))
    load_weights(model, f"model '{name}'", str(run_dir / checkpoint))
    return model, settings


def ask_run(
    model: nn.Module,
    settings: Mapping[str, Any],
    data_dir: Path | None = None,
    device: torch.device | str | None = None,
) -> Answers:
    """Ask a model about the validation split of a run.

    Args:
        data_dir: data folder; None: the run's.
        device: where to compute; None: CUDA where there is one.

    Raises:
        LskdError: data that cannot be read.
        DivergedError: a logit is not finite.
    """
    # Upstream's positional argument stays under its own name in args.yaml.
    folder = str(data_dir) if data_dir else settings.get("data_dir") or settings.get("data")
    if folder is None or not Path(folder).exists():
        raise LskdError(f"data folder {folder} does not exist; give data_dir.")
    split = settings.get("val_split") or "validation"
    return _ask(model, settings["model"], {**settings, "data_dir": folder}, split, device=device)


def _create(name: str, checkpoint: Path | None, settings: Mapping[str, Any]) -> nn.Module:
    if checkpoint is None:
        arguments = input_arguments(name, settings)
        fix = "give weights with --checkpoint FILE"
        return create(name, "model", extra=arguments, fix=fix, pretrained=True)
    weights = load_teacher_weights(checkpoint)
    classes = settings.get("num_classes")
    model = create_for_run(name, "model", settings, classes)
    if classes is None:
        rows = {len(weights[key]) for c in classifier_names(model) if (key := f"{c}.weight") in weights}
        if len(rows) == 1 and rows != {cast(Any, model).num_classes}:
            model = create_for_run(name, "model", settings, rows.pop())
    fit_weights(model, f"model '{name}'", str(checkpoint), weights)
    return model


def _ask(
    model: nn.Module,
    name: str,
    settings: Mapping[str, Any],
    split: str,
    features: bool = False,
    device: torch.device | str | None = None,
    amp: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Answers:
    classes = int(cast(Any, model).num_classes)
    classifier = _linear_classifier(model, name) if features else None
    data = resolve_data(settings, model)
    dataset = open_dataset(settings, split, data.input_size[0], None)
    class_names = _class_names(dataset, settings, split, name, classes)
    keys = _keys(dataset, settings["data_dir"], split)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = Namespace(
        validation_batch_size=settings.get("validation_batch_size"),
        batch_size=settings["batch_size"],
        workers=settings["workers"],
        pin_mem=False,
        no_prefetcher=False,
        persistent_workers=False,
    )
    loader = eval_loader(dataset, data, options, where, rank, world_size)
    batches = answer_batches(
        loader,
        loader.sampler,
        model.to(where).eval(),
        model=f"model '{name}'",
        advice="give the size that it was trained on with --img-size",
        classifier=classifier,
        device=where,
        amp=amp,
    )
    templates = None if classifier is None else classifier.weight.detach().float().cpu()
    return Answers(batches, len(dataset), classes, keys, class_names, templates)


def _linear_classifier(model: nn.Module, name: str) -> nn.Linear:
    names = classifier_names(model)
    module = model.get_submodule(names[0]) if len(names) == 1 else None
    if not isinstance(module, nn.Linear) or module.out_features != cast(Any, model).num_classes:
        raise LskdError(
            f"model '{name}' has no single linear classifier, so no templates; choose another model"
        )
    return module


def _class_names(
    dataset: object, settings: Mapping[str, Any], split: str, name: str, classes: int
) -> list[str] | None:
    """Return the classes' names, where there is one for each.

    Raises:
        LskdError: for other labels than the model has classes.
    """
    ids: Mapping[str, int] = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    if not ids:
        return None
    count = max(ids.values()) + 1
    # A map of class names says which class is which; without one, fewer folders than classes are misnumbered.
    if count > classes or (count < classes and not settings.get("class_map")):
        raise LskdError(
            f"split '{split}' of {settings['data_dir'] or settings['dataset']} has {count} classes, "
            f"model '{name}' {classes}; give the model and the data that belong together"
        )
    names = {number: text for text, number in ids.items()}
    return [str(names[c]) for c in range(classes)] if len(names) == len(ids) == classes else None


def _keys(dataset: object, data_dir: str | None, split: str) -> list[str]:
    filenames = getattr(dataset, "filenames", None)
    if filenames is None:
        return [f"{split}/{index}" for index in range(len(dataset))]  # type: ignore[arg-type]
    root = Path(data_dir or "")
    paths = [Path(name) for name in filenames(absolute=True)]
    return [
        path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix() for path in paths
    ]
