"""Convolutions in 8 bits for processors with VNNI: torch's post-training quantisation, in one place."""

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lskd.errors import LskdError, one_line


def has_eight_bit() -> bool:
    """Tell whether processor and torch have fast 8-bit convolutions.

    torch has announced the end of this module without a successor of its own; a torch without it counts as a
    processor without it.
    """
    if not torch.cpu._is_vnni_supported() or "onednn" not in torch.backends.quantized.supported_engines:
        return False
    try:
        return importlib.util.find_spec("torch.ao.quantization.quantize_fx") is not None
    except ImportError:
        return False


def quantise_convolutions(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a model whose convolutions, and the sums between them, work on 8-bit numbers.

    Weights have a scale for each channel, activations one for each layer, from the range that they have on
    ``images``. Linear layers stay as they are: 8 bits of a logit are too few for a teacher.

    Args:
        model: in eval mode, batch norm folded; it is not changed.
        images: ``(N, C, H, W)``, which ranges are taken from.

    Raises:
        LskdError: the model cannot be traced or has nothing that can be quantised.
    """
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.backend_config import get_onednn_backend_config
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping: Any = get_default_qconfig_mapping("onednn").set_object_type(nn.Linear, None)
    backend = get_onednn_backend_config()
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "onednn"
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that it will go some day, see has_eight_bit
            observed = prepare_fx(model, mapping, (images[:1],), backend_config=backend)
            for start in range(0, len(images), 16):
                observed(images[start : start + 16])
            quantised: nn.Module = convert_fx(observed, backend_config=backend)
            quantised(images[:1])
    except Exception as error:  # a model's own code runs on stand-ins for tensors: anything may come
        raise LskdError(f"it cannot be traced or computed in 8 bits: {one_line(error, 80)}") from None
    finally:
        torch.backends.quantized.engine = before
    if not any("quantized" in type(module).__module__ for module in quantised.modules()):
        raise LskdError("it has no convolution that can be computed in 8 bits")
    return quantised
