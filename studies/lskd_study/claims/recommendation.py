"""What follows from a study's verdicts for somebody who has to choose: which teacher, and whether to distil.

The rules are the tables below: a state of a finding, and the words that it allows. Words that prefer
something stand beside ``better`` and ``worse``, which only "supported" and "contradicted" give; a number
with a sign is an estimate of such findings. Verdicts are corrected for all tests of the page, so where
nothing has an effect something is preferred in 5 of 100 studies at most.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lskd_study.base.text import duration, listed
from lskd_study.claims.findings import Finding
from lskd_study.claims.outlook import line_to_change, prospect, seconds_a_seed, two_digits
from lskd_study.claims.statements import losses_of, models_of
from lskd_study.plan.plan import Plan, exact
from lskd_study.results.results import Results
from lskd_study.stats.sequential import error_rate

State = Literal["better", "worse", "uncorrected", "open", "no harm", "small", "one seed", "failed", "missing"]
Rules = Mapping[State, str]
Loss = tuple[float, float]  # temperature and hard weight
UNKNOWN: tuple[State, ...] = ("one seed", "failed", "missing")

# Which teacher to take: the first state of this table that some arm has decides. {others}: the undecided arms
# and the baseline.
TEACHER: Rules = {
    "better": "Distil from the teacher {better}",
    "worse": "Distil from the teacher {others}, not from the one {worse}",
    "uncorrected": "This study cannot tell {them} apart",
    "open": "{either} will do, as far as this study can tell",
    "no harm": "The teacher {no_harm} can be taken: it costs students less than {margin}",
    "small": "{either} will do",
    "one seed": "No recommendation yet: one seed does not show how much seeds vary; add seeds",
    "failed": "No recommendation: {note}",
    "missing": "No recommendation yet: {note}",
}
# The same where a control won against a teacher that this would name: how the teachers compare, and no more.
BESIDE_A_CONTROL: Rules = {
    **TEACHER,
    "better": "Of these teachers rather the one {better}",
    "worse": "Of these teachers rather not the one {worse}",
    "open": TEACHER["uncorrected"],
    "no harm": "The teacher {no_harm} costs students less than {margin} against the one {baseline}",
    "small": "Smoothing these teachers changes their students by less than {margin}",
}
# Why: what smoothing did to the teachers themselves and to the students. {of}: in which settings, if not all.
WHY: Mapping[str, Rules] = {
    "better-teacher": {
        "better": "smoothing raised the teachers’ own {score} by {estimate}{of}",
        "worse": "smoothing lowered the teachers’ own {score}{of}: {estimate}",
        "uncorrected": "no effect on the teachers’ own {score}{of} holds after correction for all tests",
        "open": "no effect on the teachers’ own {score}{of} was seen",
        "no harm": "smoothing costs the teachers{of} less than {margin} of their own {score}",
        "small": "smoothing changed the teachers’ own {score}{of} by less than {margin}",
        "failed": "of the teachers’ own {score}{of} nothing is known",
    },
    "better-student": {
        "better": "students{of} gained {estimate} of {score}",
        "worse": "students{of} lost {score}: {estimate}",
        "uncorrected": "no effect on students{of} holds after correction for all tests",
        "open": "no effect on students{of} was seen",
        "no harm": "students{of} lose less than {margin}, and whether they gain is open",
        "small": "the effect on students{of}, if there is one, is smaller than the margin of {margin}",
        "failed": "of students{of} nothing is known",
    },
}


@dataclass(frozen=True)
class Choice:
    """Something else to choose, and whether to distil at all.

    Attributes:
        says: what the states of its claim allow to say.
        question: what is not known in every other state.
        untested: what is not known where the claim is not tested.
        settles: states that come before the choice of a teacher where all that could be taken have them, and
            in place of it at a T and λ where that is so.
    """

    says: Rules
    question: str
    untested: str = ""
    settles: tuple[State, ...] = ()


CHOICES: Mapping[str, Choice] = {
    "distillation-helps": Choice(
        {
            "better": "Distilling{of} pays: {estimate} over the same network trained on the labels alone",
            "worse": "Do not distil{of}: {estimate} against the same network trained on the labels alone",
            "small": "Distilling{of} is not worth a teacher: it changes less than {margin} against the same "
            "network trained on the labels alone",
        },
        "Whether distilling{of} pays at all",
        "Whether distilling pays at all: not tested; `controls: [hard]` in the study file would tell",
        ("worse", "small"),
    ),
    "more-than-smoothing": Choice(
        {
            "better": "A smoothed teacher{of} gives {estimate} more than smoothing the student’s own labels",
            "worse": "Rather than from a smoothed teacher{of} train the student on labels smoothed alike: "
            "distilling gave {estimate} against that",
            "small": "Smoothing the student’s own labels does the same as a smoothed teacher{of}, to less "
            "than {margin}",
        },
        "Whether a smoothed teacher{of} gives more than smoothing the student’s own labels",
        settles=("worse",),
    ),
    "more-hard-label": Choice(
        {
            "better": "Prefer the larger λ{of}: {estimate} from the smallest to the largest",
            "worse": "Prefer the smaller λ{of}: {estimate} from the smallest to the largest",
        },
        "Which λ is best{of}",
    ),
    "better-teachers": Choice(
        {
            "better": "Of the teacher networks prefer the more accurate{of}: {estimate} of its own accuracy",
            "worse": "Do not choose the teacher network by its own accuracy{of}: {estimate} of it",
        },
        "Which teacher network teaches best{of}",
        "Which teacher network teaches best: not tested, which takes three of them",
    ),
}
NO_STUDENTS = "Which teacher teaches better: not tested, the study has no students"
NO_TEMPERATURE = "Which T is best: not tested, only how the gain by smoothing changes with it"


@dataclass(frozen=True)
class Recommendation:
    """What to do, why, what is not known, and what it costs: sentences; all but the first may be empty."""

    sentence: str
    reason: str = ""
    unknown: str = ""
    cost: str = ""

    def __str__(self) -> str:
        """Return all of it in one line."""
        return " ".join(filter(None, (self.sentence, self.reason, self.unknown, self.cost)))


def state_of(finding: Finding, findings: Sequence[Finding] = ()) -> State:
    """Return what a finding allows to say; ``findings``: among which its test against the margin is."""
    interval, claim = finding.interval, finding.claim
    if finding.verdict == "no verdict":
        return "failed"
    if finding.verdict in ("supported", "contradicted"):
        return "better" if (finding.verdict == "supported") == (claim.direction == 1) else "worse"
    if interval is not None and not interval.includes_seeds:
        return "one seed"
    if interval is None or not interval.known:
        return "missing"
    if finding.verdict == "too small to matter":
        return "small"
    if finding.changed_by_holm:
        return "uncorrected"
    about = claim.contrast, claim.role, finding.setting
    tests = (one for one in findings if one.claim.non_inferior and one.verdict == "supported")
    return "no harm" if about in ((t.claim.contrast, t.claim.role, t.setting) for t in tests) else "open"


def recommend(results: Results[Any], findings: Sequence[Finding], barred: str = "") -> Recommendation:
    """Return what a study's verdicts allow to recommend.

    ``barred``: why nothing in this study can be acted on (other data, runs at chance); empty: nothing does.
    """
    plan, cost = results.plan, _cost(results)
    if barred:
        return Recommendation(_sentences([f"No recommendation: {barred}"]), cost=cost)
    words = _Words(plan, findings, seconds_a_seed(results))
    if plan.teachers_alone:
        texts = words.each({**TEACHER, **WHY["better-teacher"]}, "better-teacher")
        unknown = [*words.effect("better-teacher"), NO_STUDENTS]
        return Recommendation(_sentences(texts), "", _sentences(unknown), cost)
    taken = words.taken()
    why = [text for claim, table in WHY.items() for text in words.each(table, claim)]
    unknown = words.effect("better-student", " on students")
    first, what = list[str](), list[str]()
    settled: set[Loss] = set()
    for claim, choice in CHOICES.items():
        states = words.states(claim)
        own = words.settled(claim, choice, taken)
        if taken and own == taken.keys():
            first += words.each(choice.says, claim, settled=True)
            continue
        settled |= own
        what += words.each(choice.says, claim)
        rest = [one for state, several in states.items() if state not in choice.says for one in several]
        gone = [one for state in UNKNOWN for one in states.get(state, ())]
        for group in ([one for one in rest if one not in gone], gone):
            if group:
                unknown.append(f"{words.fill(choice.question, group)}: {words.reach(group)}")
        if not states and words.asks(claim):
            unknown.append(choice.untested)
    what = words.teacher(set() if settled == taken.keys() else settled, bool(first)) + what
    if first:
        what = [*first, f"If you distil all the same: {_lower(what[0])}", *what[1:]]
    unknown += words.limits()
    return Recommendation(_sentences(what), _sentences(["; ".join(why)]), _sentences(unknown), cost)


def _cost(results: Results[Any]) -> str:
    """Return what a run of each role took on average, and all of them."""
    took: dict[str, list[float]] = {}
    for result in results.finished.values():
        took.setdefault(result.run.role, []).append(result.job["wall_time_s"])
    each = [f"a {role} takes {duration(sum(times) / len(times))}" for role, times in took.items()]
    jobs = [result.job for result in results.finished.values()]
    resumed = sum(bool(job["resumed"]) for job in jobs)
    rest = f" (of {resumed} resumed ones the last part counts)" if resumed else ""
    total = f"all {len(jobs)} runs took {duration(sum(map(sum, took.values())))}{rest}"
    return _sentences(["; ".join([*each, total])] if jobs else [])


@dataclass(frozen=True)
class _Words:
    """Fills in the tables' words for the findings of a page."""

    plan: Plan
    findings: Sequence[Finding]
    seconds: float

    def of_claim(self, claim: str) -> list[Finding]:
        return [one for one in self.findings if one.claim.id == claim]

    def states(self, claim: str, loss: Loss | None = None) -> dict[State, list[Finding]]:
        """Return the findings of a claim, all or those at one T and λ, by what they allow to say."""
        found: dict[State, list[Finding]] = {}
        for one in self.of_claim(claim):
            if loss in (None, _loss_of(one)):
                found.setdefault(state_of(one, self.findings), []).append(one)
        return found

    def fill(self, template: str, findings: Sequence[Finding], **more: str) -> str:
        """Return a template filled in for findings of one claim and one state."""
        estimates = sorted(one.interval.estimate for one in findings if one.interval is not None)
        ends = dict.fromkeys(map(_signed, (*estimates[:1], *estimates[-1:])))
        known = {
            "of": self._of(findings),
            "estimate": f"{' to '.join(ends)} {findings[0].claim.unit}",
            "margin": f"{exact(self.plan.margin)} points",
            "score": self.plan.kind.measure,
            "note": _note(findings[0]),
            "them": "these teachers",
            "either": "Any of these teachers" if len(self.plan.smoothing) > 2 else "Either teacher",
        }
        return template.format(**known | more)

    def each(self, table: Rules, claim: str, settled: bool = False) -> list[str]:
        """Return the words for every state of a claim; one that settles it does so in all settings."""
        states = self.states(claim)
        said = [state for state in table if state in states]
        more = {"of": ""} if settled and len(said) == 1 else {}
        return [self.fill(table[state], states[state], **more) for state in said]

    def by_loss(self) -> dict[Loss, tuple[State, dict[State, list[Finding]]]]:
        """Return at each T and λ the state that says which teacher to take, and all findings on students."""
        found = {}
        for loss in losses_of(self.plan):
            states = self.states("better-student", loss)
            if state := next((state for state in TEACHER if state in states), None):
                found[loss] = state, states
        return found

    def taken(self) -> dict[Loss, set[float]]:
        """Return the smoothing of the teachers that could be taken, at each T and λ."""
        found = {}
        for loss, (state, states) in self.by_loss().items():
            arms = (
                [state] if state == "better" else [one for one in TEACHER if one not in ("better", "worse")]
            )
            known = [one for one in arms if state in UNKNOWN or one not in UNKNOWN]
            found[loss] = {one.setting.smoothing for kind in known for one in states.get(kind, ())}
            found[loss] |= set() if state == "better" else {next(iter(states.values()))[0].setting.baseline}
        return found

    def settled(self, claim: str, choice: Choice, taken: Mapping[Loss, set[float]]) -> set[Loss]:
        """Return each T and λ at which a choice comes before that of a teacher, whichever could be taken."""
        found: set[Loss] = set()
        for loss, arms in taken.items():
            states = self.states(claim, loss)
            against = {one.setting.smoothing for state in choice.settles for one in states.get(state, ())}
            found |= {loss} if arms <= against and "better" not in states else set()
        return found

    def beaten(self, loss: Loss) -> set[float]:
        """Return the smoothing of the teachers at a T and λ that a control settles not to distil from."""
        found = (
            one
            for claim, choice in CHOICES.items()
            for state in choice.settles
            for one in self.states(claim, loss).get(state, ())
        )
        return {one.setting.smoothing for one in found}

    def teacher(self, without: set[Loss], all_the_same: bool) -> list[str]:
        """Return which teacher to take, for each T and λ where that differs, but ``without`` some.

        ``all_the_same``: whatever the controls say.
        """
        chosen: dict[str, list[Loss]] = {}
        for loss, (state, states) in self.by_loss().items():
            if loss in without:
                continue
            findings = states[state]
            undecided: tuple[State, ...] = ("uncorrected", "open", "no harm", "small")
            others = [findings[0].setting.baseline]
            others += _alphas(one for kind in undecided for one in states.get(kind, ()))
            named = others if state not in ("better", "no harm") else _alphas(findings)
            table = TEACHER if all_the_same or not self.beaten(loss) & set(named) else BESIDE_A_CONTROL
            more = {name.replace(" ", "_"): _arms(_alphas(group)) for name, group in states.items()}
            more |= {"baseline": _arms(others[:1]), "others": _arms(others)}
            if "failed" in states:  # of missing runs the page says that the same command finishes them
                for name, text, joined in (("either", "Any of ", "or"), ("them", "", "and")):
                    more[name] = f"{text}the teachers with {_values('α', others, joined)}"
            chosen.setdefault(self.fill(table[state], findings, **more), []).append(loss)
        if len(chosen) == 1 and not without:
            return list(chosen)
        return [f"For {self._losses(where)}: {_lower(text)}" for text, where in chosen.items()]

    def effect(self, claim: str, on: str = "") -> list[str]:
        """Return what is not known of the effect that the choice of a teacher rests on."""
        states = self.states(claim)
        undecided: tuple[State, ...] = ("uncorrected", "open", "no harm")
        unknown = [one for state in undecided for one in states.get(state, ())]
        texts = [self.reach(unknown, on + self._of(unknown)) + self._next(unknown[0])] if unknown else []
        better, worse = states.get("better", []), states.get("worse", [])
        for group in (better, worse):
            # The page's answer has the first finding's interval.
            if unsaid := [one for one in group if one is not self.findings[0]]:
                texts.append(self.reach(unsaid, on + self._of(unsaid)))
        if better and len(self.plan.smoothing) > 2:
            baseline = exact(better[0].setting.baseline)
            texts.append(
                f"Strengths of smoothing were not compared with each other, only with α = {baseline}"
            )
        return texts + [one.note for one in self.of_claim(claim) if one.note and one.interval is not None]

    def _next(self, finding: Finding) -> str:
        """Return the line to change for more seeds, or when a study by looks is judged again."""
        if self.plan.looks:
            later = self.plan.looks[self.plan.look + 1 :]
            if self.findings[0].verdict != "cannot tell":
                return "; the headline is decided, so there is no further look"
            return f"; the next look is after {later[0]} seeds" if later else "; no look is left"
        if (line := line_to_change(self.plan, finding)) and (ahead := prospect(finding)):
            looks = sorted({*self.plan.looked_at, len(self.plan.seeds), min(ahead.widths)})
            rate = f"{100 * error_rate(looks):.0f}"
            return f": `{line}`; to look again turns a claim's 5 % into {rate} %, `--until-decided` does not"
        missing = finding.interval is not None and finding.interval.seeds < len(self.plan.seeds)
        return "; the same command again finishes the runs that are missing" if missing else ""

    def asks(self, claim: str) -> bool:
        """Whether the study leaves a reader with a claim's question if it does not test it."""
        several = len(models_of(self.plan, "teacher")) > 1
        return claim == "distillation-helps" or (claim == "better-teachers" and several)

    def limits(self) -> list[str]:
        """Return what no claim of the study is about, and over what its effects are means."""
        texts = [NO_TEMPERATURE] if len({t for t, _ in losses_of(self.plan)}) > 1 else []
        teachers, students = (len(models_of(self.plan, role)) for role in ("teacher", "student"))
        if teachers * students > 1:
            pairs = f"{students} student{'s' * (students > 1)}"
            pairs += f" of {teachers} teacher networks" if teachers > 1 else ""
            texts.append(f"Effects are means over {pairs}; none was tested for one of them alone")
        return texts

    def reach(self, findings: Sequence[Finding], on: str = "") -> str:
        """Return how large the effect of findings of one claim can be, and what would narrow that."""
        known = [one.interval for one in findings if one.interval is not None and one.interval.known]
        if not known or state_of(findings[0]) in ("failed", "one seed"):
            return _note(findings[0])
        low, high = min(one.low for one in known), max(one.high for one in known)
        if findings[0].verdict not in ("supported", "contradicted"):
            # The correction allows zero, where the interval does not.
            low, high = min(low, 0.0), max(high, 0.0)
        unit = findings[0].claim.unit
        text = f"an effect{on} from {_signed(low)} to {_signed(high)} {unit} is possible"
        # The widest: of several settings it is the one that the range is made of.
        ahead = max(filter(None, map(prospect, findings)), key=lambda one: one.now, default=None)
        if ahead is None:
            return text
        if not ahead.widths:
            samples = f"{ahead.samples:,} {self.plan.kind.samples}"
            return f"{text}, and more seeds would hardly narrow that: the {samples} are the limit"
        seeds, half = next(iter(ahead.widths.items()))
        more = (seeds - ahead.seeds) * self.seconds
        time = "" if math.isnan(more) else f" ({duration(more)} more of runs)"
        which = "the widest interval" if len(known) > 1 else "the interval"
        return f"{text}; {seeds} seeds{time} would narrow {which} to about ±{two_digits(half)}"

    def _of(self, findings: Sequence[Finding]) -> str:
        """Return which settings of their claim these are; empty where it is all."""
        every = self.of_claim(findings[0].claim.id)
        if len(findings) == len(every):
            return ""
        named = findings[0].claim.control == "hard"
        if words := [one.setting.words for one in findings if one.setting.words and not one.claim.control]:
            return f" ({_some(words)})"
        places: dict[tuple[float, ...], list[Loss]] = {}
        for loss in sorted(set(map(_loss_of, findings)), key=losses_of(self.plan).index):
            places.setdefault(tuple(_alphas(f for f in findings if _loss_of(f) == loss)), []).append(loss)
        texts = []
        for alphas, losses in places.items():
            arms = (
                ""
                if list(alphas) == _alphas(every)
                else f"from the teacher{'s' * (len(alphas) > 1)} {_arms(alphas, 'and')}"
                if named
                else _values("α", alphas)
            )
            everywhere = len(losses) == len(set(map(_loss_of, every)))
            where = "" if everywhere else f"at {self._losses(losses)}" if named else self._losses(losses)
            texts.append((" " if named else ", ").join(filter(None, (arms, where))))
        return f" {'; '.join(texts)}" if named else f" ({'; '.join(texts)})"

    def _losses(self, losses: Sequence[Loss]) -> str:
        """Return temperatures and hard weights, of which the study varies."""
        every = losses_of(self.plan)
        varied = [at for at in (0, 1) if len({loss[at] for loss in every}) > 1]
        if len(varied) == 1:
            return _values("Tλ"[varied[0]], [loss[varied[0]] for loss in losses])
        return "; ".join(f"T = {exact(t)}, λ = {exact(hard)}" for t, hard in losses)


def _loss_of(finding: Finding) -> Loss:
    return finding.setting.temperature, finding.setting.hard_weight


def _alphas(findings: Iterable[Finding]) -> list[float]:
    return sorted({one.setting.smoothing for one in findings})


def _values(name: str, values: Iterable[float], joined: str = "and") -> str:
    return f"{name} = {listed(map(exact, values), joined)}"


def _some(places: Sequence[str]) -> str:
    return "; ".join(places) if "," in places[0] else listed(places)


def _arms(alphas: Sequence[float], joined: str = "or") -> str:
    smoothed = [alpha for alpha in alphas if alpha]
    kinds = ["without smoothing"] * (len(smoothed) < len(alphas))
    return listed(kinds + ([f"with {_values('α', smoothed, joined)}"] if smoothed else []), joined)


def _note(finding: Finding) -> str:
    of_interval = finding.interval.note if finding.interval else ""
    return finding.note or of_interval or "there is no result"


def _sentences(texts: Iterable[str]) -> str:
    return " ".join(f"{text[:1].upper()}{text[1:]}." for text in dict.fromkeys(texts) if text)


def _lower(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
