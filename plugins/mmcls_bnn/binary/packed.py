"""Binary weights as they are: one bit each, with one real scale for each output channel."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from lskd import CheckpointError, LskdError
from lskd.base.files import parse_json, whole_file
from lskd.errors import one_line
from mmcls_bnn import losses  # noqa: F401 - what a student is made of is registered by importing it
from mmcls_bnn.binary import reactnet  # noqa: F401
from mmcls_bnn.binary.fast import PackedConv2d, make_fast
from mmcls_bnn.binary.layers import BinaryConv2d, binary_layers
from mmcls_bnn.compat import BATCH_AUGMENTS, FRAMEWORK, MODELS, use_registry

FORMAT = "mmcls_bnn packed 1"
_TRAINING_ONLY = ("teacher", "distillation", "step1_checkpoint", "train_cfg", "pretrained", "init_cfg")
# Registered, but with weights or code from elsewhere.
_FROM_ELSEWHERE = frozenset(
    {"HuggingFaceClassifier", "ImageToImageRetriever", "TimmClassifier", "TIMMBackbone", "LsKdClassifier"}
)


def deployable(recipe: Config) -> dict[str, Any]:
    """Return the config of a recipe's student alone, without what training needs."""
    kept = {key: value for key, value in recipe.model.to_dict().items() if key not in _TRAINING_ONLY}
    preprocessor = recipe.get("data_preprocessor")
    kept.setdefault("data_preprocessor", preprocessor.to_dict() if preprocessor else {})
    if kept.get("type") in ("LsKdClassifier", "UntaughtClassifier"):
        kept["type"] = "ImageClassifier"
    return kept


def build_student(description: Mapping[str, Any]) -> nn.Module:
    """Build a classifier from :func:`deployable`'s config, in eval mode.

    Raises:
        LskdError: for a config that builds nothing, or asks for what is not registered.
    """
    use_registry()
    _check_types(description)
    try:
        model: nn.Module = MODELS.build(copy.deepcopy(dict(description)))
    except LskdError:
        raise
    except Exception as error:  # the registry raises whatever its classes raise
        raise LskdError(f"the model cannot be built: {one_line(error, 200)}.") from None
    return model.eval()


def _check_types(part: Any) -> None:
    """Refuse what is not registered: mmengine would import and call whatever function has such a name."""
    if isinstance(part, Mapping):
        kind = part.get("type")
        if isinstance(kind, str):
            name = kind.removeprefix(f"{FRAMEWORK}.").removeprefix("mmengine.")
            known = (BATCH_AUGMENTS, MODELS, MODELS.parent)
            if name in _FROM_ELSEWHERE or not any(name in registry.module_dict for registry in known):
                raise LskdError(f"the model cannot be built: {kind[:80]!r} is no registered layer or loss.")
        for key, value in part.items():
            if key != "init_cfg":  # of weights that are loaded
                _check_types(value)
    elif isinstance(part, list | tuple):
        for value in part:
            _check_types(value)


def pack(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its binary convolutions packed.

    Raises:
        LskdError: for a model without binary weights (step 1, say).
    """
    return _with_packed(copy.deepcopy(model), PackedConv2d.of)


def _with_packed(model: nn.Module, packed: Callable[[BinaryConv2d], PackedConv2d]) -> nn.Module:
    found = binary_layers(model)
    if not found:
        raise LskdError("the model has no binary weights to pack: it is of step 1, or of another network.")
    for name, module in found.items():
        model.set_submodule(name, packed(module))
    return model.eval()


def save_packed(model: nn.Module, description: Mapping[str, Any], path: Path) -> None:
    """Write a packed model; the file appears whole or not at all.

    Raises:
        LskdError: for a path that cannot be written.
    """
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    try:
        with whole_file(path) as scratch:
            save_file(tensors, scratch, {"format": FORMAT, "model": json.dumps(description)})
    except SafetensorError as error:
        raise LskdError(f"cannot write {path} ({error}); choose another output.") from None


class _WithoutMemory(TorchFunctionMode):
    """What is built here has shapes alone: its numbers come from a file, and a forged one names any size."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn):
            given["device"] = "meta"
        return func(*args, **given)


def load_packed(path: str | Path, fast: bool = True) -> nn.Module:
    """Return the classifier in a file of :func:`save_packed`, ready for inference.

    Args:
        fast: with :func:`mmcls_bnn.binary.fast.make_fast`; otherwise each layer unpacks its weights when it
            runs, and the logits are those of training to the bit.

    Raises:
        CheckpointError: for a file that is missing, damaged, or of another kind or version.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {one_line(error)}.") from None
    written = metadata.get("format", "")
    if written != FORMAT and written.startswith(FORMAT.rstrip("0123456789")):
        raise CheckpointError(f"{path} has the format {written[:40]!r}, not {FORMAT!r}; export it again.")
    try:
        description = parse_json(metadata["model"]) if written == FORMAT else None
    except (KeyError, ValueError):
        description = None
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} was not written by python -m mmcls_bnn.export; give a file of its.")
    with _WithoutMemory():
        model = _with_packed(build_student(description), PackedConv2d.like)
    expected = model.state_dict()
    wanted, found = ({(key, value.shape) for key, value in each.items()} for each in (expected, tensors))
    if differing := wanted ^ found:
        key, _ = min(differing)
        raise CheckpointError(f"{path} is damaged: its '{key}' is not what its network has; export it again.")
    typed = {name: value.to(expected[name].dtype) for name, value in tensors.items()}
    model.load_state_dict(typed, assign=True)
    return make_fast(model) if fast else model
