"""What a translation model left: BLEU from its translations of the test set, perplexity from its curves.

The translations are those of the checkpoint with the best validation BLEU.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError

from lskd.analysis.calibration import calibration_contributions
from lskd.teachers.preflight import compare_with_chance
from lskd_study.base.text import first_problem
from lskd_study.plan.plan import CURVES, JOB, TRANSLATIONS, Run
from lskd_study.plan.records import Job, read_record
from lskd_study.results.results import PerSample, Result, read_curves
from lskd_study.stats import bleu
from lskd_study.trainers.fairseq import Fairseq


@dataclass(frozen=True)
class Sentence:
    """One test sentence; the fields ending in ``_tokens`` are tokenised, with subwords joined.

    ``confidence`` and ``correct`` are of the target tokens; runs made before these were stored have none.
    """

    id: int
    source: str
    reference: str
    hypothesis: str
    reference_tokens: str
    hypothesis_tokens: str
    confidence: list[Annotated[float, Field(ge=0, le=1)]] = field(default_factory=list)
    correct: list[Literal[0, 1]] = field(default_factory=list)


_SENTENCE = TypeAdapter(Sentence)


@dataclass(frozen=True)
class TranslationResult(Result):
    """A translation model's result; ``sentences`` are sorted by id."""

    sentences: list[Sentence]

    @cached_property
    def detokenised(self) -> bleu.Score:
        """BLEU of the detokenised text, tokenised by sacreBLEU: the one that compares across papers."""
        return bleu.score([s.hypothesis for s in self.sentences], [s.reference for s in self.sentences])

    @cached_property
    def tokenised(self) -> bleu.Score:
        """BLEU of the text as the data was tokenised, as ``fairseq-generate`` reports it."""
        references = [s.reference_tokens for s in self.sentences]
        return bleu.score([s.hypothesis_tokens for s in self.sentences], references, tokenised=True)

    @property
    def chosen(self) -> int:
        """The epoch (from 0) of the checkpoint that translated: best validation BLEU, the later of equals."""
        scores = self.curves["val_bleu"]
        return int(np.flatnonzero(scores == np.nanmax(scores))[-1])

    def _value(self, quantity: str) -> float:
        """Return test BLEU, what validation gave at the chosen epoch, or training at the last one."""
        if quantity == "calibration_error":
            return self._calibration_error
        if quantity in ("bleu", "tokenised_bleu"):
            return (self.detokenised if quantity == "bleu" else self.tokenised).value
        return float(self.curves[quantity][self.chosen if quantity.startswith("val_") else -1])

    def _per_sample(self, quantity: str) -> PerSample | None:
        """Return BLEU (of the detokenised text, points) as jackknife pseudo-values, one per test sentence."""
        return self._pseudo_values if quantity == "bleu" else None

    @cached_property
    def _calibration_error(self) -> float:
        """The expected calibration error over the target tokens, in percent; NaN without any."""
        sure = torch.tensor([value for s in self.sentences for value in s.confidence], dtype=torch.float64)
        right = torch.tensor([value for s in self.sentences for value in s.correct])
        return 100 * float(calibration_contributions(sure, right).mean())

    @cached_property
    def _pseudo_values(self) -> PerSample:
        statistics = self.detokenised.statistics
        return PerSample(bleu.pseudo_values(statistics), problem=bleu.too_few_matches(statistics))

    def at_chance(self) -> str:
        """Return its BLEU where its translations fit their own references no better than other ones.

        Each translation is compared with its own reference and with that of another sentence, half of the
        test set away. Of a translation that has nothing to do with its source either is as likely to share
        more words with it: a one-sided sign test at 1 %; equal counts say nothing.
        """
        words = [
            (Counter(s.hypothesis_tokens.split()), Counter(s.reference_tokens.split()))
            for s in self.sentences
        ]
        half = len(words) // 2
        others = [reference for _, reference in (*words[half:], *words[:half])]
        gains = [
            (hypothesis & own).total() - (hypothesis & other).total()
            for (hypothesis, own), other in zip(words, others, strict=True)
        ]
        better, unequal = sum(gain > 0 for gain in gains), sum(gain != 0 for gain in gains)
        if compare_with_chance(len(gains), len(gains), 0.5) == "too few":
            return ""
        if compare_with_chance(better, unequal, 0.5) == "above":
            return ""
        return (
            f"test BLEU {self.detokenised.value:.2f}; of {len(gains):,} translations {better:,} share more "
            f"words with their own reference than with another sentence’s, {unequal - better:,} fewer"
        )

    def same_samples(self, other: Result) -> bool:
        """Whether both translated the same sentences and are compared with the same references."""
        if not isinstance(other, TranslationResult):
            return False
        mine, theirs = (
            [(s.id, s.source, s.reference, s.reference_tokens) for s in result.sentences]
            for result in (self, other)
        )
        return mine == theirs


def read_translation_result(folder: Path, run: Run) -> TranslationResult:
    """Read one run's folder.

    Raises:
        Exception: of many classes, when a file is missing or damaged; `results.read_results` makes it one.
    """
    job = read_record(folder / JOB, Job)
    curves = read_curves(folder / CURVES)
    lost = [name for name in Fairseq.curve_columns if name not in curves]
    if lost:
        raise ValueError(f"{CURVES} has no column {', '.join(lost)}")
    if np.isnan(curves["val_bleu"]).all():
        raise ValueError(f"{CURVES} has no validation BLEU")
    sentences = _read_sentences(folder / TRANSLATIONS)
    return TranslationResult(run, job, curves, [str(sentence.id) for sentence in sentences], sentences)


def _read_sentences(path: Path) -> list[Sentence]:
    sentences = []
    # Not splitlines: a sentence may contain a character that Unicode calls a line break.
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            sentence = _SENTENCE.validate_json(line, strict=True)
        except ValidationError as error:
            raise ValueError(f"{path.name}, line {number}: {first_problem(error)}") from error
        if len(sentence.confidence) != len(sentence.correct):
            raise ValueError(f"{path.name}, line {number}: confidence and correct are of different numbers")
        sentences.append(sentence)
    sentences.sort(key=lambda sentence: sentence.id)
    ids = [sentence.id for sentence in sentences]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path.name} has two sentences of one id")
    # A sentence that the model cannot read has neither.
    if len({bool(sentence.confidence) for sentence in sentences if sentence.hypothesis_tokens}) > 1:
        raise ValueError(f"{path.name} has confidence for some sentences alone")
    return sentences
