"""Binary weights as they are: one bit each, with one real scale for each output channel."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lskd import CheckpointError, LskdError
from lskd.base.files import parse_json, whole_file
from mmcls_bnn import losses  # noqa: F401 - what a student is made of is registered by importing it
from mmcls_bnn.binary import reactnet  # noqa: F401
from mmcls_bnn.binary.layers import BinaryConv2d, binary_layers, weight_scales
from mmcls_bnn.compat import BATCH_AUGMENTS, FRAMEWORK, MODELS, use_registry

FORMAT = "mmcls_bnn packed 1"
_TRAINING_ONLY = ("teacher", "distillation", "step1_checkpoint", "train_cfg", "pretrained", "init_cfg")
# Registered, but with weights or code from elsewhere.
_FROM_ELSEWHERE = frozenset(
    {"HuggingFaceClassifier", "ImageToImageRetriever", "TimmClassifier", "TIMMBackbone", "LsKdClassifier"}
)


class PackedConv2d(nn.Module):
    """A :class:`BinaryConv2d` for inference, with one bit for each weight.

    Args:
        shape: of the weights, `(out, in, k, k)`.
        stride: of the kernel.
        padding: with 0, on each side.

    Buffers: `signs`, uint8, eight weights in a byte (numpy.packbits of weight >= 0, in the weight's order,
    filled up with 0); `scale`, float32 `(out, 1, 1, 1)`. They are unpacked for each forward pass: this saves
    memory, not time, and gives the logits of training to the bit.
    """

    signs: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int, int, int], stride: int, padding: int) -> None:
        super().__init__()
        self.shape, self.stride, self.padding = shape, stride, padding
        self.register_buffer("signs", torch.zeros(-(-math.prod(shape) // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(shape[0], 1, 1, 1))

    @classmethod
    def of(cls, layer: BinaryConv2d) -> "PackedConv2d":
        """Pack a layer's latent weights."""
        out, channels, size, _ = layer.weight.shape
        packed = cls((out, channels, size, size), layer.stride, layer.padding)
        weight = layer.weight.detach()
        bits = np.packbits((weight >= 0).flatten().cpu().numpy())  # sign(0) is +1 (the paper's Sec. 5)
        packed.signs.copy_(torch.from_numpy(bits))
        packed.scale.copy_(weight_scales(weight))
        return packed

    def weight(self) -> Tensor:
        """Return the binary weights times their scales, `(out, in, k, k)`."""
        # In tensor operations, which torch.export and ONNX know.
        places = self.signs.new_tensor([128, 64, 32, 16, 8, 4, 2, 1])
        bits = (self.signs[:, None] & places).clamp(max=1).flatten()[: math.prod(self.shape)]
        return bits.view(self.shape).to(self.scale.dtype).sub_(0.5).mul_(2 * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, out, H', W')` of a batch `(B, in, H, W)`."""
        return functional.conv2d(x, self.weight(), stride=self.stride, padding=self.padding)


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
        raise LskdError(f"the model cannot be built: {' '.join(str(error).split())[:200]}.") from None
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
    packed = copy.deepcopy(model)
    found = binary_layers(packed)
    if not found:
        raise LskdError("the model has no binary weights to pack: it is of step 1, or of another network.")
    for name, module in found.items():
        packed.set_submodule(name, PackedConv2d.of(module))
    return packed.eval()


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


def load_packed(path: str | Path) -> nn.Module:
    """Return the classifier in a file of :func:`save_packed`, ready for inference.

    Raises:
        CheckpointError: for a file that is missing, damaged or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from None
    try:
        description = parse_json(metadata["model"]) if metadata.get("format") == FORMAT else None
    except (KeyError, ValueError):
        description = None
    if not isinstance(description, dict):
        raise CheckpointError(f"{path} was not written by python -m mmcls_bnn.export; give a file of its.")
    model = pack(build_student(description))
    model.load_state_dict(tensors)
    return model
