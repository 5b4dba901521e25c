"""The variance between seeds pooled over a study's settings: its prior, its coverage, and the page."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import optimize, special, stats

from lskd_study.claims import judge
from lskd_study.pages.study import write_report
from lskd_study.results.read import read_results
from lskd_study.stats import moderated as moderation
from lskd_study.stats.intervals import Part, crossed_interval
from lskd_study.stats.moderated import WEIGHT, moderated, prior
from lskd_study.stats.power import Variances
from lskd_study.stats.sequential import levels

pytestmark = pytest.mark.unit


def drawn(d0, s0, df, size):
    """Variances estimated with ``df`` degrees of freedom, whose truths are ``d0 s0 / chi^2(d0)``."""
    rng = np.random.default_rng(0)
    return d0 * s0 / rng.chisquare(d0, size) * rng.chisquare(df, size) / df


@pytest.mark.parametrize(("d0", "s0", "df"), [(8.0, 0.04, 4), (3.0, 2.0, 2), (20.0, 1.0, 9)])
def test_the_prior_is_that_of_the_likelihood(d0, s0, df):
    """The moments against the maximum of the scaled F distribution that the variances have."""
    variances = drawn(d0, s0, df, 4000)
    fitted = optimize.minimize(
        lambda at: -stats.f.logpdf(variances, df, np.exp(at[0]), scale=np.exp(at[1])).sum(),
        [np.log(5), 0.0],
        method="Nelder-Mead",
    )
    found = prior(variances, df)
    assert found == pytest.approx(tuple(np.exp(fitted.x)), rel=0.2)
    assert found == pytest.approx((d0, s0), rel=0.2)
    # Smyth's equations, in scipy's words.
    logs = np.log(variances) - special.digamma(df / 2) + np.log(df / 2)
    assert special.polygamma(1, found[0] / 2) == pytest.approx(
        np.var(logs, ddof=1) - special.polygamma(1, df / 2)
    )
    assert np.log(found[1]) == pytest.approx(
        logs.mean() + special.digamma(found[0] / 2) - np.log(found[0] / 2), abs=1e-9
    )


def test_variances_that_are_all_alike_have_a_prior_that_is_certain():
    assert prior([0.3, 0.3, 0.3], 4) == (np.inf, pytest.approx(0.3))


@pytest.mark.parametrize(("spread", "expected"), [(7e-7, np.inf), (2.5e-6, 2 / 2.5e-6)])
def test_beyond_a_million_degrees_of_freedom_a_prior_is_certain(spread, expected):
    """The logarithms vary by so much more than by their estimates; trigamma(d0 / 2) is close to 2 / d0."""
    logs = np.sqrt(special.polygamma(1, 4 / 2) + spread) * np.array([-1.0, 0.0, 1.0])
    assert prior(np.exp(logs), 4)[0] == pytest.approx(expected, rel=1e-3)
    stored = np.exp(logs).astype(np.float32)
    assert prior(stored, 4) == prior(stored.astype(np.float64), 4)


def test_of_fewer_seeds_than_the_fewest_any_two_settings_share_everything():
    rng = np.random.default_rng(6)
    fewest = moderation.FEWEST
    assert moderated(rng.standard_normal((8, fewest - 1)))[0].df == pytest.approx(fewest - 2)
    assert moderated(rng.standard_normal((8, fewest)))[0].df > fewest - 0.9


def test_a_setting_keeps_most_of_its_own_and_pooling_counts_for_what_is_there():
    rng = np.random.default_rng(3)
    apart = rng.standard_normal((8, 5))
    own = apart.var(-1, ddof=1)
    d0, common = prior(own, 4)
    d0 = min(d0, WEIGHT * 4)
    expected = (d0 * common + 4 * own) / (d0 + 4) / 5
    assert [part.variance for part in moderated(apart)] == pytest.approx(expected)
    assert [part.df for part in moderated(apart)] == pytest.approx(8 * [4 + d0])
    stored = apart.astype(np.float32)
    assert moderated(stored) == moderated(stored.astype(np.float64))
    # What is the same in all settings is known no better for it.
    same = rng.standard_normal(5)
    together = moderated([same, 2 * same + 1, -same])
    assert [part.df for part in together] == pytest.approx([4, 4, 4])


def test_an_interval_with_pooled_variance_keeps_all_but_its_width():
    rng = np.random.default_rng(5)
    d = rng.standard_normal((3, 1)) + rng.standard_normal((1, 30)) + rng.standard_normal((3, 30))
    own = crossed_interval(d).of_students(rng.standard_normal((3, 2)))
    found = own.pooled(Part(0.2, 7), 4)
    half = (stats.t.isf(0.025, 7) ** 2 * 0.2 + stats.t.isf(0.025, 29) ** 2 * own.parts[1].variance) ** 0.5
    assert own.parts[1].variance > 0
    assert (found.low, found.high) == pytest.approx((own.estimate - half, own.estimate + half))
    changed = ("low", "high", "p_value", "method", "parts")
    assert found == dataclasses.replace(own, **{name: getattr(found, name) for name in changed})
    assert found.parts == (Part(0.2, 7), own.parts[1])
    assert found.method == f"{own.method}; seed variance pooled over 4 settings (moderated t)"


# Whether it may be trusted

MIXES = {
    "alike": lambda count, rng: np.ones(count),
    "half x1.5": lambda count, rng: np.where(np.arange(count) < count // 2, 1.5, 1.0),
    "one x2": lambda count, rng: np.where(np.arange(count) < 1, 2.0, 1.0),
    "drawn": lambda count, rng: np.sqrt(6 / rng.chisquare(6, count)),  # anew in each study
}


def covered(mix, settings, seeds, shared, trials=500):
    """How often each setting's interval contains 0, ``(trials, settings)``; its width, and the plain one's.

    The mean is independent of the width, and normal, so for each width the chance is known.
    """
    rng = np.random.default_rng([11, settings, seeds])
    inside, widths, plain = [], [], []
    for _ in range(trials):
        own, deviations = rng.standard_normal((settings, seeds)), MIXES[mix](settings, rng)
        common = np.sqrt(shared) * rng.standard_normal(seeds)
        d = deviations[:, None] * (common + np.sqrt(1 - shared) * own)
        half = [stats.t.isf(0.025, part.df) * part.variance**0.5 for part in moderated(d)]
        inside.append(2 * special.ndtr(np.array(half) * seeds**0.5 / deviations) - 1)
        widths.append(half)
        plain.append(stats.t.isf(0.025, seeds - 1) * d.std(1, ddof=1) / seeds**0.5)
    return np.array(inside), np.sqrt(np.mean(np.square(widths)) / np.mean(np.square(plain)))


@pytest.mark.parametrize("mix", MIXES)
def test_coverage_is_kept_and_what_the_width_gains(mix):
    """`pytest -s` prints the table of docs/study.md. ``shared``: of the variance, by all settings."""
    for seeds in (3, 5, 10):
        for settings, shared in ((3, 0.0), (4, 0.5), (6, 0.9)):
            inside, width = covered(mix, settings, seeds, shared)
            average, worst = inside.mean(), inside.mean(0).min()
            print(
                f"{mix:9} {seeds:2} seeds, {settings} settings, {shared:.0%} shared: "
                f"{average:.3f} (worst {worst:.3f}), width {width:.2f}"
            )
            assert 0.93 <= average <= 0.96
            assert worst >= 0.91  # twice the deviation of all others costs up to 4 of 100
            assert width < 1.01
            if seeds == 3 and shared < 0.9:
                assert width < 0.9


def test_looks_keep_their_error_rate_with_it():
    """Four settings, looks after 5, 8, 12 and 20 seeds: how often a true zero is ever rejected."""
    numbers, rng, found = (5, 8, 12, 20), np.random.default_rng(2), 0
    of_look = levels(numbers)
    for _ in range(1200):
        d = np.sqrt(0.5) * (rng.standard_normal(20) + rng.standard_normal((4, 20)))
        for number, level in zip(numbers, of_look, strict=True):
            first = moderated(d[:, :number])[0]
            if abs(d[0, :number].mean()) > stats.t.isf(level / 2, first.df) * first.variance**0.5:
                found += 1
                break
    assert found / 1200 < 0.065  # 0.05 with a standard error of 0.006


def test_the_width_promised_is_the_width_that_comes():
    rng = np.random.default_rng(4)
    promised, came = [], []
    for _ in range(400):
        promised.append(Variances.of(4, [moderated(rng.standard_normal((4, 4)))[0]]).half_width(8))
        later = moderated(rng.standard_normal((4, 8)))[0]
        came.append(stats.t.isf(0.025, later.df) * later.variance**0.5)
    assert np.sqrt(np.mean(np.square(promised))) == pytest.approx(np.sqrt(np.mean(np.square(came))), rel=0.1)
    at_hand = Variances.of(4, [Part(0.2, 5.5)])
    assert at_hand.half_width(4) == pytest.approx(stats.t.isf(0.025, 5.5) * 0.2**0.5)


# In a study


def test_it_is_in_the_verdicts_and_said_on_the_page(fake_study):
    plan = fake_study(temperatures=[1.0, 2.0, 4.0], per_class=15, effect=0.3)
    plain = judge(read_results(plan))
    plan = dataclasses.replace(plan, pool_seed_variance=True)
    found = judge(read_results(plan))
    mine = [one for one in found if one.claim.id == "better-student"]
    before = [one for one in plain if one.claim.id == "better-student"]
    parts = moderated([one.interval.by_seed for one in before])
    assert [one.interval.parts[0] for one in mine] == parts
    for one, other in zip(mine, before, strict=True):
        assert one.interval.method.endswith("seed variance pooled over 3 settings (moderated t)")
        assert one.interval.parts[1] == other.interval.parts[1]
        assert (one.p_value < 0.05) == (one.interval.low > 0 or one.interval.high < 0)
    # A claim of one setting is what it was.
    of_teachers = next(one for one in found if one.claim.id == "better-teacher")
    assert "pooled" not in of_teachers.interval.method
    plan.write()
    write_report(plan)
    record = json.loads((plan.root / "verdicts.json").read_text())
    assert record["pool_seed_variance"] is True
    assert record["findings"][0]["parts"][0] == pytest.approx(list(parts[0]))
    page = (plan.root / "index.html").read_text()
    assert "pooled over the settings that a claim is tested in" in page
    drawn_rows = (plan.root / "figures" / "difference.csv").read_text().splitlines()
    assert drawn_rows[-1].split(",")[2] == f"{mine[0].interval.low:.8g}"


def test_settings_of_other_seeds_are_not_pooled(fake_study):
    """Each setting lacks another seed: as many are left, but not the same."""
    plan = fake_study(seeds=[0, 1, 2, 3], temperatures=[1.0, 2.0, 4.0], per_class=15)
    for run in plan.runs:
        if run.role == "student" and run.seed == {1.0: 1, 2.0: 2, 4.0: 3}[run.temperature]:
            (plan.folder(run) / "job.json").unlink()
    found = judge(read_results(dataclasses.replace(plan, pool_seed_variance=True)))
    mine = [one.interval for one in found if one.claim.id == "better-student"]
    assert [(one.seeds, "pooled" in one.method) for one in mine] == [(3, False)] * 3


def test_seeds_that_agree_in_a_setting_leave_it_out(fake_study):
    found = crossed_interval(np.tile([[0.0, 1.0, 0.0]], (3, 1)))
    assert len(set(found.by_seed)) == 1  # nothing to take a logarithm of


def test_what_cannot_be_is_one_line(scene):
    for changes, has in (({"seeds": [0, 1], "temperatures": [1, 2, 4]}, "2 and 3"), ({}, "1 and 1")):
        scene.write(pool_seed_variance=True, **changes)
        line = scene.refused("study", "study.yaml", "--dry-run")
        assert "pool_seed_variance: it takes 3 seeds and 3 settings (smoothing values, temp" in line
        assert f"the study has {has}; add some, or remove it" in line
    scene.write(pool_seed_variance="yes", temperatures=[1, 2, 4], seeds=[0, 1, 2])
    assert "pool_seed_variance: input should be a valid boolean" in scene.refused("study", "study.yaml")
    plan = scene.plan(pool_seed_variance=True, temperatures=[1, 2, 4], seeds=[0, 1, 2])
    assert "pooled over the settings of a claim (moderated t)" in scene.run(
        "study", "study.yaml", "--dry-run"
    )
    plan.root.mkdir()
    plan.write()
    (plan.root / "verdicts.json").write_text("{}")
    scene.write(temperatures=[1, 2, 4], seeds=[0, 1, 2])
    line = scene.refused("study", "study.yaml", "--dry-run")
    assert "out has a page that was made with pool_seed_variance: true, which may not change" in line
