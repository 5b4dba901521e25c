"""The online teacher: one or several frozen fairseq models, outside of the student."""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from torch import Tensor, nn

from fairseq_kd.safe_loading import UNFIT, check_settings, read_checkpoint, setting
from fairseq_kd.watched_trainer import STATE, dictionary_checksums
from lskd import CheckpointError, LskdError, ensemble_logits
from lskd.checkpoints import file_checksum
from lskd.errors import one_line

_SENSE_SENTENCES = 16
_SLACK = 0.5  # nats a token by which so few sentences may be harder than a validation set
_NOTHING = "it has no checksums of them, and its own data-bin is not there"

logger = logging.getLogger(__name__)


class Teacher:
    """Frozen models in evaluation mode. No ``nn.Module``: nothing can take it for part of the student.

    Attributes:
        paths: checkpoint files.
        checksum: of the files, joined by ``:``.
        architecture: names of the models' architectures, joined by ``:``.
        longest: the source and the target, in tokens, that all of them can read; learnt positions end there.
        task: the first model's task, with the dictionaries of ``data``.
        settings: the first checkpoint's configuration.
        bleu: the validation BLEU that the first checkpoint was chosen by; None where it was another metric.
        recorded: nats a token in validation, as each checkpoint records it; None where it does not.
        checked: how each checkpoint's dictionaries were compared with those of ``data``; None: not at all.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        data: str,
        source: str | None,
        target: str | None,
        task: Any = None,
        check: Callable[[Path, Any], None] = lambda path, settings: None,
    ) -> None:
        """Load the models with the dictionaries of ``data``, or for the task of a multilingual student.

        That task's ``check`` sees the file and its task's settings first.
        """
        self.paths = [best_checkpoint(path) for path in paths]
        self.checksum = ":".join(file_checksum(path) for path in self.paths)
        self.models: list[nn.Module] = []
        self.task: Any = None
        self.recorded: list[float | None] = []
        self.checked: list[str | None] = []
        names = []
        # Building a model draws numbers; a run that is continued must go on with those of an unbroken one.
        with torch.random.fork_rng(), data_utils.numpy_seed(0):
            for path in self.paths:
                state, checked = read_checkpoint(path), None
                # A task of its own: building a model with the student's would replace the student's sequence
                # generator, and the teacher's BLEU would be reported as the student's.
                if task is None:
                    checked = _make_fit(path, state, data, source, target)
                else:  # a multilingual student's builds a network and keeps nothing of it
                    check(path, setting(state["cfg"], "task"))
                    state["task_state"] = {}
                models, _, own_task = checkpoint_utils.load_model_ensemble_and_task(
                    [str(path)], task=task, state=state
                )
                self.models.append(_frozen(models[0], path))
                self.checked.append(_check_record(path, state, own_task) or checked)
                try:
                    recorded, bleu = _validated(state)
                except UNFIT as error:
                    raise CheckpointError(
                        f"checkpoint {path} has a training state that fairseq does not write "
                        f"({one_line(error)}); give one that it wrote"
                    ) from None
                self.recorded.append(recorded)
                names.append(str(setting(state["cfg"].model, "_name") or setting(state["cfg"].model, "arch")))
                if self.task is None:
                    self.task, self.settings, self.bleu = own_task, state["cfg"], bleu
        self.architecture = ":".join(names)
        sides = [[model.encoder for model in self.models], [model.decoder for model in self.models]]
        self.longest = tuple(min(map(_last_position, parts)) for parts in sides)

    def to(self, like: Tensor) -> None:
        """Move the models to the device and precision of ``like``, a weight of the student."""
        for model in self.models:
            first = next(model.parameters())
            if first.device != like.device or first.dtype != like.dtype:
                model.to(device=like.device, dtype=like.dtype)

    @torch.inference_mode()
    def logits(self, net_input: dict[str, Any]) -> Tensor:
        """Return logits ``(batch, target length, vocabulary)`` for the target as it is (teacher forcing)."""
        return ensemble_logits([model(**net_input)[0] for model in self.models])

    def check_lengths(self, pairs: Any, longest: tuple[int, int] | None) -> None:
        """Refuse sentences that are trained on and that not all models can read.

        Args:
            longest: the source and the target that the student trains on; None: of any length.

        Raises:
            LskdError: with the flags that leave them out.
        """
        trained, _ = pairs.filter_indices_by_size(np.arange(len(pairs)), longest)
        _, unread = pairs.filter_indices_by_size(trained, self.longest)
        if unread:
            source, target = utils.resolve_max_positions(self.longest, longest)
            raise LskdError(
                f"{len(unread)} training sentences are too long for the teacher "
                f"{':'.join(map(str, self.paths))}; leave them out: --max-source-positions {source} "
                f"--max-target-positions {target}"
            )

    def check_sense(self, pairs: Any) -> None:
        """Refuse a teacher that is at a loss with these sentences, as with another dictionary; log numbers.

        Each teacher is compared with the validation loss that its checkpoint records: it is refused when it
        is nearer to guessing than to that, and without such a record when it does worse than guessing.

        Args:
            pairs: a data set of sentence pairs; those that are too long for a model say nothing.

        Raises:
            LskdError: for a teacher to which the sentences make no sense.
        """
        read, _ = pairs.filter_indices_by_size(np.arange(len(pairs)), self.longest)
        if not len(read):
            return
        batch = pairs.collater([pairs[index] for index in read[:_SENSE_SENTENCES]])
        target = batch["target"]
        mask = target.ne(self.task.target_dictionary.pad())
        chance = math.log(len(self.task.target_dictionary))
        for path, model, recorded, checked in zip(
            self.paths, self.models, self.recorded, self.checked, strict=True
        ):
            with torch.inference_mode():
                logits = model(**batch["net_input"])[0][mask].float()
            nll = float(nn.functional.cross_entropy(logits, target[mask]))
            found, limit = f"{nll:.2f} nats a token on this data, guessing has {chance:.2f}", chance + 1
            if recorded is not None:
                found += f", its checkpoint records {recorded:.2f}"
                limit = max((recorded + chance) / 2, recorded + _SLACK) if recorded < chance else limit
            if not nll < limit:
                raise LskdError(
                    f"teacher {path} makes no sense of this data ({found}): it has other dictionaries or "
                    "languages, or learnt nothing; give a teacher that was trained on this data-bin"
                )
            logger.log(
                logging.INFO if checked else logging.WARNING,
                f"teacher {path}: {found}; {checked or 'its dictionaries cannot be compared: ' + _NOTHING}",
            )


def split_paths(text: str) -> list[str]:
    """Split `A:B` into its files; a colon within the name of one that exists does not split.

    Raises:
        LskdError: for an empty name.
    """
    colons = [place for place, letter in enumerate(text) if letter == ":"]
    for end in (len(text), *reversed(colons)):
        if Path(text[:end]).exists() and text[:end]:
            return [text[:end], *(split_paths(text[end + 1 :]) if end < len(text) else [])]
    paths = text.split(":")
    if not all(paths):
        raise LskdError(f"the teacher is '{text}'; give a file, or several as A:B")
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


def _make_fit(
    path: Path, state: dict[str, Any], data: str, source: str | None, target: str | None
) -> str | None:
    """Make a checkpoint's settings those of this data-bin; say how the dictionaries were compared, if so."""
    overrides: dict[str, Any] = {"data": data}
    overrides |= {"source_lang": source} if source else {}
    overrides |= {"target_lang": target} if target else {}
    overrides |= {"eval_bleu": False, "kd_soft_labels": None, "load_alignments": False}
    check_settings(state["cfg"], path)
    own_data = setting(setting(state["cfg"], "task"), "data")
    own_data = own_data if isinstance(own_data, str) else None
    overwrite_args_by_name(state["cfg"], overrides)
    return _check_dictionaries(path, state, data, own_data)


