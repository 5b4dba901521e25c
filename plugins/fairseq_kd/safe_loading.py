"""fairseq's checkpoints under torch's `weights_only`: an allow-list of what they hold, none of it code."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from numpy._core import multiarray

from lskd import CheckpointError, load_teacher_weights

_KINDS = ("f2", "f4", "f8", "i4", "i8", "u1", "?")


def install() -> None:
    """Allow the settings and meters that fairseq stores beside the weights.

    Only processes that import this plugin benefit, so `--user-dir` belongs to fairseq-generate and
    fairseq-validate too. Names from other modules stay refused.
    """
    harmless: list[Any] = [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        multiarray._reconstruct,
        multiarray.scalar,
    ]
    harmless += [(multiarray._reconstruct, "numpy.core.multiarray._reconstruct")]  # as numpy 1 wrote them
    harmless += [(multiarray.scalar, "numpy.core.multiarray.scalar")]
    harmless += [type(np.dtype(kind)) for kind in _KINDS]
    torch.serialization.add_safe_globals(harmless)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what fairseq stored: weights, settings (``cfg``) and the state of the training.

    Raises:
        CheckpointError: missing, damaged, unsafe, or not of fairseq.
    """
    try:
        state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    except Exception:
        load_teacher_weights(path)  # says in one line what is wrong with the file
        raise CheckpointError(
            f"checkpoint {path} was not written by fairseq-train: it has no settings of a model; "
            "give a checkpoint_*.pt that it wrote"
        ) from None
    if not isinstance(state.get("model"), Mapping) or not state.get("cfg"):
        raise CheckpointError(
            f"checkpoint {path} was not written by fairseq-train: it has no model and settings; "
            "give a checkpoint_*.pt that it wrote"
        )
    return state
