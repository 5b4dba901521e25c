"""The start of step 2 from a checkpoint of step 1: strict, and from step 1 alone."""

import warnings
from typing import Any

import torch
from torch import nn

from lskd import CheckpointError, load_teacher_weights
from lskd.checkpoints import is_safetensors

NOTE = "mmcls_bnn"
"""Key in a checkpoint's `meta` under which it says what was binarised."""


def binarized_in(model: nn.Module) -> list[str] | None:
    """Return what a classifier's backbone binarises; None where it is none of this package's."""
    binarize = getattr(getattr(model, "backbone", None), "binarize", None)
    return None if binarize is None else list(binarize)


def read_note(path: str) -> dict[str, Any]:
    """Return what a checkpoint says about itself; {} where it says nothing.

    Raises:
        CheckpointError: for a file that is missing, damaged or unsafe.
    """
    load_teacher_weights(path)  # whose errors are the clear ones
    if is_safetensors(path):
        return {}
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(file, map_location="cpu", weights_only=True)
    meta = content.get("meta") if isinstance(content, dict) else None
    note = meta.get(NOTE) if isinstance(meta, dict) else None
    return note if isinstance(note, dict) else {}


def load_step1(model: nn.Module, path: str) -> None:
    """Load a step-1 checkpoint into a step-2 model, every weight of it.

    Raises:
        CheckpointError: for a file that is missing or unsafe, that is not of step 1, or that does not fit.
    """
    binarize = read_note(path).get("binarize")
    if binarize != ["activations"]:
        what = "does not say that it is" if binarize is None else f"has {binarize} binarised, so it is not"
        raise CheckpointError(
            f"step1_checkpoint {path} {what} step 1; give one that a step-1 recipe "
            "(binarize=('activations',)) has written."
        )
    weights = load_teacher_weights(path, use_ema=False)
    wanted = model.state_dict()
    for key in sorted(wanted.keys() | weights.keys()):
        if key not in weights or key not in wanted or weights[key].shape != wanted[key].shape:
            raise CheckpointError(
                f"step1_checkpoint {path} is of another network: '{key}' differs; "
                "give the same depth, width, stem and classes as in step 1."
            )
    model.load_state_dict(weights)
