"""The online teacher: one or several frozen fairseq models, outside of the student."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.models import FairseqEncoderDecoderModel
from torch import Tensor, nn

from fairseq_kd.safe_loading import read_checkpoint
from lskd import CheckpointError, LskdError, ensemble_logits, file_checksum

_SENSE_SENTENCES = 16


class Teacher:
    """Frozen models in evaluation mode. No ``nn.Module``: nothing can take it for part of the student.

    Attributes:
        paths: checkpoint files.
        checksum: of the files, joined by ``:``.
        architecture: names of the models' architectures, joined by ``:``.
        models: the models.
        task: the first model's task, with the dictionaries of ``data``.
        settings: the first checkpoint's configuration.
        bleu: the validation BLEU that the first checkpoint was chosen by; None where it was another metric.
    """

    def __init__(
        self, paths: Sequence[str | Path], data: str, source: str | None, target: str | None
    ) -> None:
        """Load the models with the dictionaries of ``data``."""
        self.paths = [best_checkpoint(path) for path in paths]
        self.checksum = ":".join(file_checksum(path) for path in self.paths)
        self.models: list[nn.Module] = []
        self.task: Any = None
        names = []
        with _same_random_numbers_after():
            for path in self.paths:
                state, model, task = _load(path, data, source, target)
                names.append(str(_get(state["cfg"].model, "_name") or _get(state["cfg"].model, "arch")))
                if self.task is None:
                    self.task, self.settings, self.bleu = task, state["cfg"], _bleu_of(state)
                self.models.append(model)
        self.architecture = ":".join(names)

    def to(self, like: Tensor) -> None:
        """Move the models to the device and precision of ``like``."""
        for model in self.models:
            first = next(model.parameters())
            if first.device != like.device or first.dtype != like.dtype:
                model.to(device=like.device, dtype=like.dtype)

    @torch.inference_mode()
    def logits(self, net_input: dict[str, Any]) -> Tensor:
        """Return logits ``(batch, target length, vocabulary)`` for the target as it is (teacher forcing)."""
        return ensemble_logits([model(**net_input)[0] for model in self.models])

    def check_sense(self, pairs: Any) -> None:
        """Refuse a teacher that does worse than guessing on some sentences, as with another dictionary.

        Args:
            pairs: a data set of sentence pairs; None checks nothing.

        Raises:
            LskdError: for a teacher that gives the targets far less than one in the vocabulary's size.
        """
        if not pairs:
            return
        batch = pairs.collater([pairs[index] for index in range(min(len(pairs), _SENSE_SENTENCES))])
        target = batch["target"]
        mask = target.ne(self.task.target_dictionary.pad())
        logits = self.logits(batch["net_input"])[mask].float()
        nll = float(nn.functional.cross_entropy(logits, target[mask]))
        chance = math.log(logits.shape[-1])
        if not nll < chance + 1:
            raise LskdError(
                f"teacher {self} gives this data's target words less than chance (nll {nll:.1f} nats, "
                f"guessing has {chance:.1f}); its dictionary is another one: give a teacher that was trained "
                "on this data-bin"
            )

    def __str__(self) -> str:
        """Name the files."""
        return ":".join(map(str, self.paths))


def split_paths(text: str) -> list[str]:
    """Split `A:B` into its files.

    Raises:
        LskdError: for an empty name.
    """
    paths = text.split(":")
    if not all(paths):
        raise LskdError(f"--kd-teacher is '{text}'; give a file, or several as A:B")
    return paths


def best_checkpoint(path: str | Path) -> Path:
    """Return a file; of a folder of checkpoints the best one.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint_best.pt"
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is not a file; check the path")
    return path


def _load(path: Path, data: str, source: str | None, target: str | None) -> tuple[dict[str, Any], Any, Any]:
    # A task of its own: building a model with the student's would replace the student's sequence generator,
    # and the teacher's BLEU would be reported as the student's.
    overrides: dict[str, Any] = {"data": data}
    overrides |= {"source_lang": source} if source else {}
    overrides |= {"target_lang": target} if target else {}
    overrides |= {"eval_bleu": False, "kd_soft_labels": None, "load_alignments": False}
    state = read_checkpoint(path)
    own_data = _get(_get(state["cfg"], "task"), "data")
    overwrite_args_by_name(state["cfg"], overrides)
    _check_dictionaries(path, state, data, own_data)
    state["args"] = None  # of old checkpoints, upgraded to cfg by now
    try:
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], state=state)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit its own settings or this data ({_one_line(error)}); "
            "give a teacher that was trained on this data-bin"
        ) from None
    model = models[0]
    if not isinstance(model, FairseqEncoderDecoderModel):
        raise CheckpointError(
            f"checkpoint {path} is a {type(model).__name__}, no encoder-decoder; give one that translates"
        )
    return state, model.eval().requires_grad_(False), task


def _check_dictionaries(path: Path, state: dict[str, Any], data: str, own_data: str | None) -> None:
    """Compare entries by number, and by name where the teacher's data-bin is still there.

    Otherwise it would be a page about shapes in `load_state_dict`, or nothing at all.
    """
    task = _get(state["cfg"], "task")
    inferred = data_utils.infer_language_pair(data.split(":")[0])
    given = _get(task, "source_lang"), _get(task, "target_lang")
    languages = [one or other for one, other in zip(given, inferred, strict=True)]
    for part, language in zip(("encoder", "decoder"), languages, strict=True):
        if language is None:
            continue
        file = Path(data.split(":")[0]) / f"dict.{language}.txt"
        if not file.is_file():
            raise LskdError(f"{file} does not exist; the teacher {path} translates with such a dictionary")
        here = Dictionary.load(str(file))
        weight = state["model"].get(f"{part}.embed_tokens.weight")
        if weight is not None and len(weight) != len(here):
            raise CheckpointError(
                f"checkpoint {path} has another dictionary: {len(weight)} entries in its {part}, {file} has "
                f"{len(here)}; give a teacher that was trained on this data-bin"
            )
        own = Path((own_data or "").split(":")[0]) / f"dict.{language}.txt"
        if own_data and own.is_file() and Dictionary.load(str(own)).symbols != here.symbols:
            raise CheckpointError(
                f"checkpoint {path} has another dictionary: {own} and {file} differ; give a teacher that was "
                "trained on this data-bin"
            )


def _bleu_of(state: dict[str, Any]) -> float | None:
    if _get(_get(state["cfg"], "checkpoint"), "best_checkpoint_metric") != "bleu":
        return None
    value = state.get("extra_state", {}).get("val_loss")
    return None if value is None else float(value)


def _get(settings: Any, name: str) -> Any:
    return getattr(settings, name, None)


@contextmanager
def _same_random_numbers_after() -> Iterator[None]:
    """Building a model draws numbers; a run that is continued must go on with those of an unbroken one."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        yield
    np.random.set_state(numpy_state)


def _one_line(error: BaseException, most: int = 120) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."
