"""torchvision's own classifiers, for weights that were trained with it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torchvision
from torch import nn

from lskd import LskdError
from lskd.errors import one_line
from timm_ls_kd.models import fit_weights, read_weights

PREFIX = "torchvision:"
IMAGENET = {
    "img_size": 224,
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
# densenet121 and its kin were saved with names such as denselayer1.norm.1.weight.
_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")
# Trained on images normalised as for Inception's first weights; these models change them if told to.
_TRANSFORM_INPUT = ("googlenet", "inception_v3")


def create_torchvision(
    name: str, checkpoint: Path | None, num_classes: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Create a classifier of torchvision with its weights.

    Args:
        name: torchvision's, without prefix.
        checkpoint: the weights; torchvision's own old files are read too.
        num_classes: None: as many as the checkpoint's classifier has.

    Returns:
        The model with an attribute ``num_classes``, and how images become its input, as timm's arguments: as
        torchvision says for its own files, known by their names, and its usual 224 of 256 pixels elsewhere.

    Raises:
        LskdError: unknown name, no checkpoint, weights that do not fit.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise LskdError(
            f"unknown model '{PREFIX}{name}'; torchvision's classifiers are {', '.join(known[:8])}, ... "
            "(torchvision.models.list_models())"
        )
    if checkpoint is None:
        raise LskdError(f"model '{PREFIX}{name}' has no weights; give a file of them with --checkpoint")
    weights = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in read_weights(str(checkpoint)).items()}
    published = _published(name, checkpoint)
    arguments: dict[str, Any] = {}
    if name in _TRANSFORM_INPUT:
        arguments = {"init_weights": False, "transform_input": published is not None}
    model = _create(name, arguments)
    classifier = _classifier(model)
    if num_classes is None and classifier is not None and f"{classifier}.weight" in weights:
        num_classes = len(weights[f"{classifier}.weight"])
    if num_classes not in (None, 1000):
        model = _create(name, {**arguments, "num_classes": num_classes})
    cast(Any, model).num_classes = num_classes or 1000
    fit_weights(model, f"model '{PREFIX}{name}'", str(checkpoint), weights)
    return model, {**IMAGENET, **(published or {})}


def linear_classifier(model: nn.Module) -> nn.Linear | None:
    """Return the last linear layer, which gives the logits; None where a model ends otherwise."""
    name = _classifier(model)
    return None if name is None else cast(nn.Linear, model.get_submodule(name))


def _classifier(model: nn.Module) -> str | None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        create: Callable[..., nn.Module] = torchvision.models.get_model
        return create(name, weights=None, **arguments)
    except (TypeError, ValueError) as error:
        raise LskdError(f"model '{PREFIX}{name}' cannot be created: {one_line(error)}") from None


def _published(name: str, checkpoint: Path) -> dict[str, Any] | None:
    """Return how torchvision prepares images for a file of its own."""
    for entry in torchvision.models.get_model_weights(name):
        if entry.url.rpartition("/")[2] == checkpoint.name:
            preset = entry.transforms()
            size, resized = preset.crop_size[0], preset.resize_size[0]
            return {
                "img_size": size,
                "crop_pct": size / resized,
                "interpolation": preset.interpolation.value,
                "mean": preset.mean,
                "std": preset.std,
            }
    return None
