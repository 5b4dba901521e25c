"""What a trained model makes of a subset: translations, and how sure it is of the references' tokens."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq.data import encoders

from fairseq_kd.passes import Pass, windows
from fairseq_kd.teacher import Teacher
from lskd.analysis.calibration import confidence_and_correct
from lskd.base.files import parse_json
from lskd.base.tensors import require_finite

_UNKNOWN = {"reference": "UNKNOWNTOKENINREF", "hypothesis": "UNKNOWNTOKENINHYP"}


def translate(checkpoint: str | Path, data: str | Path, subset: str = "test") -> list[dict[str, Any]]:
    """Translate a subset with the search, subwords and detokeniser of the checkpoint's `eval_bleu` settings.

    As in fairseq's validation BLEU an unknown word never matches one of the other side.

    Returns:
        All sentences of the subset, in its order: ``id``, the place in the data-bin; ``source``, detokenised;
        ``reference``, detokenised as validation BLEU reads it; ``hypothesis``, the same of what the model
        says, empty for a sentence that it cannot read; of both, with ``_tokens`` behind the name, the
        tokens of the corpus, separated by spaces and without subwords; and by teacher forcing, for each
        target token (a subword, or the end of the sentence), ``confidence``, the largest probability, and
        ``correct``, 1 where it is that token's, else 0; empty for a sentence that it cannot read.

    Raises:
        LskdError: for a checkpoint or data-bin that cannot be used, and logits that are not finite.
    """
    teacher = Teacher([checkpoint], str(data), None, None)
    settings, task = teacher.settings, teacher.task
    max_tokens = settings.dataset.max_tokens_valid or settings.dataset.max_tokens or 4096
    asked = Pass(teacher, subset, max_tokens, cpu=settings.common.cpu, teaches=False)
    generator = task.build_generator(teacher.models, Namespace(**_json(task.cfg.eval_bleu_args)))
    own = _detokeniser(task.cfg, None)
    of_source = _detokeniser(task.cfg, task.cfg.source_lang)
    nothing = torch.tensor([task.target_dictionary.eos()])

    def words(tokens: Any, dictionary: Any, side: str) -> str:
        unknown = _UNKNOWN.get(side)
        return str(dictionary.string(tokens.int(), task.cfg.eval_bleu_remove_bpe, unk_string=unknown))

    found = []
    for window in windows(asked.pairs, bar=False):
        said, sure = asked.translated(window, generator), _calibration(asked, window)
        for index in window:
            source = words(asked.pairs.src[index], task.source_dictionary, "source")
            reference = words(asked.pairs.tgt[index], task.target_dictionary, "reference")
            hypothesis = words(said.get(index, nothing), task.target_dictionary, "hypothesis")
            texts = {"source": of_source(source), "reference": own(reference), "hypothesis": own(hypothesis)}
            tokens = {"reference_tokens": reference, "hypothesis_tokens": hypothesis}
            confidence, correct = sure.get(index, ([], []))
            found.append({"id": index, **texts, **tokens, "confidence": confidence, "correct": correct})
    return found


def _calibration(asked: Pass, window: range) -> dict[int, tuple[list[float], list[int]]]:
    """Return confidence, and whether it is right, for each target token of a sentence, by its number."""
    pad, found = asked.teacher.task.target_dictionary.pad(), {}
    for batch in asked.batches(window):
        with torch.inference_mode():
            logits = asked.teacher.logits(batch["net_input"])
        for index, own, target in zip(batch["id"].tolist(), logits, batch["target"], strict=True):
            counts = target.ne(pad)
            own = own[counts].cpu()
            require_finite(f"the logits of sentence {index}", own)
            confidence, correct = confidence_and_correct(own, target[counts].cpu())
            found[index] = confidence.tolist(), correct.int().tolist()
    return found


def _detokeniser(cfg: Any, language: str | None) -> Callable[[str], str]:
    """Return the detokeniser of validation BLEU; for another side of the text with that side's language."""
    arguments = _json(cfg.eval_bleu_detok_args)
    if language is not None and cfg.eval_bleu_detok == "moses":
        arguments["target_lang"] = language
    tokenizer = encoders.build_tokenizer(Namespace(tokenizer=cfg.eval_bleu_detok, **arguments))
    return (lambda text: str(tokenizer.decode(text))) if tokenizer else (lambda text: text)


def _json(text: str | None) -> dict[str, Any]:
    content: dict[str, Any] = parse_json(text or "{}")  # an object: it was checked with the checkpoint
    return content
