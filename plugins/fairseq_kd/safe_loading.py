"""fairseq's checkpoints: read under torch's `weights_only`, and built only of what runs no code of the file.

Two ways lead from a file to code. What is pickled: torch's allow-list decides, with harmless names added.
And what is built: fairseq takes architecture, task and settings from the file, and evaluates some as Python.
So fairseq's own functions are wrapped: every command that loads a model asks here first.
"""

import argparse
import copy
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, models
from fairseq.models.bart import BARTModel
from fairseq.models.lightconv import LightConvModel
from fairseq.models.lstm import LSTMModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_align import TransformerAlignModel
from numpy._core import multiarray
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lskd import CheckpointError, checkpoints
from lskd.base.files import parse_json
from lskd.errors import one_line

_KINDS = ("f2", "f4", "f8", "i4", "i8", "u1", "?")

# What may be built of a file. Of these classes' settings fairseq evaluates only those of _EVALUATED.
TASKS = ("translation", "translation_ls_kd")
_MODELS = (TransformerModel, TransformerAlignModel, BARTModel, LSTMModel, LightConvModel)
_CRITERIA = (
    "cross_entropy",
    "label_smoothed_cross_entropy",
    "label_smoothed_cross_entropy_with_alignment",
    "ls_kd",
)
_DETOKENISERS = (None, "space", "moses", "nltk")
_EVALUATED = ("adaptive_softmax_cutoff", "xformers_att_config", "decoder_attention")
_NOT_CALLED = re.compile(r"[\w., -]*", re.ASCII)  # whatever Python makes of it, it calls nothing
_LANGUAGE = re.compile(r"[\w-]*")
_MOST_LAYERS = 1000
_LARGEST_BEAM = 1000
# What fairseq raises when it builds of settings that do not fit.
UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_UNSTORED = 1 << 26  # numbers that a network may have beyond those in its file: tables of positions


@dataclass
class _Building:
    """What a call of fairseq's loader is about: whether it takes the task from the file too, and the file."""

    task: bool
    path: str = ""
    numbers: int = 0  # that the file has


_building: ContextVar[_Building | None] = ContextVar("building", default=None)


def install() -> None:
    """Allow the settings and meters that fairseq stores beside the weights; guard what is built of a file.

    Only processes that import this plugin benefit, so `--user-dir` belongs to fairseq-generate and
    fairseq-validate too. Names from other modules stay refused.
    """
    arrays: list[Any] = [multiarray._reconstruct, multiarray.scalar]
    of_numpy_1 = [(made, f"numpy.core.multiarray.{made.__name__}") for made in arrays]
    kinds = [type(np.dtype(kind)) for kind in _KINDS]
    harmless = [argparse.Namespace, np.ndarray, np.dtype, *arrays, *of_numpy_1, *kinds]
    torch.serialization.add_safe_globals(harmless)
    wrap(checkpoint_utils, "load_checkpoint_to_cpu", _read)
    wrap(checkpoint_utils, "load_model_ensemble_and_task", _build_all)
    wrap(models, "build_model", _build)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(original, *args, **kwargs)`` in the place of a function of fairseq."""
    original = getattr(owner, name)
    if getattr(original, "of_fairseq_kd", False):  # --user-dir by another name imports the plugin again
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped.of_fairseq_kd = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what fairseq stored: weights, settings (``cfg``) and the state of the training.

    Raises:
        LskdError: missing, damaged, unsafe, or not of fairseq.
    """
    state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    return state


def check_settings(cfg: Any, path: str | Path, task: bool = True) -> None:
    """Check that what fairseq builds of a file's settings runs nothing that is written in them.

    Args:
        cfg: the file's settings. Files of embeddings are taken out: all weights are in the checkpoint; and
            BART's heads for classes, and its task of before, which nothing here reads.
        path: the file, for the message.
        task: whether the task is built of them too.

    Raises:
        CheckpointError: an architecture or task beyond those known to be safe, or a setting that is not.
    """
    try:
        check_model(cfg.model, f"checkpoint {path}")
        if task:
            _check_task(cfg.task, f"checkpoint {path}")
    except OmegaConfBaseException as error:
        reason = f"its settings cannot be read ({str(error).splitlines()[0]})"
        raise _refused(f"checkpoint {path}", reason) from None


