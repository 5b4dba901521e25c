"""What docs/results publishes follows from the files beside it, and stands in the plan."""

import functools
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lskd.base.files import read_csv
from lskd_study.claims.contrasts import fitted_change
from lskd_study.claims.findings import DECIDED, Finding, decide
from lskd_study.claims.measures import correlate
from lskd_study.claims.several import combine
from lskd_study.claims.statements import CLAIMS, Setting
from lskd_study.cli.main import main
from lskd_study.drawing.projection import QUANTITIES
from lskd_study.pages.page import digits_of, ends_text, number
from lskd_study.pages.verdicts import read_record
from lskd_study.paper.printed import load_tables
from lskd_study.stats.intervals import Part, parts_interval, seed_interval
from lskd_study.stats.ranks import RankCorrelation, pick, rank_correlation

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
INDEX = RESULTS / "index.html"
PAGE = RESULTS.with_suffix(".md")
PLAN = (RESULTS / "plan.md").read_text(encoding="utf-8")
OVER_STUDIES = {
    "more-classes": [f"fashion_mnist/classes{classes}" for classes in (3, 5, 10)],
    "long-tail-shrinks": ["fashion_mnist/classes10", "fashion_mnist/long_tail"],
}
PARTS_SHOWN = ("real-student", "long-tail-head", "long-tail-tail")  # no claims, so without a verdict
PUBLISHED = {path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("verdicts.json")}


def section(title: str) -> str:
    """Return a section of the plan."""
    return PLAN.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_figure_and_verdict_follows_from_the_files(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["study", "--check-results", "docs/results"]) == 0
    assert capsys.readouterr().out.startswith(f"{len(PUBLISHED)} stud")


def test_every_published_study_was_planned_and_is_in_the_list_of_those_begun():
    planned = re.findall(r"^\| `recipes/([\w/]+)\.yaml` \|", section("Studies"), re.MULTILINE)
    begun = re.findall(r"^- `recipes/([\w/]+)\.yaml`", section("Begun"), re.MULTILINE)
    assert planned
    assert len(set(begun)) == len(begun)
    assert set(begun) <= set(planned)
    assert set(begun) >= set(finished()) == PUBLISHED
    assert all((ROOT / "recipes" / f"{name}.yaml").is_file() for name in planned)


def test_pages_are_small_and_whole_and_nothing_else_is_there():
    files = [path for path in RESULTS.rglob("*") if path.is_file() and path.parent != RESULTS]
    assert {path.suffix for path in files} == {".html", ".json", ".csv", ".md"}
    assert max(path.stat().st_size for path in files) < 2_000_000
    for page in RESULTS.rglob("index.html"):
        links = re.findall(r'href="([^"#:]+)"', page.read_text(encoding="utf-8"))
        assert page == INDEX or "runs.csv" in links
        assert all((page.parent / link).is_file() for link in links)


def test_intervals_in_the_prose_are_in_a_table():
    """In parentheses, the difference before them or within; what the paper has stands without."""
    signed, ends = r"([+−][\d.]+)", r"([+−][\d.]+ to [+−][\d.]+)"
    tables = set(re.findall(rf"\| {signed} (?:\| |\(){ends}(?: \||\))", PAGE.read_text("utf-8")))
    for page in (PAGE, PAGE.with_name("choosing-a-teacher.md"), ROOT / "README.md"):
        text = " ".join(page.read_text("utf-8").split())
        found = list(re.finditer(r"\(([^()|]*?)([+−][\d.]+ to [+−][\d.]+)\)", text))
        assert found
        for one in found:
            before = re.findall(r"[+−]?\d+\.\d+", one[1]) or re.findall(r"[+−]?\d+\.\d+", text[: one.start()])
            assert {(before[-1], one[2]), (f"−{before[-1]}", one[2])} & tables, f"{page.name}: {one[0]}"


def finished() -> list[str]:
    return re.findall(r"^- `recipes/([\w/]+)\.yaml`: finished", section("Begun"), re.MULTILINE)


