"""What stands above a study's verdict, because it weakens it or takes it away."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lskd_study.base.text import listed
from lskd_study.claims import claims_of, estimate
from lskd_study.plan.plan import exact
from lskd_study.results.results import AnyResult, BySeed, Results, common_seeds, failures_of, kind_name
from lskd_study.stats.intervals import Array
from lskd_study.stats.sequential import error_rate

LAST = 0.1  # the last epochs are this part of all, one at least
STILL = 0.02  # of what the loss fell in the whole training


@dataclass(frozen=True)
class Notice:
    """A sentence, what it is about (a line each), and what to do."""

    title: str
    items: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        """Return it in one line, with the first of a long list."""
        rest = f" and {len(self.items) - 2} more" if len(self.items) > 2 else ""
        return f"{self.title}{' ' if self.items else ''}{'; '.join(self.items[:2])}{rest}"


def print_notices(results: Results[AnyResult]) -> None:
    """Print what is to be said before the verdicts on stderr, a line each."""
    for notice in notices_of(results):
        print(f"lskd: note: {notice}", file=sys.stderr)


def notices_of(results: Results[AnyResult]) -> Iterator[Notice]:
    """Yield what is to be said before the verdicts: first what takes them away, then what weakens them."""
    if results.failed:
        count, of = len(results.failed), len(results.plan.runs)
        yield Notice(
            f"{count} of {of} runs failed. No number of a failed run counts, and nothing that needs one "
            "gets a verdict.",
            tuple(f"{one.run.id}: {one.reason}" for one in results.failed.values()),
            "To train one again, change what made it diverge in its trainer’s file, or remove its folder, "
            "and give the same command again; students of it follow. Finished runs of other settings are "
            "refused: all arms need the same.",
        )
    if versions := data_versions(results):
        yield Notice(
            f"The data changed within the study: its runs saw {len(versions)} versions of them, so "
            "differences between these runs may come from the data.",
            tuple(f"{sha256[:12]}: {', '.join(runs)}" for sha256, runs in versions.items()),
            "Remove the runs of the older data and give the same command again.",
        )
    plan = results.plan
    looks = sorted({*plan.looked_at, len(plan.seeds)} - {1})  # one seed allows no verdict
    if plan.looked_at and len(looks) > 1:
        yield Notice(
            f"Seeds were added after the page was made: it was looked at after {listed(looks)} seeds, each "
            "time at 5 %. Where nothing is true, a claim by itself is found in "
            f"{100 * error_rate(looks):.0f} % of such studies.",
            advice="`lskd study FILE --until-decided` adds seeds by a rule that keeps the 5 %.",
        )
    if weak := at_chance(results):
        yield Notice(
            f"{len(weak)} run{' is' if len(weak) == 1 else 's are'} no better than chance, which says "
            "nothing about what was compared.",
            tuple(f"{run}: {words}" for run, words in weak.items()),
        )
    if falling := still_falling(results):
        yield Notice(
            "Training losses still fell in the last epochs, so longer training may change the verdicts.",
            tuple(falling),
        )
    if as_good := at_ceiling(results):
        margin = ceiling_margin(results)
        within = f", to the margin of {exact(margin)} points" if margin else ""
        yield Notice(
            f"Students scored no lower than their teachers{within}: where little is left to learn, a better "
            "teacher can hardly show.",
            tuple(f"{kind}: {words}" for kind, words in as_good.items()),
        )
    if results.plan.note:
        yield Notice(results.plan.note)


def data_versions(results: Results[AnyResult]) -> dict[str, list[str]]:
    """Return the runs by the checksum of the data that they saw; nothing where all saw the same."""
    found: dict[str, list[str]] = {}
    for job in results.jobs:
        found.setdefault(job["data"]["sha256"], []).append(job["run"])
    return found if len(found) > 1 else {}


def at_chance(results: Results[AnyResult]) -> dict[str, str]:
    """Return the runs that are no better than guessing, and by what measure."""
    found = {name: result.at_chance() for name, result in results.finished.items()}
    return {name: words for name, words in found.items() if words}


def at_ceiling(results: Results[AnyResult]) -> dict[str, str]:
    """Return the kinds of student that scored no lower than their teachers, to the margin.

    And student minus teacher in points, with its interval over seeds and samples; one seed says nothing.
    """
    quantity, found = claims_of(results.plan)[0].quantity, {}
    for kind, students in results.by_kind.items():
        if len(kind) == 2 or not kind[1]:
            continue
        pair = results.teachers(str(kind[1]), float(kind[2])), students
        seeds = common_seeds(pair)
        if len(seeds) < 2 or failures_of(pair):
            continue
        interval = estimate(quantity, [pair], seeds)
        if interval.known and interval.estimate >= -ceiling_margin(results):
            ends = f"{interval.low:+.2f} to {interval.high:+.2f}"
            numbers = f"{interval.estimate:+.2f} points against their teachers ({ends})"
            found[kind_name(results.plan, kind)] = numbers.replace("-", "−")
    return found


def ceiling_margin(results: Results[AnyResult]) -> float:
    """Return how much lower still counts as no lower: the study's margin, which is one of accuracies."""
    return results.plan.margin if claims_of(results.plan)[0].has_margin else 0.0


def still_falling(results: Results[AnyResult]) -> list[str]:
    """Return the kinds of run whose training loss, the mean over seeds, still fell when training ended."""
    found = []
    for kind, runs in results.by_kind.items():
        loss = _mean_curve(runs, "train_ce" if len(kind) > 2 and kind[1] else "train_hard_ce")
        if loss is not None and still_falls(loss):
            found.append(kind_name(results.plan, kind))
    return found


def still_falls(loss: Array) -> bool:
    """Whether a loss ``(E,)`` by epoch still falls at its end.

    It does if its mean over the last tenth of the epochs lies below that over the tenth before by more than
    2 % of how far it fell in all, so that neither its unit nor its floor matters. One epoch says nothing.
    """
    last = max(1, int(LAST * len(loss)))
    if len(loss) <= last:
        return False
    late = loss[-last:].mean()
    return bool(loss[-2 * last : -last].mean() - late > STILL * max(loss[0] - late, 0))


def _mean_curve(runs: BySeed[AnyResult], column: str) -> Array | None:
    each = [one for result in runs.values() for one in result.each]
    curves = [result.curves[column] for result in each if column in result.curves]
    finite = [curve for curve in curves if np.isfinite(curve).all()]
    shortest = min(map(len, finite), default=0)
    return np.mean([curve[:shortest] for curve in finite], axis=0) if shortest else None