def check_model(settings: Any, file: str) -> None:
    """Check the settings of a model: see :func:`check_settings`.

    Args:
        settings: with the architecture as `_name` or `arch`.
        file: what they are of, for the message.

    Raises:
        CheckpointError: an architecture beyond those known to be safe, or a setting that is not.
    """
    name = setting(settings, "_name") or setting(settings, "arch")
    if _class_of(settings) not in _MODELS:
        known = ", ".join(sorted(each for each, of in models.MODEL_REGISTRY.items() if of in _MODELS))
        raise _refused(file, f"its architecture is {name!r:.60}, and only {known} are known to run no code")
    for owner, key, value in _settings(settings):
        if key.endswith(_EVALUATED) and not _is_inert(value):
            raise _refused(file, f"its setting {key} would be run as code")
        number = isinstance(value, int | float | np.number)
        if key.endswith("layers") and number and float(value) > _MOST_LAYERS:
            raise _refused(file, f"its setting {key} is {float(value):g}, more than {_MOST_LAYERS} layers")
        # BART makes a head for classes, and of this task words, as large as the shapes of tensors say: which
        # may be of one number.
        if key.endswith(("embed_path", "load_checkpoint_heads")) and value:
            _set(owner, key, None)
        elif key == "task" and value == "multilingual_denoising":
            _set(owner, key, "translation")


def _class_of(settings: Any) -> Any:
    """Return the class of a model by its settings; None: fairseq has none of the name."""
    name = setting(settings, "_name") or setting(settings, "arch")
    return models.ARCH_MODEL_REGISTRY.get(name) if isinstance(name, str) else None


def _check_task(settings: Any, file: str) -> None:
    name = setting(settings, "_name") or setting(settings, "task")
    if name not in TASKS:
        raise _refused(file, f"its task is {name!r:.60}, and the plugin knows {' and '.join(TASKS)}")
    for key in ("source_lang", "target_lang"):
        if not _LANGUAGE.fullmatch(str(setting(settings, key) or "")):
            raise _refused(file, f"its setting {key} is no language")
    if setting(settings, "eval_bleu_detok") not in _DETOKENISERS:
        raise _refused(file, "its setting eval_bleu_detok is none of fairseq's")
    for key in ("eval_bleu_args", "eval_bleu_detok_args"):
        try:
            content = parse_json(str(setting(settings, key) or "{}"))
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise _refused(file, f"its setting {key} is no JSON object")
        beam = content.get("beam", 1)
        if not isinstance(beam, int) or beam > _LARGEST_BEAM:
            raise _refused(file, f"its setting {key} has a beam of {beam!r:.20}")


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, argparse.Namespace):
        setattr(owner, key, value)
    else:
        owner[key] = value


