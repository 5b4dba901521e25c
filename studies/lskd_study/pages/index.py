"""The page over several studies: one self-contained HTML file, one line per study.

It is made from the studies' ``verdicts.json`` alone, but the paper's tables and the claims that take several
studies, which are made from the studies' runs.
"""

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from lskd import LskdError
from lskd.base.files import write_text
from lskd_study.claims import Finding, judge_several
from lskd_study.drawing.curves import Difference, difference_drawing, setting_names
from lskd_study.drawing.style import themed_svg
from lskd_study.pages.page import MARKS, PAGE, claims_shown, counted, digits_of, ends_text, number, render
from lskd_study.pages.paper_figures import plans_of, shared_tables
from lskd_study.pages.verdicts import VERDICTS_FILE, FindingRecord, StudyRecord, read_record
from lskd_study.results.read import read_results
from lskd_study.stats.intervals import Interval

MOST_SETTINGS = 6  # of a study with more, its headline's alone is drawn: its own page draws them all
ORDER = {verdict: place for place, verdict in enumerate((*MARKS, None))}  # how the verdicts sort


@dataclass(frozen=True)
class IndexedStudy:
    """A study with the address of its page, relative to the index page."""

    folder: Path
    link: str
    record: StudyRecord

    @property
    def headline(self) -> FindingRecord | None:
        """The finding that the study's page opens with; None for teachers without students."""
        return self.record.findings[0] if self.record.findings and self.record.students else None

    @property
    def tested(self) -> list[FindingRecord]:
        """The findings that are claims, without those that are only parts of a loss."""
        return [finding for finding in self.record.findings if finding.direction]

    @property
    def difference(self) -> str:
        """The headline's difference, a dash where there is none."""
        if self.headline is None or self.headline.estimate is None:
            return "–"
        return number(self.headline.estimate, digits_of(self.headline.unit), sign=True)

    @property
    def interval(self) -> str:
        """The headline's interval, a dash where there is none."""
        if self.headline is None or self.headline.low is None or self.headline.high is None:
            return "–"
        return ends_text(self.headline.low, self.headline.high, self.headline.unit)

    @property
    def claims(self) -> list[dict[str, str]]:
        """Each claim once: its name, a mark for each setting it was tested in, the same in words."""
        found = []
        for claim in dict.fromkeys(finding.claim for finding in self.tested):
            verdicts = [finding.verdict or "cannot tell" for finding in self.tested if finding.claim == claim]
            counts = Counter(verdicts)
            words = (
                verdicts[0]
                if len(verdicts) == 1
                else ", ".join(f"{word} in {counts[word]} of {len(verdicts)}" for word in counts)
            )
            class_ = verdicts[0].replace(" ", "-") if len(counts) == 1 else "cannot-tell"
            marks = "".join(MARKS[verdict] for verdict in verdicts)
            name = claim.replace("-", " ")
            found.append({"name": name, "marks": marks, "words": words, "class_": class_})
        return found


def findings_over(folders: Sequence[Path]) -> list[Finding]:
    """Return the verdicts on the claims that these studies, which may have been moved, test together.

    Folders of other things, such as lists of teachers, are passed over.

    Raises:
        LskdError: for runs that are damaged.
    """
    plans = list(plans_of(folders).values())
    kinds = [(plan.convention, tuple(plan.smoothing)) for plan in plans]
    # Studies of other smoothing values are compared with none, so they need not be read.
    wanted = [plan for plan, kind in zip(plans, kinds, strict=True) if kinds.count(kind) > 1]
    return judge_several([results for results in map(read_results, wanted) if results.finished])


def write_index(folders: Sequence[Path], output: Path, title: str) -> str:
    """Write the page over the studies in these output folders; return its answer in one sentence.

    Raises:
        LskdError: for a folder without a study, before anything is written; for a page that cannot be.
    """
    distinct: dict[Path, Path] = {}
    for folder in folders:
        distinct.setdefault(folder.resolve(), folder)
    studies = [_indexed(folder, output) for folder in distinct.values()]
    if output.name == PAGE and (output.parent / VERDICTS_FILE).exists():
        raise LskdError(f"{output} is a study's own page; name another file with --output")
    answer = answer_sentence(studies)
    kinds = {study.record.kind for study in studies}
    scores = {"images": "top-1 accuracy", "translation": "BLEU"}
    findings = findings_over(list(distinct.values()))
    tables, drawn = shared_tables(list(distinct.values()))
    difference, not_drawn, first_alone = _drawn(studies)
    html = render(
        "index.html.j2",
        title=title,
        answer=answer,
        difference=difference,
        most_settings=MOST_SETTINGS if first_alone else 0,
        not_drawn=not_drawn,
        studies=studies,
        claims={finding.claim: finding for study in studies for finding in study.tested}.values(),
        order=ORDER,
        scores=" or ".join(name for kind, name in scores.items() if kind in kinds or kinds == {"teachers"}),
        **claims_shown(findings),
        paper_tables=tables,
        drawn=drawn,
        version=metadata.version("lskd"),
        command=shlex.join(["lskd", "index", *map(str, folders), "--output", str(output)]),
    )
    write_text(output, html)
    return answer


