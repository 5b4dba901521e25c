"""Creating timm models, with one clear line for whatever goes wrong."""

import difflib
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import huggingface_hub
import timm
import torch
import torchvision
from torch import Tensor, nn

from lskd import CheckpointError, LskdError, load_teacher_weights
from lskd.checkpoints import load_strictly
from lskd.errors import one_line

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SECONDS = 5  # to wait for the network's word


def check_model_name(name: str, role: str) -> None:
    """Refuse a name that timm does not know; `role` is 'model' or 'teacher'.

    Raises:
        LskdError: with the nearest names that exist.
    """
    source, colon, rest = name.partition(":")
    if source in ("hf-hub", "hf_hub", "local-dir") and rest:  # resolved by timm
        return
    if colon:
        own = f"timm's own is called {rest}" if timm.is_model(rest) else "name a model of timm"
        also = " (torchvision's can be measured by lskd stability, not trained)" * (source == "torchvision")
        raise LskdError(f"unknown {role} '{name}': timm trains no models of '{source}'{also}; {own}.")
    architecture = name.partition(".")[0]
    if timm.is_model(architecture):
        try:
            timm.models.get_pretrained_cfg(name)
        except RuntimeError:
            tags = [tag for tag in timm.list_pretrained(architecture) if tag.startswith(architecture + ".")]
            raise LskdError(f"unknown {role} '{name}'; timm has {', '.join(tags) or architecture}.") from None
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() gives the names."
    raise LskdError(f"unknown {role} '{name}': timm has no such model; {hint}")


def check_pretrained(name: str, reach: bool = True) -> None:
    """Refuse pretrained weights that do not exist, or are neither here nor within reach; downloads nothing.

    Args:
        reach: ask the network where they are not here; False: that they exist is enough.

    Raises:
        LskdError: saying what to do.
    """
    if ":" in name:  # its source is asked when it is created
        return
    known = timm.models.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise LskdError(f"pretrained: timm has no weights for '{name}'; name a model with a tag")
    if not reach or _is_here(known):
        return
    try:
        if known.hf_hub_id:
            repository, _, revision = known.hf_hub_id.partition("@")
            file = known.hf_hub_filename or _HUB_FILES[0]
            url = huggingface_hub.hf_hub_url(repository, file, revision=revision or None)
            huggingface_hub.get_hf_file_metadata(url, timeout=_SECONDS)
        else:
            urlopen(Request(known.url, method="HEAD"), timeout=_SECONDS).close()
    except huggingface_hub.errors.EntryNotFoundError:
        return  # it is there, under its other name
    except Exception as error:  # the hub's client and sockets raise whatever they like
        raise LskdError(
            f"pretrained: the weights of '{name}' are not on this machine and cannot be had "
            f"({one_line(error, 80)}); make them first where there is a network, or drop pretrained"
        ) from None


def _is_here(known: Any) -> bool:
    if known.hf_hub_id:
        repository, _, revision = known.hf_hub_id.partition("@")
        files = (known.hf_hub_filename,) if known.hf_hub_filename else _HUB_FILES
        seek = partial(huggingface_hub.try_to_load_from_cache, repository, revision=revision or None)
        return any(isinstance(seek(file), str) for file in files)
    return not known.url or Path(torch.hub.get_dir(), "checkpoints", Path(known.url).name).is_file()


def create(
    name: str,
    role: str,
    extra: Mapping[str, Any] | None = None,
    fix: str = "drop --pretrained, or give weights with --initial-checkpoint FILE",
    **kwargs: Any,
) -> nn.Module:
    """Call timm's `create_model`; arguments that are None are left to the model.

    Args:
        fix: what to do when the pretrained weights cannot be had.
        **kwargs: for `create_model`.

    Raises:
        LskdError: unknown name, arguments that the model does not take, weights that cannot be had.
    """
    check_model_name(name, role)
    if twice := sorted((extra or {}).keys() & kwargs.keys()):
        raise LskdError(
            f"{role} '{name}': {twice[0]} has a flag of its own; give it there, not as KEY=VALUE."
        )
    kwargs |= extra or {}
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # its retries would bury the one line that says what is wrong
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except Exception as error:  # timm, the hub client and the models raise whatever they like
        if kwargs.get("pretrained"):
            raise LskdError(
                f"the pretrained weights of {role} '{name}' cannot be had ({one_line(error)}); {fix}."
            ) from None
        raise LskdError(f"{role} '{name}' cannot be created: {one_line(error)}") from None
    finally:
        hub_log.setLevel(level)
    return model


