"""lskd's plugin for mmcls: binary networks that learn from a frozen teacher.

A recipe imports `mmcls_bnn.register`, which registers everything here with mmcls (or mmpretrain).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcls_bnn.binary.layers import BinaryConv2d, RPReLU, RSign
    from mmcls_bnn.binary.reactnet import ReActNet, ReActNetA
    from mmcls_bnn.distil.classifier import LsKdClassifier

__all__ = ["BinaryConv2d", "LsKdClassifier", "RPReLU", "RSign", "ReActNet", "ReActNetA"]

_HOMES = {
    "BinaryConv2d": "binary.layers",
    "LsKdClassifier": "distil.classifier",
    "RPReLU": "binary.layers",
    "RSign": "binary.layers",
    "ReActNet": "binary.reactnet",
    "ReActNetA": "binary.reactnet",
}


def __getattr__(name: str) -> Any:
    """Import mmcls only when something of it is asked for: a command's errors and help must be quick."""
    if name in _HOMES:
        return getattr(import_module(f"mmcls_bnn.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmcls_bnn' has no attribute '{name}'")
