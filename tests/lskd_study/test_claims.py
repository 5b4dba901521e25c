import json
import math

import numpy as np
import pytest

from lskd_study import claims
from lskd_study.claims import CLAIMS, judge, settings, verdict
from lskd_study.plan import CURVES, JOB
from lskd_study.results import read_results
from lskd_study.statistics import Interval, crossed_interval

pytestmark = pytest.mark.unit


def interval(low: float, high: float, p: float) -> Interval:
    return Interval((low + high) / 2, low, high, 1.0, p, 3, 100, "m")


@pytest.mark.parametrize(
    ("low", "high", "p", "up", "down"),
    [
        (0.1, 0.3, 0.01, "supported", "contradicted"),
        (-0.3, -0.1, 0.01, "contradicted", "supported"),
        (-0.1, 0.3, 0.30, "cannot tell", "cannot tell"),
        (0.1, 0.3, 0.06, "cannot tell", "cannot tell"),  # Holm took it back
        (math.nan, math.nan, math.nan, "cannot tell", "cannot tell"),
    ],
)
def test_a_verdict_follows_the_side_of_the_interval(low, high, p, up, down):
    by_direction = {claim.direction: claim for claim in CLAIMS}
    found = interval(low, high, p)
    assert verdict(by_direction[1], found, p) == up
    assert verdict(by_direction[-1], found, p) == down
    assert verdict(by_direction[0], found, p) is None
    assert verdict(by_direction[1], None, math.nan) == "cannot tell"


def test_a_real_effect_is_found_and_pooled_over_students(fake_study):
    plan = fake_study(effect=2.0)
    results = read_results(plan)
    found = {finding.claim.id: finding for finding in judge(results)}
    assert {name: finding.verdict for name, finding in found.items()} == {
        "better-student": "supported",
        "lower-instability": "supported",
        "larger-loss": "supported",
        "loss-part-kl": None,
        "loss-part-entropy": None,
    }
    arms = {}
    for alpha in (0.0, 0.1):
        chosen = [
            r for r in results.finished.values() if r.run.role == "student" and r.run.smoothing == alpha
        ]
        arms[alpha] = np.mean([result.top1 for result in chosen])
    assert found["better-student"].interval.estimate == pytest.approx(arms[0.1] - arms[0.0])
    teachers = [r for r in results.finished.values() if r.run.role == "teacher"]
    drop = np.mean([r.instability if r.run.smoothing else -r.instability for r in teachers]) * 2
    assert found["lower-instability"].interval.estimate == pytest.approx(drop, abs=1e-6)
    parts = [found[f"loss-part-{name}"].interval.estimate for name in ("kl", "entropy")]
    assert found["larger-loss"].interval.estimate == pytest.approx(sum(parts))


def test_a_harmful_effect_contradicts(fake_study):
    assert judge(read_results(fake_study(effect=-2.0)))[0].verdict == "contradicted"


def test_no_effect_cannot_tell(fake_study):
    assert judge(read_results(fake_study(effect=0.0)))[0].verdict == "cannot tell"


def test_verdicts_of_no_difference_are_rare():
    """False alarms, seeds and samples drawn anew: at most 5 %, plus what 400 tables leave open (2 points)."""
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(400):
        shared = 3 + 2 * rng.standard_normal((1, 300))
        arms = [
            rng.random((3, 300)) < 1 / (1 + np.exp(-(shared + 0.2 * rng.standard_normal((3, 1)))))
            for _ in range(2)
        ]
        found = crossed_interval(arms[1].astype(float) - arms[0].astype(float), bounded=True)
        alarms += verdict(CLAIMS[0], found, found.p_value) != "cannot tell"
    assert alarms / 400 <= 0.07


def test_holm_takes_a_verdict_back_and_the_finding_says_so():
    draft = (CLAIMS[0], None, interval(0.01, 0.3, 0.04), "")
    (alone,) = claims._decide([draft])
    assert alone.verdict == "supported"
    assert not alone.changed_by_holm
    three = claims._decide([draft, (CLAIMS[1], None, interval(-1, 1, 0.9), ""), (CLAIMS[2], None, None, "")])
    assert three[0].verdict == "cannot tell"
    assert three[0].changed_by_holm
    assert three[0].adjusted_p == pytest.approx(0.08)


def test_a_missing_run_takes_its_seed_out_of_every_pair(fake_study):
    plan = fake_study(effect=2.0)
    lost = next(run for run in plan.runs if run.role == "student" and run.seed == 1)
    (plan.folder(lost) / JOB).unlink()
    found = judge(read_results(plan))
    assert found[0].interval.seeds == 2
    assert "seed 1" in found[0].note
    assert found[1].interval.seeds == 3  # the teachers are all there


def test_without_any_whole_pair_there_is_nothing_to_tell(fake_study):
    plan = fake_study()
    for run in plan.runs:
        if run.role == "student" and run.smoothing:
            (plan.folder(run) / JOB).unlink()
    found = judge(read_results(plan))[0]
    assert (found.interval, found.verdict) == (None, "cannot tell")
    assert "no seed" in found.note


def test_one_seed_gives_the_samples_interval_but_none_for_losses(fake_study):
    found = judge(read_results(fake_study(effect=2.0, seeds=[0])))
    assert "seed" in found[0].interval.note
    assert found[0].interval.known
    assert found[0].interval.p_value < 0.001
    assert not found[2].interval.known


def test_one_seed_allows_no_verdict_and_is_no_test(fake_study):
    found = judge(read_results(fake_study(effect=2.0, seeds=[0])))
    claimed = [finding for finding in found if finding.claim.direction]
    assert {finding.verdict for finding in claimed} == {"cannot tell"}
    assert all(math.isnan(finding.adjusted_p) for finding in claimed)
    assert not any(finding.changed_by_holm for finding in found)


def test_a_quantity_that_was_not_logged_is_no_crash(fake_study):
    plan = fake_study()
    path = plan.folder(plan.runs[-1]) / CURVES
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([lines[0], *(line.split(",")[0] + "," * lines[0].count(",") for line in lines[1:])])
    )
    found = judge(read_results(plan))[2]
    assert found.interval is None
    assert "finite" in found.note


def test_every_temperature_and_smoothing_value_is_a_setting_of_its_own(fake_study):
    plan = fake_study(smoothing=[0.0, 0.1, 0.2], temperatures=[1.0, 4.0])
    results = read_results(plan)
    found = [(s.smoothing, s.temperature) for s in settings(results)]
    assert found == [(0.1, 1.0), (0.2, 1.0), (0.1, 4.0), (0.2, 4.0)]
    judged = judge(results)
    assert sum(finding.claim.role == "teacher" for finding in judged) == 2
    assert sum(finding.claim.id == "better-student" for finding in judged) == 4
    assert json.dumps([finding.setting.describe() for finding in judged])