def _settings(settings: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield owner, name and value of all settings, however deep."""
    left, seen = [settings], set()
    while left:
        owner = left.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        for key in list(vars(owner)) if isinstance(owner, argparse.Namespace) else list(owner):
            value = setting(owner, key)
            yield owner, str(key), value
            if isinstance(value, argparse.Namespace | Mapping | DictConfig):
                left.append(value)


def _is_inert(value: Any) -> bool:
    if isinstance(value, str):
        return _NOT_CALLED.fullmatch(value) is not None
    if value is None or isinstance(value, bool | int | float):
        return True
    return not isinstance(value, bytes | bytearray | Mapping) and all(
        isinstance(one, int | float) for one in value
    )


def _read(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for `load_checkpoint_to_cpu`: a file that cannot be read is one line."""
    _refuse_cut(Path(path))
    checkpoints.refuse_bomb(path)
    try:
        state = load(path, *args, **kwargs)
        whole = isinstance(state["model"], Mapping) and bool(state["cfg"])
    except Exception:  # of torch's unpickler, or of fairseq's upgrades of what a forged file contains
        # Says in one line what is wrong with the file.
        checkpoints.read_checkpoint(path, "use one that fairseq itself wrote")
        whole = False
    if not whole:
        raise CheckpointError(
            f"checkpoint {path} was not written by fairseq-train: it has no model and settings as it stores "
            "them; give a checkpoint_*.pt that it wrote"
        ) from None
    if (building := _building.get()) is not None:
        _note(building, state, path)
    return state


def _refuse_cut(path: Path) -> None:
    """Refuse a file that ends too early, and name one to go on from: its run was ended, or the disk full."""
    if not os.path.isfile(path) or checkpoints.has_end(path):
        return
    with open(path, "rb") as file:
        if file.read(2) not in (b"PK", b""):
            return
    others = [other for other in path.parent.glob("checkpoint*.pt") if checkpoints.has_end(other)]
    newest = max(others, key=lambda other: other.stat().st_mtime, default=None)
    advice = f"go on from a whole one with --restore-file {newest}, or " if newest else ""
    raise CheckpointError(f"checkpoint {path} was cut while it was written; {advice}remove it to begin anew")


def _build_all(load: Callable[..., Any], filenames: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for `load_model_ensemble_and_task`."""
    names = ("arg_overrides", "task", "strict", "suffix", "num_shards", "state")
    given = dict(zip(names, args, strict=False)) | kwargs
    building = _Building(task=given.get("task") is None)
    token = _building.set(building)
    try:
        if given.get("state") is not None:
            _note(building, given["state"], filenames[0])
        ensemble, cfg, task = load(filenames, **given)
    except UNFIT as error:
        raise CheckpointError(
            f"checkpoint {building.path} does not fit its own settings or this data ({one_line(error)}); "
            "give one that was trained on this data-bin"
        ) from None
    finally:
        _building.reset(token)
    if building.task:
        build_criterion = task.build_criterion

        def checked(settings: Any, *args: Any, **kwargs: Any) -> Any:
            if (name := setting(settings, "_name")) not in _CRITERIA:
                reason = f"its criterion is {name!r:.60}, and only {', '.join(_CRITERIA)} are known"
                raise _refused(f"checkpoint {building.path}", reason)
            return build_criterion(settings, *args, **kwargs)

        task.build_criterion = checked  # fairseq-validate builds the criterion that the file names
    return ensemble, cfg, task


def _note(building: _Building, state: dict[str, Any], path: Any) -> None:
    check_settings(state["cfg"], path, building.task)
    checkpoints.require_content(state["model"], path)
    state["args"] = None  # of old checkpoints; upgraded to cfg, which is what was checked
    stored = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // tensor.element_size()
        for tensor in state["model"].values()
        if isinstance(tensor, Tensor)
    }
    building.path, building.numbers = str(path), sum(stored.values())


def _build(build: Callable[..., Any], cfg: Any, task: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for `models.build_model`: a small file must not ask for a network that fills the memory."""
    if (building := _building.get()) is not None:
        # Shapes alone. On "meta" BART could not be built: it draws its weights elsewhere and copies them.
        # Fake tensors take twice as long.
        shapes_alone = FakeTensorMode() if _class_of(cfg) is BARTModel else torch.device("meta")
        with torch.random.fork_rng(devices=[]), shapes_alone:
            shapes: nn.Module = build(copy.deepcopy(cfg), task, *args, **kwargs)
        needed = sum(tensor.numel() for tensor in (*shapes.parameters(), *shapes.buffers()))
        if needed > building.numbers + _UNSTORED:
            reason = f"its settings ask for {needed:,} numbers, the file has {building.numbers:,}"
            raise _refused(f"checkpoint {building.path}", reason)
    return build(cfg, task, *args, **kwargs)


def _refused(file: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is refused: {reason}; use one of `fairseq-train --task translation`")


def setting(settings: Any, name: str) -> Any:
    """Return a setting of a namespace or a configuration; None: it has none of the name."""
    if isinstance(settings, Mapping | DictConfig):
        return settings.get(name)
    return getattr(settings, name, None)