def test_the_page_over_all_studies_is_theirs(tmp_path, monkeypatch):
    """Its command stands below it; what is drawn may differ by rounding."""
    shutil.copytree(RESULTS, tmp_path / "docs" / "results")
    monkeypatch.chdir(tmp_path)
    folders = [f"docs/results/{study}" for study in finished()]
    title = "Does a label-smoothed teacher distil a better student?"
    assert main(["index", *folders, "--output", "docs/results/index.html", "--title", title]) == 0
    made = (tmp_path / "docs" / "results" / "index.html").read_text(encoding="utf-8")
    text = [re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL) for page in (made, INDEX.read_text("utf-8"))]
    assert text[0] == text[1]


def test_the_tables_of_the_results_are_the_studies_own():
    """After another study was published ``python tests/lskd_study/test_published_results.py`` writes them."""
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text
    shown = re.findall("<!-- table: ([a-z-]+) -->", text)
    assert {*shown} == {one.claim for _, one in findings()} | OVER_STUDIES.keys() | OWN_TABLES.keys()


def with_tables(text: str) -> str:
    """Return the page of results, the table below each mark made anew from the studies' records."""
    return re.sub(r"(<!-- table: ([a-z-]+) -->\n)(?:\|.*\n)*", lambda found: found[1] + table(found[2]), text)


def table(claim: str) -> str:
    """Return the table of a claim: a row for each study and setting, in the order of the plan.

    Studies that have the same runs have one row.
    """
    rows = ["| study | setting | difference | 95 % interval | verdict |", "|---|---|---|---|---|"]
    if claim in OWN_TABLES:
        return OWN_TABLES[claim]()
    if claim in OVER_STUDIES:
        one = over_studies()[claim]
        own = row(OVER_STUDIES[claim], one.setting.words, one.interval, one.claim.unit, one.verdict)
        return "\n".join([*rows, own]) + "\n"
    found = [one for one in findings() if one[1].claim == claim and in_rows(*one)]
    rows += [row(studies, one.setting.words, one, one.unit, one.verdict or "–") for studies, one in found]
    return "\n".join(rows) + "\n"


def findings() -> list[tuple[list[str], Any]]:
    """Return each finding but for parts of others, with its studies: those with the same runs share one."""
    found: dict[object, tuple[list[str], Any]] = {}
    for study in finished():
        every = read_record(RESULTS / study).findings
        for one in every:
            if one.verdict is None and one.claim not in PARTS_SHOWN:
                continue
            # What has no interval is told by the others of its setting.
            alike = [one] if one.low is not None else [own for own in every if own.setting == one.setting]
            runs = tuple((own.claim, own.estimate, own.low) for own in alike)
            found.setdefault((one.claim, runs, one.verdict), ([], one))[0].append(study)
    return list(found.values())


@functools.cache
def grids() -> list[str]:
    """Return the studies of several strengths of smoothing at several temperatures."""
    records = {study: read_record(RESULTS / study) for study in finished()}
    return [study for study, one in records.items() if min(len(one.smoothing), len(one.temperatures)) > 2]


def in_rows(studies: list[str], finding: Any) -> bool:
    """Whether a finding has a row in its claim's table: of a grid one of students and T."""
    setting = finding.setting
    one_of_many = setting.temperature and finding.claim != "temperature"
    return (
        not one_of_many or studies[0] not in grids() or (setting.smoothing, setting.temperature) == (0.1, 1)
    )


def grid(claim: str) -> str:
    """Return a claim in all settings of the grids: differences, intervals and verdicts that decide."""
    first = read_record(RESULTS / grids()[0])
    rows = [f"| study | α | {' | '.join(f'T = {one:g}' for one in first.temperatures)} |"]
    rows.append(f"|{'---|' * (2 + len(first.temperatures))}")
    for study in grids():
        cells: dict[float, list[str]] = {}
        for one in read_record(RESULTS / study).findings:
            if one.claim == claim:
                change = number(one.estimate, digits_of(one.unit), sign=True)
                verdict = f", {one.verdict}" if one.verdict in DECIDED else ""
                text = f"{change} ({ends_text(one.low, one.high, one.unit)}){verdict}"
                cells.setdefault(one.setting.smoothing, []).append(text)
        rows += [f"| {link(study)} | {alpha:g} | {' | '.join(own)} |" for alpha, own in sorted(cells.items())]
    return "\n".join(rows) + "\n"