def answer_sentence(studies: Sequence[IndexedStudy]) -> str:
    """Return the page's first sentence: in how many studies smoothing helped the students."""
    with_students = [study for study in studies if study.headline is not None]
    total = counted(len(studies), "study", "studies")
    if not with_students:
        return f"{total} of teachers alone; no student was taught."
    verdicts = Counter(study.record.headline.verdict for study in with_students)
    small = verdicts["too small to matter"]
    claim = "the paper’s claim that a label-smoothed teacher distils a better student"
    supported = verdicts["supported"]
    support = counted(supported, "study supports", "studies support") if supported else "none supports"
    parts = [
        f"{support} {claim}",
        f"{counted(verdicts['contradicted'], 'contradicts', 'contradict')} it",
        *([f"in {small} the difference is too small to matter"] if small else []),
        f"and {verdicts['cannot tell']} cannot tell.",
    ]
    runs = [study.record.runs for study in studies]
    headlines = [own for study in with_students if (own := study.headline) and own.low is not None]
    again = len(headlines) - len({(own.estimate, own.low, own.high) for own in headlines})
    teachers = [known for study in with_students if (known := _teachers_of(study.record))]
    others = Counter(
        verdict
        for study in with_students
        for verdict in {
            one.verdict for one in study.record.findings if one.claim == study.record.headline.claim
        }
        if verdict != study.record.headline.verdict
    )
    rest = [
        f"{counted(count, *words)} {what}."
        for count, words, what in (
            (
                others["supported"],
                ("study supports", "studies support"),
                "it in another setting than its first",
            ),
            (others["contradicted"], ("study contradicts", "studies contradict"), "it in another setting"),
            (again, ("study has", "studies have"), "the same runs behind the headline as another"),
            (len(teachers) - len({*teachers}), ("study adds", "studies add"), "no new teachers"),
            (len(studies) - len(with_students), ("study is", "studies are"), "of teachers alone"),
            (verdicts["no verdict"], ("study has", "studies have"), "no verdict, because runs failed"),
            (sum(len(own.failed) for own in runs), ("run", "runs"), "failed"),
            (sum(len(own.missing) for own in runs), ("run is", "runs are"), "missing"),
        )
        if count
    ]
    return " ".join([f"Of {total}, {', '.join(parts)}", *rest])


def _teachers_of(record: StudyRecord) -> tuple[tuple[str, float], ...]:
    """Return what is estimated of a study's teachers alone, which tells whether another has the same."""
    teachers = [one for one in record.findings if one.role == "teacher"]
    return tuple((one.claim, one.estimate) for one in teachers if one.estimate is not None)


def _drawn(studies: Sequence[IndexedStudy]) -> tuple[Markup | None, int, bool]:
    """Return the headline claim's intervals, a row for each study and setting; and how many have none.

    Last whether a study has more settings than are drawn.
    """
    rows, without, first_alone = [], sum(study.headline is None for study in studies), False
    for study in studies:
        headline, name = study.headline, study.folder.resolve().name
        tested = [one for one in study.record.findings if headline and one.claim == headline.claim]
        named = list(zip(setting_names([one.setting for one in tested]), tested, strict=True))
        if len(named) > MOST_SETTINGS:
            named, first_alone = named[:1], True
        for said, own in named:
            if own.estimate is None or own.low is None or own.high is None:
                without += 1
                continue
            interval = Interval(own.estimate, own.low, own.high, np.nan, own.seeds, own.samples, own.method)
            rows.append(Difference(f"{name}, {said}" if said else name, interval, {}))
    if not rows:
        return None, without, first_alone
    figure = difference_drawing(rows, "students’ score", last_pools=False).figure
    title = "Difference in each setting of the studies, with 95 % interval"
    return themed_svg(figure, "difference", title), without, first_alone


def _indexed(folder: Path, output: Path) -> IndexedStudy:
    record = read_record(folder)
    page = folder / PAGE
    if not page.is_file():
        raise LskdError(f"{folder} has no page ({PAGE}); run `lskd study` again")
    address = os.path.relpath(page.resolve(), output.parent.resolve())
    return IndexedStudy(folder, quote(Path(address).as_posix()), record)
