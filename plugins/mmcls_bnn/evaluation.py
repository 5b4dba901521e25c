"""What a model of mmcls says about the validation images of its configuration."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lskd import CheckpointError, LskdError, load_teacher_weights
from lskd.base.images import check_images
from lskd.base.tensors import require_finite_weights
from lskd.errors import one_line
from lskd.teachers.outputs import Answers, answer_batches
from mmcls_bnn.compat import DATASETS, FRAMEWORK, MODELS, use_registry
from mmcls_bnn.data import CheckedImageFolder, name_of
from mmcls_bnn.distil.classifier import check_binarized, read_note
from mmcls_bnn.distil.teacher import LogitsOf
from mmcls_bnn.recipe import read_config

_UNREGISTERED = re.compile(r"(\S+) is not in the (\S+) registry")
_VALIDATION = ("val", "valid", "validation", "eval", "evaluation")


def evaluate_config(
    config: Path,
    checkpoint: Path | None,
    data_dir: Path | None = None,
    split: str = "validation",
    *,
    features: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str | None = None,
    amp: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Answers:
    """Ask the model of a configuration about its validation data set (`val_dataloader`).

    The configuration is Python and is run: name only files that you trust. The checkpoint is not, it is read
    without running what is in it. Weights that the configuration itself names are neither read nor
    downloaded.

    Args:
        config: configuration file of mmcls, such as those that mim downloads.
        checkpoint: weights that were saved from this model.
        data_dir: root of the data instead of the configuration's. Its `data_prefix` and `ann_file` stay where
            they exist in that folder; otherwise the images of `split` are taken, one folder a class.
        features: give the input of the classifier and its weight too.
        device: where to compute; None: CUDA where there is one.
        amp: mixed precision: float16 on CUDA, bfloat16 on CPU.
        world_size: number of processes; process r is asked about every world_size-th image from the r-th on.

    Raises:
        LskdError: a configuration that cannot be used, weights that are missing or do not fit, data that
            cannot be read or have other classes, features of a model without a linear classifier.
    """
    settings = _read(config)
    if checkpoint is None:
        raise LskdError(f"{config} has no weights; give a file of them with --checkpoint")
    weights = load_teacher_weights(checkpoint)
    # As mmengine's Runner does: a preprocessor beside the model is the model's.
    preprocessor = settings.get("data_preprocessor") or {}
    model = _build(config, "model", {"data_preprocessor": preprocessor, **settings["model"]})
    check_binarized(model, read_note(str(checkpoint)), str(checkpoint))
    _load(model, config, checkpoint, weights)
    data = dict(settings["val_dataloader"]["dataset"])
    if data_dir is not None:
        data |= _moved(data, Path(data_dir), split)
    dataset = _build(config, "data set", {**data, "test_mode": True})
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    if not isinstance(dataset, CheckedImageFolder):
        check_images([Path(info["img_path"]) for info in infos if "img_path" in info])
    classes = _num_classes(model, config)
    class_names = _class_names(dataset, config, classes)
    classifier = _linear_classifier(model, config, classes) if features else None
    share = range(rank, len(dataset), world_size)
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, share), batch_size, num_workers=workers, collate_fn=pseudo_collate
    )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(where).eval()
    logits = LogitsOf(model)
    batches = answer_batches(
        _labelled(_one_line_errors(loader, config), config),
        share,
        lambda batch: logits(model.data_preprocessor(batch, False)["inputs"]),
        model=f"the model of {config}",
        advice="check the pipeline of its val_dataloader",
        classifier=classifier,
        device=where,
        amp=amp,
    )
    return Answers(
        batches,
        len(dataset),
        classes,
        [name_of(dataset.data_root, info) or f"val/{index}" for index, info in enumerate(infos)],
        class_names,
        None if classifier is None else classifier.weight.detach().float().cpu(),
    )


def _read(config: Path) -> Config:
    use_registry()
    settings = read_config(config, kind="a configuration of mmcls")
    if not isinstance(settings.get("model"), Mapping):
        raise LskdError(f"config {config} has no model; name a configuration of mmcls")
    loader = settings.get("val_dataloader")
    if not isinstance(loader, Mapping) or not isinstance(loader.get("dataset"), Mapping):
        raise LskdError(f"config {config} has no val_dataloader with a dataset; add one")
    init_default_scope(settings.get("default_scope") or FRAMEWORK)
    return settings


def _build(config: Path, part: str, settings: Mapping[str, Any]) -> Any:
    try:
        if part == "model":
            return MODELS.build(_offline(settings))
        settings = dict(settings)
        kind = DATASETS.get(str(settings.get("type")))
        if kind is not None and "download" in inspect.signature(kind).parameters:
            settings.setdefault("download", False)
        return DATASETS.build(settings)
    except Exception as error:  # constructors raise whatever they like
        if found := _UNREGISTERED.search(str(error)):
            raise LskdError(
                f"config {config} names {found[1].strip(chr(39))}, which is not in the {found[2]} registry; "
                "install the package that has it and name it in custom_imports"
            ) from None
        if isinstance(error, FileNotFoundError) and error.filename:
            raise LskdError(
                f"the data of {config} are not there: {error.filename} does not exist; name their folder "
                "with --data-dir"
            ) from None
        raise LskdError(f"the {part} of {config} cannot be made ({one_line(error)}); check it") from None


def _offline(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that download nothing; all weights come from the checkpoint."""
    found = {key: _offline(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for key in ("pretrained", "checkpoint_path"):
        if found.get(key):
            found[key] = False if isinstance(found[key], bool) else ""
    return found


def _load(model: nn.Module, config: Path, checkpoint: Path, weights: Mapping[str, Tensor]) -> None:
    require_finite_weights((f"{key} in {checkpoint}", tensor) for key, tensor in weights.items())
    try:
        # Not by lskd's load_strictly: models of mmcls adapt weights when they load them, such as position
        # embeddings of another image size.
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = one_line(RuntimeError(lines[1] if len(lines) > 1 else lines[0]), 200).rstrip(". ")
        raise CheckpointError(
            f"{checkpoint} does not fit the model of {config} ({reason}); "
            "give weights that were saved from it"
        ) from None


def _moved(data: Mapping[str, Any], root: Path, split: str) -> dict[str, Any]:
    """Return the settings that place a data set in another folder."""
    if not root.is_dir():
        raise LskdError(f"data folder {root} does not exist; check the path")
    prefix = data.get("data_prefix") or ""
    inner = prefix.get("img_path", "") if isinstance(prefix, Mapping) else str(prefix)
    annotations = data.get("ann_file") or ""
    if (root / inner).is_dir() and (inner or annotations) and not Path(inner).is_absolute():
        listed = (root / annotations).is_file() and not Path(annotations).is_absolute()
        return {"data_root": str(root), **({} if listed else {"ann_file": ""})}
    names = list(dict.fromkeys([split, *(_VALIDATION if split in _VALIDATION else ())]))
    for name in names:
        if (root / name).is_dir():
            return {"data_root": str(root), "data_prefix": name, "ann_file": ""}
    raise LskdError(
        f"data folder {root} has no folder {inner or split!r} (looked for {', '.join(names)} too); "
        "name the folder that contains it"
    )


def _num_classes(model: Any, config: Path) -> int:
    for part in ("head", "model", "backbone"):
        count = getattr(getattr(model, part, None), "num_classes", None)
        if isinstance(count, int) and count > 0:
            return count
    raise LskdError(f"the model of {config} does not say its num_classes; give its head that")


def _class_names(dataset: Any, config: Path, classes: int) -> list[str] | None:
    names = dataset.metainfo.get("classes")
    if names is None:
        return None
    if len(names) != classes:
        raise LskdError(
            f"the data of {config} have {len(names)} classes, the model {classes}; "
            "give the model and the data that belong together"
        )
    return [str(name) for name in names]


def _linear_classifier(model: nn.Module, config: Path, classes: int) -> nn.Linear:
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if len(found) != 1:
        raise LskdError(
            f"the model of {config} has no single linear classifier, so no templates; choose another model"
        )
    return found[0]


def _labelled(batches: Iterable[Any], config: Path) -> Iterator[tuple[Any, Tensor]]:
    for batch in batches:
        labels = [sample.gt_label.label.flatten() for sample in batch["data_samples"]]
        if any(len(label) != 1 for label in labels):
            raise LskdError(f"the data of {config} have several labels an image; one is needed")
        yield batch, torch.cat(labels).long()


def _one_line_errors(loader: Iterable[Any], config: Path) -> Iterator[Any]:
    try:
        yield from loader
    except Exception as error:  # transforms raise whatever they like; workers wrap it in their traceback
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise LskdError(
            f"the data of {config} cannot be read ({one_line(RuntimeError(last[0]))}); repair or remove them"
        ) from None
