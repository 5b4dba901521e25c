"""What is left of a study while it runs: runs, epochs and time, in lines that need no terminal."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lskd_study.base.files import read_object
from lskd_study.base.progress import EPOCH, at_the_time
from lskd_study.base.text import duration
from lskd_study.plan.plan import JOB, Plan, Run, Store

SECONDS = 60.0  # between two lines, while nothing else is said
_LEAST = 0.05  # of a run that should have ended, or is evaluated
_MOST_SECONDS = 1e9  # thirty years: no run takes so long, and no record that says so was measured
_STORE = "soft labels of "
# What `runs/job.py` and `runs/log.py` say of a run or a store.
_LINE = re.compile(
    r"(?:\d\d:\d\d:\d\d  (starts |resumes|finished|failed  )|lskd: (error):) +((?:soft labels of )?\S+)"
)


@dataclass
class _Going:
    """A run or a store that is being made: since when, and the epochs of it that are known."""

    begun: float
    first: tuple[float, int] | None  # when so many epochs were done; None: not known yet
    last: tuple[float, int]
    epochs: int = 0

    def seconds(self) -> float | None:
        """Return what all of it takes, by the epochs that it has done here."""
        if self.first is None or self.last[1] <= self.first[1] or not self.epochs:
            return None
        return self.epochs * (self.last[0] - self.first[0]) / (self.last[1] - self.first[1])

    def done(self, seconds: float, now: float) -> float:
        """Return how many of so many seconds were done since it was begun, or gone on with."""
        return 0.0 if self.first is None else min(seconds, self._since(self.first[1], seconds, now))

    def rest(self, seconds: float, now: float) -> float:
        """Return how many of so many seconds are left."""
        return max(_LEAST * seconds, seconds - self._since(0, seconds, now))

    def _since(self, epoch: int, seconds: float, now: float) -> float:
        share = (self.last[1] - epoch) / self.epochs if self.epochs else 0.0
        return seconds * share + now - self.last[0]


class Remaining:
    """Hears what runs say, shows it, and at most once a minute how far the study is.

    Finished runs tell what one of their kind (network, file, teacher; not seed or smoothing) takes, before
    that the epochs of one that is going. How many go at a time, and what is lost between, stays as it was.

    Args:
        show: takes each line.
        clock: seconds, from any beginning.
    """

    def __init__(
        self, plan: Plan, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._show, self._clock = plan, show, clock
        self._made: dict[str, Run | Store] = {**plan.by_id}
        self._made |= {f"{_STORE}{store.id}": store for store in plan.stores}
        self._going: dict[str, _Going] = {}
        self._records: dict[str, dict[str, Any]] = {}  # of what has ended, each read once
        self._read(self._made)
        self._before = set(self._records)  # finished by an earlier command
        self._begun: float | None = None
        self._shown = clock()

    def hear(self, line: str) -> None:
        """Take a line of a run: show it, with the time left where a run has ended, or note its epoch."""
        now = self._clock()
        if found := EPOCH.fullmatch(line):
            done, of = int(found[2]), int(found[3])
            going = self._going.setdefault(found[1], _Going(now, None, (now, 0)))
            going.epochs, going.last, going.first = of, (now, done), going.first or (now, done)
            return
        if found := _LINE.match(line):
            what, name = (found[1] or found[2]).strip(), found[3]
            if what in ("starts", "resumes"):
                self._begun = now if self._begun is None else self._begun
                self._records.pop(name, None)  # made once more
                self._before.discard(name)
                self._going[name] = _Going(now, (now, 0) if what == "starts" else None, (now, 0))
            else:
                self._going.pop(name, None)
                self._read([name])
                if what != "error" and (left := self._left(now)):
                    line = f"{line}; {left}"
        self._shown = now
        self._show(line)

    def look(self) -> None:
        """Show how far it is, if nothing was shown for a minute."""
        now = self._clock()
        if now - self._shown >= SECONDS:
            self._shown = now
            self._show(at_the_time(self.line()))

    def line(self) -> str:
        """Return how far it is."""
        now = self._clock()
        self._read(self._made)  # also what has ended elsewhere and was not heard of
        done = len(self._plan.runs) - len(self._plan.unfinished())
        left = self._left(now)
        return f"{done} of {len(self._plan.runs)} runs, {self._what(now)}{left and f'; {left}'}"

    def _what(self, now: float) -> str:
        if not self._going:
            return "none is running yet" if self._begun is None else "none is running now"
        name, going = max(self._going.items(), key=lambda one: one[1].last)
        done, of = going.last[1], going.epochs
        how = f"epoch {done + 1} of {of}" if done < of else "is being evaluated"
        if not of:  # a store, or a run that ends by something else
            how = f"for {duration(now - going.begun)}"
        more = f" and {len(self._going) - 1} more" * (len(self._going) > 1)
        return f"{'' if name.startswith(_STORE) else 'run '}{name} {how}{more}"

    def _left(self, now: float) -> str:
        """Return about how long the rest takes, in words; empty before anything tells."""
        records = self._records
        todo = [name for name in self._made if name not in records]
        takes = self._takes()
        if not takes or not todo or self._begun is None or now <= self._begun:
            return ""
        mean, rest = fmean(takes.values()), []
        done = sum(_seconds(job) for name, job in records.items() if name not in self._before)
        for name in todo:
            going = self._going.get(name)
            seconds = (going and going.seconds()) or takes.get(self._kind(name), mean)
            rest.append(going.rest(seconds, now) if going else seconds)
            done += going.done(seconds, now) if going else 0.0
        if done <= 0:
            return ""
        # As many at a time, and as much time between them, as so far.
        left = max(sum(rest) * (now - self._begun) / done, *rest)
        known = all(self._kind(name) in takes for name in todo)
        return f"{'about' if known else 'very roughly'} {duration(left)} left"

    def _takes(self) -> dict[tuple[str, ...], float]:
        """Return the seconds that one of each kind takes, as far as they are known."""
        ended, going = defaultdict(list), defaultdict(list)
        for name, job in self._records.items():
            if not job.get("failed") and not job.get("resumed"):  # else it took another time than it says
                ended[self._kind(name)].append(_seconds(job))
        for name, one in self._going.items():
            if name in self._made and (seconds := one.seconds()) is not None:
                going[self._kind(name)].append(seconds)
        return {kind: fmean(values) for kind, values in (going | ended).items()}

    def _read(self, names: Iterable[str]) -> None:
        """Read the records of what has ended since they were last looked at; forget those that are gone."""
        for name in self._made.keys() & names:
            path = self._plan.root / self._made[name].folder / JOB
            if not path.exists():
                self._records.pop(name, None)
            elif name not in self._records and (record := read_object(path)):
                self._records[name] = record

    def _kind(self, name: str) -> tuple[str, ...]:
        made = self._made[name]
        teacher = self._plan.run(made.teacher).model if made.teacher else ""
        return (_STORE, teacher) if isinstance(made, Store) else (made.role, made.model, made.config, teacher)


def _seconds(job: Mapping[str, Any]) -> float:
    found = job.get("wall_time_s")
    return float(found) if isinstance(found, int | float) and 0 <= found < _MOST_SECONDS else 0.0
