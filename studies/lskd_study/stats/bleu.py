"""Corpus BLEU as sacreBLEU computes it, and what intervals of its differences need.

BLEU is no mean over sentences but a function of sums over them: ten numbers for each sentence (both lengths,
matched and counted n-grams of 1 to 4 words). The jackknife over sentences turns it into one value per
sentence whose mean is BLEU, so that it goes through the same analysis as accuracy (`statistics`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

from lskd_study.stats.bootstrap import Estimate, of_draws, resampled_means
from lskd_study.stats.intervals import Array

Statistics = NDArray[np.int64]

ORDER = 4
REPLICATES, SEED = 1000, 12345  # sacreBLEU's own defaults
METHOD = f"paired bootstrap over test sentences, percentiles, {REPLICATES} draws, seed {SEED}"
# With matches in fewer sentences than that, BLEU depends on single sentences (and on smoothing, at none).
FEWEST_SENTENCES = 5


@dataclass(frozen=True)
class Score:
    """A corpus BLEU in points, sacreBLEU's signature of how, and the sentences' statistics ``(N, 10)``."""

    value: float
    signature: str
    statistics: Statistics


def score(hypotheses: Sequence[str], references: Sequence[str], tokenised: bool = False) -> Score:
    """Return the corpus BLEU of one hypothesis and one reference for each sentence; sacreBLEU's defaults.

    ``tokenised``: the text is tokenised already.
    """
    scorer: Any = BLEU(tokenize="none", force=True) if tokenised else BLEU()
    whole = scorer.corpus_score(list(hypotheses), [list(references)])
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        own = scorer.corpus_score([hypothesis], [[reference]])
        rows.append([own.sys_len, own.ref_len, *own.counts, *own.totals])
    return Score(float(whole.score), str(scorer.get_signature()), np.array(rows, dtype=np.int64))


def bleu_of_sums(sums: Statistics) -> Array:
    """Return BLEU ``(R,)`` in points of summed statistics ``(R, 10)``; sacreBLEU's formula and smoothing."""
    return np.array(
        [
            BLEU.compute_bleu(
                correct=counts[:ORDER],
                total=counts[ORDER:],
                sys_len=sys_len,
                ref_len=ref_len,
                smooth_method="exp",
            ).score
            for sys_len, ref_len, *counts in sums.tolist()
        ]
    )


def pseudo_values(statistics: Statistics) -> Array:
    """Return one value per sentence ``(N,)`` whose mean is the corpus BLEU in points, for its interval.

    Jackknife: ``N BLEU - (N - 1) BLEU_without_i``, shifted so that the mean is BLEU itself.
    """
    total = statistics.sum(0)
    without = bleu_of_sums(total - statistics)
    return np.asarray(bleu_of_sums(total[None]) + (len(statistics) - 1) * (without.mean() - without))


def too_few_matches(statistics: Statistics) -> str:
    """Return why BLEU gets no interval: too few sentences match n-grams; empty if enough do."""
    sentences = (statistics[:, 2 : 2 + ORDER] > 0).sum(0)
    if sentences.min() >= FEWEST_SENTENCES:
        return ""
    order = int(sentences.argmin()) + 1
    return (
        f"a run matches {order}-grams of the references in {sentences.min()} of {len(statistics)} sentences; "
        f"BLEU needs {FEWEST_SENTENCES} for an interval"
    )


def paired_bootstrap(first: Score, second: Score) -> Estimate:
    """Return what the second run's BLEU is above the first's on the same sentences, in points.

    The sentences are redrawn, the same for both: the interval, and the two-sided p-value, of that.
    """
    value = second.value - first.value
    problem = too_few_matches(first.statistics) or too_few_matches(second.statistics)
    if np.array_equal(first.statistics, second.statistics):
        problem = "no sentence differs between the two runs"
    if problem:
        return Estimate(value, np.nan, np.nan, np.nan, problem)
    # Means are exact to rounding; sums of counts are whole numbers again.
    both = np.concatenate([first.statistics, second.statistics], axis=1).astype(np.float64)
    sums = np.rint(resampled_means(both, REPLICATES, SEED) * len(both)).astype(np.int64)
    half = first.statistics.shape[1]
    return of_draws(value, bleu_of_sums(sums[:, half:]) - bleu_of_sums(sums[:, :half]))