def claims() -> str:
    """Return all claims, and in how many settings of the studies each has which verdict."""
    columns = (*DECIDED, "cannot tell")
    verdicts = [(one.text, one.verdict) for _, one in findings() if one.verdict]
    verdicts += [(one.claim.text, one.verdict) for one in over_studies().values()]
    assert {verdict for _, verdict in verdicts} <= {*columns}
    rows = [f"| claim | source | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    sources: dict[str, str] = {}
    for claim in (one for one in CLAIMS if one.direction):
        named = sources.setdefault(claim.text, claim.source)
        if named not in claim.source and claim.source not in named:
            sources[claim.text] = f"{named}; {claim.source}"
    for text, source in sources.items():
        counts = [verdicts.count((text, verdict)) for verdict in columns]
        cells = [str(count or "") for count in counts] if any(counts) else ["", "", "", "no study yet"]
        rows.append(f"| {text} | {source} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def row(studies: list[str], words: str, found: Any, unit: str, verdict: str) -> str:
    known = found.low is not None and math.isfinite(found.low)
    difference = number(found.estimate, digits_of(unit), sign=True) if known else "–"
    ends = ends_text(found.low, found.high, unit) if known else "–"
    names = [study.removeprefix("fashion_mnist/") for study in studies]
    links = ", ".join(
        f"[{name}](results/{study}/index.html)" for name, study in zip(names, studies, strict=True)
    )
    return f"| {links} | {words} | {difference} | {ends} | {verdict} |"


def over_studies() -> dict[str, Finding]:
    """As ``lskd index`` tests them from the runs, corrected together; the teachers are the same networks."""
    found = []
    for claim, names in OVER_STUDIES.items():
        if not {*names} <= PUBLISHED:
            continue
        records = [read_record(RESULTS / study) for study in names]
        teachers = [
            next(one for one in record.findings if one.claim == "better-teacher") for record in records
        ]
        weights, words = [-1.0, 1.0], "on a long tail less without one"
        if claim == "more-classes":
            points = [math.log10(record.data.classes) for record in records]
            weights = [weight / (max(points) - min(points)) for weight in fitted_change(points)]
            words = "for ten times the classes"
        each = [
            parts_interval(
                one.estimate, [Part(*part) for part in one.parts], (one.seeds, one.samples), one.method
            )
            for one in teachers
        ]
        interval = combine(each, weights)
        statement = next(one for one in CLAIMS if one.id == claim)
        found.append(Finding(statement, Setting(0.0, 0.1, 1.0, 0.0, words), interval, interval.p_value))
    return {one.claim.id: one for one in decide(found, headline=False)}


def by_teacher() -> str:
    """Return what networks has of each teacher network alone, with t intervals over seeds."""
    runs = read_csv(RESULTS / "fashion_mnist" / "networks" / "runs.csv")
    top1 = {line["run"]: float(line["top1"]) for line in runs}
    student = "student-test_byobnet-of-{}-smoothing{}-T1-hard0-seed{}"
    plain = [top1[f"control-test_byobnet-smoothing0-seed{seed}"] for seed in range(6)]
    rows = ["| teacher | difference of students | points | 95 % interval |", f"|{'---|' * 4}"]
    for teacher in dict.fromkeys(line["model"] for line in runs if line["role"] == "teacher"):
        arms = [[top1[student.format(teacher, alpha, seed)] for seed in range(6)] for alpha in ("0", "0.1")]
        for words, one, other in (
            ("smoothed teacher’s minus unsmoothed one’s", arms[1], arms[0]),
            ("unsmoothed teacher’s minus labels’", arms[0], plain),
            ("smoothed teacher’s minus labels’", arms[1], plain),
        ):
            found = seed_interval(np.subtract(one, other))
            ends = ends_text(found.low, found.high, "points")
            rows.append(f"| {teacher} | {words} | {number(found.estimate, 2, sign=True)} | {ends} |")
    return "\n".join(rows) + "\n"


def picks() -> str:
    """Return how each measure orders teachers, of five or more, here and in the paper's Table 8."""
    rows = ["| of | measure | how many | τ | 95 % interval | picked costs, points |", f"|{'---|' * 6}"]
    # The page of networks takes each one's two teachers for independent; runs.csv has these values alone.
    anew = dict(
        zip(("top1", "target_std"), (found for found, _ in ranks_of(kinds_of_networks())), strict=True)
    )
    for study in finished():
        ranks = [one for one in read_record(RESULTS / study).measures if len(one.teachers) >= 5]
        costs = {one.measure: one.estimate for one in ranks if one.kind == "regret"}
        link = f"[{study.rpartition('/')[2]}](results/{study}/index.html)"
        for one in ranks:
            if one.kind == "rank correlation":
                found = anew.get(one.measure, one.model_copy(update={"low": None}))
                count = 6 if one.measure in anew else len(one.teachers)
                rows.append(rank_row(f"{link} | {one.text}", count, found, costs[one.measure]))
    kinds = [kind for kind in kinds_of_networks() if kind[0] != FAR_OFF]
    for text, (found, cost) in zip(("Accuracy, top-1", "1−S (Algorithm 1)"), ranks_of(kinds), strict=True):
        rows.append(rank_row(f"networks without {FAR_OFF} | {text}", len(kinds) // 2, found, cost))
    every, teachers = load_tables()["Table 8"].rows, load_tables()["Table 1"]
    smoothed = [row for row in every if row["network"] not in ("MobileNetV2", "DenseNet121")][1:]
    unstable = [teachers.row(str(row["network"])).number("instability_with") for row in smoothed]
    for text, of, values in (
        ("Accuracy, top-1", every, np.array([row.number("teacher_top1") for row in every])),
        ("1−S", smoothed, -np.array(unstable)),
    ):
        students = [row.number("student_top1") for row in of]
        found, cost = rank_correlation(values, students), pick(values, students).regret
        rows.append(rank_row(f"the paper’s Table 8 | {text}", len(of), found, cost))
    return "\n".join(rows) + "\n"


def ranks_of(kinds: list[tuple[str, float, float, float]]) -> list[tuple[RankCorrelation, float]]:
    """Return how accuracy and 1-S go with students over networks, and what the teacher picked costs."""
    accuracy, unstable, students = np.array([kind[1:] for kind in kinds]).T
    return [
        (correlate(values, students, len(kinds) // 2), pick(values, students).regret)
        for values in (accuracy, -unstable)
    ]


def kinds_of_networks() -> list[tuple[str, float, float, float]]:
    """Return each teacher network of networks, with and without smoothing: accuracy, 1-S, its students'."""
    runs = read_csv(RESULTS / "fashion_mnist" / "networks" / "runs.csv")
    values: dict[tuple[str, str], list[list[float]]] = {}
    for line in runs:
        if line["role"] == "teacher":
            of = values.setdefault((line["model"], line["smoothing"]), [[], [], []])
            of[0].append(float(line["top1"]))
            of[1].append(float(line["one_minus_s"]))
    for line in runs:
        if line["role"] == "student":
            teacher = line["run"].partition("-of-")[2].partition("-smoothing")[0]
            values[teacher, line["smoothing"]][2].append(float(line["top1"]))
    return [(network, *(float(np.mean(one)) for one in of)) for (network, _), of in values.items()]


def rank_row(words: str, teachers: int, found: Any, cost: float) -> str:
    known = found.low is not None and math.isfinite(found.low)
    ends = ends_text(found.low, found.high, "points") if known else "–"
    return f"| {words} | {teachers} | {number(found.estimate, 2, sign=True)} | {ends} | {number(cost, 2)} |"


def asides() -> str:
    """Return the comparisons that the prose makes besides the studies' findings, with t intervals."""
    score: dict[str, dict[str, float]] = {}
    grid, temperatures = "smoothing_resnet_mambaout", ("2", "4", "16")
    grids = [study.removeprefix("fashion_mnist/") for study in finished() if "/smoothing_" in study]
    for study in ("networks", "longer", "binary", "binary_two_steps", "temperature", *grids):
        runs = read_csv(RESULTS / "fashion_mnist" / study / "runs.csv")
        score[study] = {line["run"]: float(line["top1"]) for line in runs}

    def gain(study: str, kind: str, smoothing: str = "0.1") -> np.ndarray:
        """Return with smoothing less without, by seed."""
        arms = [[score[study][kind.format(alpha, seed)] for seed in range(6)] for alpha in (smoothing, "0")]
        return np.subtract(*arms)

    kinds = kinds_of_networks()
    networks = list(dict.fromkeys(kind[0] for kind in kinds))
    student = "student-test_byobnet-of-{}-smoothing{{}}-T1-hard0-seed{{}}"
    gains = {name: gain("networks", student.format(name)) for name in networks}
    known = ("test_resnet", "test_byobnet")  # of classes10
    plain = [score["networks"][f"control-test_byobnet-smoothing0-seed{seed}"] for seed in range(6)]
    over_labels = [
        np.mean(
            [
                [score["networks"][student.format(name).format(alpha, seed)] for seed in range(6)]
                for name in networks
                if name != FAR_OFF
            ],
            axis=0,
        )
        - plain
        for alpha in ("0", "0.1")
    ]
    control = "control-ReActNet_18x0.25-smoothing{}-seed{}"
    binary_student = "student-ReActNet_18x0.25-of-test_resnet-smoothing{}-T1-hard0-seed{}"
    two = ("binary_two_steps", "binary")
    kind = "-smoothing{{}}-T{}-hard0-seed{{}}"

    def pair(study: str) -> tuple[str, str]:
        """Return how a study names its students and those on the labels; of one teacher and one student."""
        teacher, student = (
            "resnet_byobnet" if study == "temperature" else study.removeprefix("smoothing_")
        ).split("_")
        return (
            f"student-test_{student}-of-test_{teacher}{kind}",
            f"control-test_{student}-smoothing0-seed{{}}",
        )

    def over_t(study: str, smoothing: str = "0.1") -> np.ndarray:
        """Return smoothing's effect on students, mean of the higher T, by seed."""
        return np.mean([gain(study, pair(study)[0].format(t), smoothing) for t in temperatures], axis=0)

    def over_labels_of(study: str, smoothing: str) -> np.ndarray:
        """Return students of teachers less the labels', mean of the higher T, by seed."""
        students, labels = pair(study)
        by_t = [
            [score[study][students.format(t).format(smoothing, seed)] for seed in range(6)]
            for t in temperatures
        ]
        return np.mean(by_t, axis=0) - [score[study][labels.format(seed)] for seed in range(6)]

    longer = gain("longer", student.format("test_resnet")) - gains["test_resnet"]
    lines = [
        ("longer: smoothing’s effect on students, 30 epochs less 10, test_resnet", seed_interval(longer)),
        (
            "networks: smoothing’s effect on students, the four networks that classes10 has not",
            seed_interval(np.mean([gains[name] for name in networks if name not in known], axis=0)),
        ),
        (
            "networks: the same, over networks as a sample of others, all six",
            seed_interval(np.array([gains[name].mean() for name in networks])),
        ),
        (
            "networks: smoothing’s effect on the teacher test_byobnet",
            seed_interval(gain("networks", "teacher-test_byobnet-smoothing{}-seed{}")),
        ),
        *(
            (f"{words}, mean of T = 2, 4, 16", seed_interval(by_seed))
            for words, by_seed in (
                *(
                    (f"{one}: smoothing’s effect on students, α = {alpha}", over_t(one, alpha))
                    for one in grids
                    for alpha in ("0.1", "0.2")
                ),
                ("temperature: the same, α = 0.1", over_t("temperature")),
                (f"{grid} less temperature: the same", over_t(grid) - over_t("temperature")),
                *(
                    (f"{one}: students of {kind} teachers less the labels’", over_labels_of(one, alpha))
                    for one in (*grids, "temperature")
                    for kind, alpha in (("unsmoothed", "0"), ("smoothed (α = 0.1)", "0.1"))
                ),
            )
        ),
        (
            f"{grid} without seed 5: smoothing’s effect on students, α = 0.1, T = 1",
            seed_interval(gain(grid, f"student-test_mambaout-of-test_resnet{kind.format(1)}")[:5]),
        ),
        ("binary: smoothed labels’ effect, no teacher", seed_interval(gain("binary", control))),
        (
            "binary and binary_two_steps: smoothing’s effect on students, mean of both",
            seed_interval(np.mean([gain(study, binary_student) for study in two], axis=0)),
        ),
        *(
            (
                f"binary_two_steps less binary: {words}",
                seed_interval(
                    np.subtract(
                        *([score[study][kind.format(alpha, seed)] for seed in range(6)] for study in two)
                    )
                ),
            )
            for words, kind, alpha in (
                ("students of unsmoothed teachers", binary_student, "0"),
                ("students of smoothed teachers", binary_student, "0.1"),
                ("on the labels", control, "0"),
                ("on smoothed labels", control, "0.1"),
            )
        ),
        *(
            (
                f"networks without {FAR_OFF}: {words} teachers’ students less the labels’",
                seed_interval(by_seed),
            )
            for words, by_seed in zip(("unsmoothed", "smoothed"), over_labels, strict=True)
        ),
    ]
    rows = ["| study and comparison | difference or slope | 95 % interval |", f"|{'---|' * 3}"]
    for words, found in lines:
        ends = ends_text(found.low, found.high, "points")
        rows.append(f"| {words} | {number(found.estimate, 2, sign=True)} | {ends} |")
    means = np.array([np.mean([kind[1:] for kind in kinds if kind[0] == name], axis=0) for name in networks])
    accuracy, unstable, taught = means[[name != FAR_OFF for name in networks]].T
    for words, values, digits in (
        ("students’ accuracy for a point of the teacher’s", taught, 2),
        ("1−S for a point of the teacher’s accuracy", unstable, 4),
    ):
        line = stats.linregress(accuracy, values)
        half = float(stats.t.ppf(0.975, len(accuracy) - 2)) * line.stderr
        low, high = (number(line.slope + side * half, digits, sign=True) for side in (-1, 1))
        change = number(line.slope, digits, sign=True)
        rows.append(f"| networks without {FAR_OFF}: {words}, over networks | {change} | {low} to {high} |")
    return "\n".join(rows) + "\n"


def distances() -> str:
    """Return the table of Fig. 1's quantities: means over seeds, and the difference with its t interval."""
    where = ["split", "space", "quantity"]
    measured: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for line in read_csv(RESULTS / "fashion_mnist" / "classes3" / "distances.csv"):
        one = measured.setdefault(tuple(line[name] for name in where), {})
        one.setdefault(line["teacher"], {})[line["seed"]] = float(line["value"])
    rows = [
        "| images | in | | without | with smoothing | difference | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for (split, space, quantity), by_arm in measured.items():
        if quantity in ("relative_spread", "separation"):
            plain, smoothed = (
                np.array([by_arm[f"{word} smoothing"][seed] for seed in "012345"])
                for word in ("without", "with")
            )
            found = seed_interval(smoothed - plain)
            means = [number(values.mean(), 2) for values in (plain, smoothed)]
            change = [number(found.estimate, 2, sign=True), ends_text(found.low, found.high, "points")]
            names = [
                split,
                {"plane": "the plane", "features": "all 96 features"}[space],
                QUANTITIES[quantity],
            ]
            rows.append(f"| {' | '.join([*names, *means, *change])} |")
    return "\n".join(rows) + "\n"


def by_alpha(study: str, column: str, less: str) -> dict[str, np.ndarray]:
    """Return a column of a study's students less that of another's same runs, by teacher, by seed."""
    other = {line["run"]: line for line in read_csv(RESULTS / less / "runs.csv")}
    found: dict[str, list[float]] = {}
    for line in read_csv(RESULTS / study / "runs.csv"):
        if line["role"] == "student":
            change = float(line[column]) - float(other[line["run"]][column])
            found.setdefault(f"α = {float(line['smoothing']):g}", []).append(change)
    return {kind: np.array(values) for kind, values in found.items()}


def change_row(cells: list[str], by_seed: np.ndarray) -> str:
    """Return a table's row: what is compared, the difference and its t interval over seeds."""
    found = seed_interval(by_seed)
    ends = ends_text(found.low, found.high, "points")
    return f"| {' | '.join([*cells, number(found.estimate, 2, sign=True), ends])} |"


def link(study: str) -> str:
    return f"[{study.rpartition('/')[2]}](results/{study}/index.html)"


def ways() -> str:
    """Return what students lose by stored soft labels, against online teachers, by seed (t intervals)."""
    rows = ["| study | against | teacher | difference | 95 % interval |", f"|{'---|' * 5}"]
    for study in (one for one in finished() if one in WAYS):
        score = {"images": "top1", "translation": "bleu"}[read_record(RESULTS / study).kind]
        lost = by_alpha(study, score, less=WAYS[study])
        lost["both"] = np.mean([*lost.values()], axis=0)
        rows += [
            change_row([link(study), link(WAYS[study]), kind], by_seed) for kind, by_seed in lost.items()
        ]
    return "\n".join(rows) + "\n"


def words() -> str:
    """Return what else stored words change: probabilities, and what is left of the gain over the labels."""
    rows = ["| study | students’ | against | teacher | difference | 95 % interval |", f"|{'---|' * 6}"]
    small = "ding_de_en/small"
    online = {line["run"]: float(line["bleu"]) for line in read_csv(RESULTS / small / "runs.csv")}
    student = "student-transformer-of-transformer-smoothing{}-T1-hard0.1-seed{}"
    gain = {  # by asking online
        f"α = {alpha}": np.array(
            [online[student.format(alpha, seed)] - online[CONTROL.format(seed)] for seed in range(1, 6)]
        )
        for alpha in ("0", "0.1")
    }
    for study in (one for one, other in WAYS.items() if other == small and one in finished()):
        for text, column in (("perplexity", "val_ppl"), ("calibration error, %", "calibration_error")):
            for kind, by_seed in by_alpha(study, column, less=small).items():
                rows.append(change_row([link(study), text, "asking online", kind], by_seed))
        for kind, by_seed in by_alpha(study, "bleu", less=small).items():
            rows.append(change_row([link(study), "BLEU", "the labels", kind], by_seed + gain[kind]))
    return "\n".join(rows) + "\n"


def sequence_level() -> str:
    """Return what students of a teacher's translations score against others, by seed (t intervals)."""
    folder = RESULTS / "ding_de_en"
    own = {
        (line["smoothing"], line["seed"]): float(line["bleu"])
        for line in read_csv(folder / "sequence_level.csv")
    }
    small = {line["run"]: float(line["bleu"]) for line in read_csv(folder / "small" / "runs.csv")}
    seeds = "12345"
    taught = {alpha: np.array([own[alpha, seed] for seed in seeds]) for alpha in ("0", "0.1")}
    student = "student-transformer-of-transformer-smoothing{}-T1-hard0.1-seed{}"
    online = {alpha: np.array([small[student.format(alpha, seed)] for seed in seeds]) for alpha in taught}
    labels = np.array([small[CONTROL.format(seed)] for seed in seeds])
    lines = [
        *((alpha, "students who ask it online", taught[alpha] - online[alpha]) for alpha in taught),
        *((alpha, "the same network on the labels", taught[alpha] - labels) for alpha in taught),
        ("0.1", "students of translations by α = 0", taught["0.1"] - taught["0"]),
    ]
    rows = ["| teacher | against | difference | 95 % interval |", f"|{'---|' * 4}"]
    rows += [change_row([f"α = {alpha}", other], by_seed) for alpha, other, by_seed in lines]
    return "\n".join(rows) + "\n"


WAYS = {f"fashion_mnist/store_{way}": "fashion_mnist/classes10" for way in ("views", "top_k", "sampled")}
WAYS |= {
    f"ding_de_en/small_{way}": "ding_de_en/small"
    for way in ("lump", "spread", "renormalise", "restrict", "sampled")
}
CONTROL = "control-transformer-smoothing0-seed{}"
GRID_CLAIMS = ("better-student", "distillation-helps", "more-than-smoothing")
FAR_OFF = "test_mambaout"  # three points behind the next of the teachers of networks
OWN_TABLES = {
    **{f"grid-{claim}": functools.partial(grid, claim) for claim in GRID_CLAIMS},
    "asides": asides,
    "claims": claims,
    "distances": distances,
    "by-teacher": by_teacher,
    "picks": picks,
    "sequence-level": sequence_level,
    "ways": ways,
    "words": words,
}


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
