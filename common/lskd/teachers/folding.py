"""Batch norm folded into the convolution before it: the same function with less to compute."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lskd.errors import one_line

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Remainder = Callable[[Any], nn.Module]
"""What is left of a layer of batch norm when its normalisation is folded away, such as its activation."""


class Folding(NamedTuple):
    """What :func:`fold_batch_norm` did.

    Attributes:
        folded: batch norms that are now part of the convolution before them.
        total: batch norms that there were.
        reason: why nothing could be folded; empty where the model could be traced.
    """

    folded: int
    total: int
    reason: str = ""

    def __str__(self) -> str:
        """Say it."""
        if self.total == 0:
            return "no batch norm to fold"
        if self.reason:
            return f"batch norm not folded ({self.reason})"
        return f"{self.folded} of {self.total} batch norms folded"


def fold_batch_norm(
    model: nn.Module,
    convolutions: tuple[type[nn.Module], ...] = (),
    norms: Mapping[type[nn.Module], Remainder] | None = None,
) -> Folding:
    """Fold every batch norm of ``model`` that follows a convolution, in place.

    The model is traced to see what follows what; its modules are changed and its own `forward` stays in use.
    A pair is folded where nothing else sees what is between the two and neither is used a second time. A
    model that cannot be traced is left as it is.

    Args:
        model: in eval mode.
        convolutions: types, besides torch's own, that compute a convolution with `weight` and `bias` as they
            are. Subclasses do not count: one that standardises its weights would come out wrong.
        norms: types, besides torch's own, that begin with a batch norm, and what is left of one.

    Raises:
        ValueError: for a model in training mode.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> str(fold_batch_norm(net)), type(net[1]).__name__
    ('1 of 1 batch norms folded', 'Identity')
    """
    if model.training:
        raise ValueError("batch norm can be folded in eval mode only; call model.eval() first")
    remainders: dict[type[nn.Module], Remainder] = dict.fromkeys(_NORMS, lambda norm: nn.Identity())
    remainders.update(norms or {})
    layers = (*_CONVOLUTIONS, *convolutions)
    total = sum(type(module) in remainders for module in model.modules())
    if total == 0:
        return Folding(0, 0)
    try:
        graph = _Tracer((*layers, *remainders)).trace(model)
    except Exception as error:  # a model's own code runs on stand-ins for tensors: anything may come
        return Folding(0, total, f"it cannot be traced: {one_line(error, 80)}")
    modules = dict(model.named_modules())
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    # Parameters that are read by name, too: a tied weight must not be changed for its other reader.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    folded = 0
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[str(node.target)]) not in remainders:
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, torch.fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        names = (str(source.target), str(node.target))
        layer, norm = (modules[name] for name in names)
        if type(layer) not in layers or calls[id(layer)] > 1 or calls[id(norm)] > 1 or read & set(names):
            continue
        if not _foldable(layer, norm):
            continue
        fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        model.set_submodule(names[0], fused.requires_grad_(False))
        model.set_submodule(names[1], remainders[type(norm)](norm).eval())
        folded += 1
    return Folding(folded, total)


class _Tracer(torch.fx.Tracer):
    """Sees the layers that may be folded as one step each, whichever package they are from."""

    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)


def _foldable(layer: Any, norm: Any) -> bool:
    if norm.running_mean is None or norm.running_var is None:  # normalises by the batch, even in eval mode
        return False
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (layer, norm))
    parametrised = hasattr(layer, "parametrizations")
    return not hooked and not parametrised and bool(layer.out_channels == norm.num_features)