def _last_position(part: Any) -> int:
    """Return how many tokens an encoder or a decoder can read; its own `max_positions` may be fewer."""
    return int(getattr(getattr(part, "embed_positions", None), "max_positions", sys.maxsize))


def _frozen(model: Any, path: Path) -> Any:
    if getattr(model.decoder, "adaptive_softmax", None) is not None:
        raise CheckpointError(
            f"checkpoint {path} has an adaptive softmax, which gives no logits over the vocabulary; "
            "give a teacher without --adaptive-softmax-cutoff"
        )
    return model.eval().requires_grad_(False)


def _check_record(path: Path, state: dict[str, Any], task: Any) -> str | None:
    """Compare the dictionaries with the checksums in the checkpoint; say so, None where there are none."""
    own = _record(state).get("dictionaries")
    if not (isinstance(own, dict) and own):
        return None
    here = dictionary_checksums(task)
    if different := [side for side, checksum in own.items() if here.get(side) != checksum]:
        raise _other_dictionary(path, f", by the checksum of {' and '.join(different)}")
    return "its dictionaries have the checksums of these"


def _check_dictionaries(path: Path, state: dict[str, Any], data: str, own_data: str | None) -> str | None:
    """Compare entries by number, and by name where the teacher's data-bin is still there; say what was done.

    Otherwise it would be a page about shapes in `load_state_dict`, or nothing at all.
    """
    compared = 0
    task = setting(state["cfg"], "task")
    inferred = data_utils.infer_language_pair(data.split(":")[0])
    given = setting(task, "source_lang"), setting(task, "target_lang")
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
            counts = f"{len(weight)} entries in its {part}, {file} has {len(here)}"
            raise _other_dictionary(path, f": {counts}")
        own = Path((own_data or "").split(":")[0]) / f"dict.{language}.txt"
        if own_data and own.is_file():
            compared += 1
            if Dictionary.load(str(own)).symbols != here.symbols:
                raise _other_dictionary(path, f": {own} and {file} differ")
    return f"its dictionaries are those of its own data-bin {own_data}" if compared == 2 else None


def _other_dictionary(path: Path, how: str) -> CheckpointError:
    fix = "give a teacher that was trained on this data-bin"
    return CheckpointError(f"checkpoint {path} has another dictionary{how}; {fix}")


def _record(state: dict[str, Any]) -> dict[str, Any]:
    """Return what the plugin stored in a checkpoint."""
    extra = state.get("extra_state")
    record = extra.get(STATE) if isinstance(extra, dict) else None
    return record if isinstance(record, dict) else {}


def _validated(state: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return nats a token in validation, by the plugin's record, the metric or fairseq's meter; and BLEU."""
    extra = state.get("extra_state") or {}
    metric = setting(setting(state["cfg"], "checkpoint"), "best_checkpoint_metric")
    best = extra.get("val_loss")
    bleu = float(best) if metric == "bleu" and best is not None else None
    if isinstance(own := _record(state).get("valid_nll"), float):
        return own, bleu
    bits = best if metric in ("loss", "nll_loss") else None
    if bits is None:  # a mean over the validations of the run
        meters = (extra.get("metrics") or {}).get("valid") or ()
        sums = [meter[3] for meter in meters if meter[1] == "nll_loss" and meter[3].get("count")]
        bits = float(sums[0]["sum"]) / float(sums[0]["count"]) if sums else None
    return None if bits is None else float(bits) * math.log(2), bleu
