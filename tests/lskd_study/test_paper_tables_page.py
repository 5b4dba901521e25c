"""The paper's tables on a study's page: plain tables with the figures of the layouts, and their files."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from lskd_study.pages.study import write_report
from lskd_study.pages.teachers import write_teachers_report
from lskd_study.paper.printed import load_tables
from lskd_study.results.read import read_results

pytestmark = pytest.mark.unit


class Tables(HTMLParser):
    """Collects the tables of the paper: caption, and the rows of head, body and foot as texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[dict] = []
        self.open: list[str] = []
        self.inside = False
        self.attributes: list[dict] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "table":
            self.inside = given.get("class") == "data compared"
            if self.inside:
                self.tables.append({"caption": "", "thead": [], "tbody": [], "tfoot": []})
        if not self.inside:
            return
        if tag in ("thead", "tbody", "tfoot", "caption"):
            self.open.append(tag)
        elif tag == "tr":
            self.tables[-1][self.open[-1]].append([])
        elif tag in ("td", "th"):
            self.tables[-1][self.open[-1]][-1].append("")
            self.attributes.append({"tag": tag, "part": self.open[-1], **given})

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()
        if tag == "table":
            self.inside = False

    def handle_data(self, data):
        if not self.inside or not self.open:
            return
        if self.open[-1] == "caption":
            self.tables[-1]["caption"] += data.strip()
        elif (rows := self.tables[-1][self.open[-1]]) and rows[-1]:
            rows[-1][-1] = f"{rows[-1][-1]} {data.strip()}".strip()


def read(plan) -> Tables:
    page = Tables()
    page.feed((plan.root / "index.html").read_text())
    return page


def check_semantics(page: Tables) -> None:
    """One line of headings, every row as long, scopes on all headings, and no cell over several."""
    assert page.tables
    for table in page.tables:
        assert table["caption"]
        (head,) = table["thead"]
        assert all(len(row) == len(head) for row in (*table["tbody"], *table["tfoot"]))
    for cell in page.attributes:
        assert not {"rowspan", "colspan"} & cell.keys()
        if cell["tag"] == "th":
            assert cell["scope"] == ("col" if cell["part"] == "thead" else "row")


@pytest.fixture
def cub(plan_of, finish, tmp_path):
    networks = {"teachers": [("resnet50.tv_in1k", "teacher.yaml")]}
    networks["students"] = [("resnet18", "student.yaml"), ("resnet50", "student.yaml")]
    plan = plan_of(tmp_path, seeds=[0, 1], **networks)
    figure = {
        "student": "resnet18",
        "teacher": None,
        "smoothing": 0.1,
        "temperature": 1.0,
        "hard_weight": 0.0,
    }
    published = {"source": "Others & others, 2022", "figures": [{**figure, "top1": 77.5}]}
    plan = replace(plan, num_classes=200, paper=["Table 2", "Fig. 5"], published=published)
    finish(plan)
    return plan


def test_the_tables_of_a_study_stand_on_its_page(cub):
    write_report(cub)
    page = read(cub)
    check_semantics(page)
    assert [table["caption"] for table in page.tables] == [
        "CUB200-2011 (Fine-grained)E14E23",
        "CUB200-2011 (Fine-grained)E23",
        "Top-1 accuracy of students",
    ]
    table = page.tables[0]
    assert table["thead"] == [
        [
            "Teacher",
            "w/\u00a0LS",
            "Acc. (Top‑1)",
            "Acc. (Top‑5)",
            "Student",
            "Acc. (Top‑1)",
            "Acc. (Top‑5)",
            "Seeds",
        ]
    ]
    results = read_results(cub)
    students = results.students("resnet18", "resnet50.tv_in1k", 0.1, 1.0, 0.0)
    top1 = np.array([one.top1 for one in students.values()])
    row = load_tables()["Table 2"].row("CUB200-2011, ResNet-50 with > ResNet-18")
    change = f"{top1.mean() - row['student_top1']:+.3f}".replace("-", "−")
    expected = f"{top1.mean():.3f} ± {top1.std(ddof=1):.3f} paper 78.382 ± 0.099 {change}"
    assert table["tbody"][2][5] == expected
    assert table["tbody"][2][0:2] + table["tbody"][2][4:5] + table["tbody"][2][7:] == [
        "ResNet-50",
        "✓",
        "ResNet-18",
        "2",
    ]
    assert len(table["tbody"]) == 4
    assert len(page.tables[1]["tbody"]) == 8  # four of Fig. 5 belong to the other study
    (published,) = page.tables[2]["tbody"]
    assert re.match(rf"{top1.mean():.3f} ± [\d.]+ published 77.500 ", published[2])
    files = {path.name for path in cub.root.iterdir()}
    assert {
        f"{stem}.{ending}" for stem in ("table2", "fig5", "published") for ending in ("csv", "md")
    } <= files
    html = (cub.root / "index.html").read_text()
    assert "Others &amp; others, 2022" in html
    for entry in ("± seems to be the population’s deviation", "counts of 5,790 images"):
        assert entry in html


def test_a_study_without_the_key_keeps_the_layout_it_had(fake_study):
    plan = fake_study()
    write_report(plan)
    assert read(plan).tables == []
    assert not [path.name for path in plan.root.iterdir() if path.name in ("table2.csv", "published.csv")]
    assert '<h2 id="results">Results</h2>' in (plan.root / "index.html").read_text()


def test_table_4_on_the_page_of_teachers(plan_of, finish, tmp_path):
    teachers = [("resnet18", "teacher.yaml"), ("resnet101", "teacher.yaml")]
    plan = plan_of(tmp_path, seeds=[0], students=[], teachers=teachers)
    plan = replace(plan, num_classes=100, paper=["Table 4"])
    finish(plan)
    write_teachers_report(plan)
    page = read(plan)
    check_semantics(page)
    (table,) = page.tables
    assert table["thead"][0][2:4] == ["ImageNet-100 Acc. (Top‑1)", "ImageNet-100 Acc. (Top‑5)"]
    assert [row[0] for row in table["tbody"]] == ["ResNet-18", "ResNet-18", "ResNet-101", "ResNet-101"]
    assert "paper 83.400" in table["tbody"][3][2]
    assert "paper +0.880" in table["tfoot"][0][2]
    assert (plan.root / "table4.csv").read_text().count("\n") == 6
