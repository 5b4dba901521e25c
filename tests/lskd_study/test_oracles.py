"""Our statistics against what others publish: iMRMC's own example, statsmodels, scipy's bootstrap."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lskd.analysis.selective import aurc_pseudo_values
from lskd_study.stats.bootstrap import paired_differences
from lskd_study.stats.intervals import crossed_interval, crossed_moments, holm

pytestmark = pytest.mark.unit


def test_variance_of_a_crossed_mean_is_that_of_imrmcs_published_example():
    """iMRMC (R, CC0), tests/testthat/test_uStat11.Rdata: scores of 5 readers, 40 cases, tests A and B.

    Mean and variance are its U-statistics' (Gallas et al., 2009), which take no analysis of variance.
    """
    with Path(__file__).with_name("imrmc.csv").open(newline="") as file:
        rows = [[float(cell) for cell in line] for line in list(csv.reader(file))[1:]]
    a, b = np.array(rows).T[2:].reshape(2, 5, 40)
    published = {
        "A": (a, 0.9135696698, 0.04841548058),
        "B": (b, 0.8659156494, 0.02890617024),
        "A less B": (a - b, 0.04765402040, 0.03198493069),
    }
    for name, (table, mean, variance) in published.items():
        found = crossed_moments(table)
        assert found.mean == pytest.approx(mean, rel=1e-7), name
        assert found.seed_variance + found.sample_variance == pytest.approx(variance, rel=1e-7), name


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_statsmodels(seed):
    rng = np.random.default_rng(seed)
    p = rng.random(rng.integers(1, 30)) ** 3
    p[rng.random(len(p)) < 0.2] = p[0]  # ties
    rejected, adjusted, *_ = multipletests(p, alpha=0.05, method="holm")
    np.testing.assert_allclose(holm(p), adjusted)
    np.testing.assert_array_equal(holm(p) <= 0.05, rejected)


def bca(statistic, *samples):
    """Ends of scipy's paired BCa interval."""
    found = stats.bootstrap(
        samples, statistic, paired=True, vectorized=False, method="BCa", n_resamples=4000, rng=5
    )
    return tuple(found.confidence_interval)


def agree(interval, ends):
    """Ends differ by less than a tenth of the width: draws err by 3 % of it, skewness shifts the rest."""
    width = ends[1] - ends[0]
    assert (interval.low, interval.high) == pytest.approx(ends, abs=0.1 * width)


def arms(samples=400):
    """Right and wrong answers of two arms, and how confident each is."""
    rng = np.random.default_rng(3)
    easy = 1 + 1.5 * rng.standard_normal(samples)
    scores = [easy + shift + 0.7 * rng.standard_normal(samples) for shift in (0.0, 0.3)]
    right = [(score + rng.logistic(size=samples) > 0).astype(float) for score in scores]
    return scores, right


def test_one_seeds_interval_is_scipys_paired_bootstrap():
    _, (one, two) = arms()
    ends = bca(lambda x, y: np.mean(y - x), one, two)
    agree(crossed_interval((two - one)[None]), ends)
    found = paired_differences([one[:, None], two[:, None]], 4000, 0, [True])[0, 1][0]
    agree(found, ends)


def test_interval_of_a_selective_risk_is_scipys_paired_bootstrap_of_the_area_itself():
    scores, right = arms()

    def aurc(sure, correct):
        return aurc_pseudo_values(sure, correct).mean()

    ends = bca(lambda s, r, t, q: aurc(t, q) - aurc(s, r), scores[0], right[0], scores[1], right[1])
    parts = [aurc_pseudo_values(score, correct) for score, correct in zip(scores, right, strict=True)]
    agree(crossed_interval((parts[1] - parts[0])[None]), ends)