def input_arguments(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `create_model` needs of a run's arguments.

    That is model_kwargs, and img_size where the model is built for one input size (a ViT, say).
    """
    arguments = dict(settings.get("model_kwargs") or {})
    known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
    if known is not None and known.fixed_input_size:
        size = settings.get("img_size") or (settings.get("input_size") or (None,))[-1]
        if size is not None:
            arguments.setdefault("img_size", size)
    return arguments


def input_channels(settings: Mapping[str, Any]) -> int:
    """Return the input channels that a run's arguments ask for."""
    if settings.get("in_chans"):
        return int(settings["in_chans"])
    return int((settings.get("input_size") or (3,))[0])


def create_for_run(
    name: str,
    role: str,
    settings: Mapping[str, Any],
    num_classes: int | None,
    extra: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Create the model that a run with these arguments trains, or trained, without its weights."""
    return create(
        name,
        role,
        pretrained=False,
        num_classes=num_classes,
        in_chans=input_channels(settings),
        global_pool=settings.get("gp"),
        # Any bn_eps fits the weights; only upstream's script has an argument for it.
        extra={"bn_eps": settings.get("bn_eps"), **input_arguments(name, settings), **(extra or {})},
    )


def load_weights(model: nn.Module, name: str, path: str, use_ema: bool = True) -> None:
    """Load the weights in `path` into `model`, all of them and nothing else.

    Raises:
        CheckpointError: missing, damaged or unsafe file; another architecture; another class count or
            number of input channels, with both numbers.
        DivergedError: a weight is not a finite number.
    """
    fit_weights(model, name, path, load_teacher_weights(path, use_ema))


def fit_weights(model: nn.Module, name: str, path: str, weights: Mapping[str, Tensor]) -> None:
    """Load weights that were read from `path` into `model`, as `load_weights` does."""
    wanted = model.state_dict()
    for classifier in classifier_names(model):
        key = f"{classifier}.weight"
        if key in weights and key in wanted and len(weights[key]) != len(wanted[key]):
            raise CheckpointError(
                f"{path} has {len(weights[key])} classes, this run has {len(wanted[key])}; "
                "give a checkpoint that was trained on the same classes."
            )
    arguments = "input channels, image size, --kd-teacher-kwargs"
    fix = f"name the model it was saved from, with the arguments it was trained with ({arguments})"
    load_strictly(model, weights, name, path, fix)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Name the model's classifier modules, as its pretrained configuration does."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def first_channels(model: nn.Module) -> int:
    """Return the number of channels that a timm model's input must have."""
    channels = getattr(model, "in_chans", None)
    if isinstance(channels, int):
        return channels
    size = getattr(model, "pretrained_cfg", {}).get("input_size") or (3,)
    return int(size[0])


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


def create_torchvision(name: str, checkpoint: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """Create a classifier of torchvision with its weights, of as many classes as their last layer has.

    Args:
        checkpoint: the weights; torchvision's own old files are read too.

    Returns:
        The model, which names its classes and classifier as timm's do, and how images become its input, as
        timm's arguments: as torchvision says for its own files, known by their names, and its usual 224 of
        256 pixels elsewhere.

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
    weights = load_teacher_weights(checkpoint)
    weights = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in weights.items()}
    published = _published(name, checkpoint)
    arguments: dict[str, Any] = {}
    if name in _TRANSFORM_INPUT:
        arguments = {"init_weights": False, "transform_input": published is not None}
    model = _create(name, arguments)
    linear = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)]
    classifier = linear[-1] if linear else ""
    weight = weights.get(f"{classifier}.weight")
    classes = 1000 if weight is None else len(weight)
    if classes != 1000:
        model = _create(name, {**arguments, "num_classes": classes})
    named: Any = model
    named.num_classes, named.pretrained_cfg = classes, {"classifier": classifier}
    fit_weights(model, f"model '{PREFIX}{name}'", str(checkpoint), weights)
    return model, {**IMAGENET, **(published or {})}


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
