"""What docs/results publishes follows from the files beside it, and stands in the plan."""

import re
from pathlib import Path

import pytest

from lskd_study.cli.main import main
from lskd_study.pages.page import ends_text
from lskd_study.pages.verdicts import read_record

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PLAN = (RESULTS / "plan.md").read_text(encoding="utf-8")
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
    assert set(begun) >= PUBLISHED
    assert all((ROOT / "recipes" / f"{name}.yaml").is_file() for name in planned)


def test_pages_are_small_and_whole_and_nothing_else_is_there():
    files = [path for path in RESULTS.rglob("*") if path.is_file() and path.parent != RESULTS]
    assert {path.suffix for path in files} == {".html", ".json", ".csv", ".md"}
    assert max(path.stat().st_size for path in files) < 2_000_000
    for page in RESULTS.rglob("index.html"):
        links = re.findall(r'href="([^"#:]+)"', page.read_text(encoding="utf-8"))
        assert "runs.csv" in links
        assert all((page.parent / link).is_file() for link in links)


def test_the_rows_of_the_results_are_the_studies_own():
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| \[[^]]+\]\(results/([\w/]+)/index\.html\)(?:, ([^|]+))? "
        r"\| ([^|]+) \| ([^|]+) \|",
        (RESULTS.parent / "results.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {study for _, study, *_ in rows} == PUBLISHED
    for claim, study, words, ends, verdict in rows:
        findings = read_record(RESULTS / study).findings
        own = [one for one in findings if one.text == claim and words in ("", one.setting.words)]
        assert [(ends_text(one.low, one.high, one.unit), one.verdict) for one in own] == [(ends, verdict)]
