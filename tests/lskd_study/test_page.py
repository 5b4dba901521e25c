import base64
import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lskd_study import page
from lskd_study.claims import judge
from lskd_study.page import (
    css_string,
    interval_text,
    machine_text,
    number,
    provenance_rows,
    render_page,
)
from lskd_study.plan import JOB
from lskd_study.report import write_report
from lskd_study.results import read_results
from lskd_study.tables import table_rows

pytestmark = pytest.mark.unit

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checked(HTMLParser):
    """Collects text and attributes, and insists that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.resources: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "srcset", "data") or (name == "href" and tag != "a") or name == "xlink:href":
                self.resources.append(value)

    def handle_startendtag(self, tag, attrs):
        if tag not in VOID:
            self.handle_starttag(tag, attrs)
            self.open.pop()
        else:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parse(plan):
    html = (plan.root / "index.html").read_text()
    checked = Checked()
    checked.feed(html)
    assert checked.open == []
    return html, checked, re.sub(r"\s+", " ", " ".join(checked.text))


def test_the_page_is_whole_in_itself(fake_study):
    plan = fake_study(effect=2.0)
    answer = write_report(plan)
    html, checked, text = parse(plan)
    assert len(checked.ids) == len(set(checked.ids))
    assert all(value.startswith(("#", "data:")) for value in checked.resources)
    assert "@import" not in html
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert html.count("<script") == len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html).group(1))
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; ")
    assert "http" not in policy
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{name}" for name in checked.ids}
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)
    assert "Simulated study <of> nothing" in text  # escaped in the source
    assert "<of>" not in html
    sentence = re.search(r'id="answer">(.*?)</p>', html, re.S).group(1)
    assert re.sub(r"<[^>]+>", "", sentence).split() == ["✓", *answer.split()]


def test_the_opening_sentence_says_difference_interval_and_seeds(fake_study):
    answer = write_report(fake_study(effect=2.0))
    assert re.match(
        r"Supported\. On these data students of label-smoothed teachers \(α\s=\s0\.1\) scored "
        r"\d+\.\d\d points higher in top-1 accuracy than students of unsmoothed teachers "
        r"\(95 % interval \+\d+\.\d\d to \+\d+\.\d\d; 3 seeds, "
        r"2 students, 240 validation images\)\.$",
        answer,
    )


@pytest.mark.parametrize(
    ("effect", "start", "part"),
    [
        (0.0, "Cannot tell. ", "a difference of either sign is possible"),
        (-2.0, "Not supported: ", " points lower "),
    ],
)
def test_other_verdicts_are_said_as_plainly(fake_study, effect, start, part):
    answer = write_report(fake_study(effect=effect))
    assert answer.startswith(start)
    assert part in answer


def test_missing_runs_are_named_on_the_page(fake_study):
    plan = fake_study()
    lost = [run for run in plan.runs if run.seed == 2]
    for run in lost:
        (plan.folder(run) / JOB).unlink()
    assert "2 seeds" in write_report(plan)
    _, _, text = parse(plan)
    assert f"{len(lost)} of 18 runs are missing" in text
    assert all(run.id in text for run in lost)


def test_with_one_arm_only_the_page_still_comes(fake_study):
    plan = fake_study()
    for run in plan.runs:
        if run.role == "student" and run.smoothing:
            (plan.folder(run) / JOB).unlink()
    assert "Nothing to compare yet" in write_report(plan)
    parse(plan)


def test_one_seed_is_flagged(fake_study):
    plan = fake_study(effect=2.0, seeds=[0])
    answer = write_report(plan)
    assert answer.startswith("Cannot tell. ")
    assert "(95 % interval over the images alone +" in answer
    assert "1 seed, 2 students" in answer
    end = ". One seed: how much seeds vary is unknown, so no verdict is possible; add seeds."
    assert answer.endswith(end)
    _, _, text = parse(plan)
    assert "Bar: 95 % interval, over the images alone." in text
    assert "corrected for" not in text


@pytest.mark.parametrize(("name", "value"), [("temperatures", 4.0), ("hard_weights", 0.5)])
def test_one_setting_other_than_the_papers_is_named(fake_study, name, value):
    answer = write_report(plan := fake_study(**{name: [value]}))
    t, hard = (4, 0) if name == "temperatures" else (1, 0.5)
    assert f"T\u00a0=\u00a0{t}, λ\u00a0=\u00a0{hard})" in answer
    html, _, text = parse(plan)
    assert '<th scope="col" class="n">λ</th>' in html
    assert f"Student small, teacher big, T = {t}, λ = {hard}" in text
    assert "plus λ times the cross-entropy with the hard labels" in text
    assert "no hard labels" not in text


def test_the_papers_own_loss_needs_no_columns(fake_study):
    write_report(plan := fake_study())
    html, _, text = parse(plan)
    assert '<th scope="col" class="n">λ</th>' not in html
    assert "alone: no hard labels, temperature 1. Results" in text
    assert "trained without and with label smoothing" in text
    assert "minus students of unsmoothed teachers, same seeds" in text


def test_a_smoothed_baseline_is_not_called_unsmoothed(fake_study):
    write_report(plan := fake_study(smoothing=[0.05, 0.1]))
    _, _, text = parse(plan)
    assert "trained with each label smoothing (α = 0.05, 0.1;" in text
    assert "teachers with α = 0.1 minus students of teachers with α = 0.05, same seeds" in text.replace(
        "\xa0", " "
    )
    assert "unsmoothed" not in text
    assert "without and with" not in text
    assert "not smoothed" not in text


def test_the_page_shows_the_command_that_writes_elsewhere(fake_study):
    plan = fake_study()
    path = plan.folder(plan.runs[0]) / JOB
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0,1", "UNSET": ""}
    changes = {"command": "timm train.py --of-the-study", "environment": environment}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    write_report(plan)
    _, _, text = parse(plan)
    assert "OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=0,1 timm train.py data" in text
    assert f"--output rerun --experiment {plan.runs[0].id}" in text
    assert "--of-the-study" not in text


def test_the_commands_of_a_moved_study_name_its_new_folder(fake_study):
    plan = fake_study()
    shutil.move(plan.root, plan.root.with_name("moved"))
    moved = replace(plan, output="moved")
    write_report(moved)
    _, _, text = parse(moved)
    student = next(run for run in moved.runs if run.role == "student")
    assert f"--kd-teacher-checkpoint moved/teachers/{student.teacher}/last.pth.tar" in text
    assert "out/teachers" not in text


def test_several_settings_are_told_apart(fake_study):
    plan = fake_study(smoothing=[0.0, 0.1, 0.2], temperatures=[1.0, 4.0])
    write_report(plan)
    _, checked, text = parse(plan)
    assert "α 0.2 against 0, T = 4, λ = 0" in text
    assert len(checked.ids) == len(set(checked.ids))


def test_every_command_and_version_is_there(fake_study):
    plan = fake_study()
    write_report(plan)
    _, _, text = parse(plan)
    for run in plan.runs:
        assert (
            f"OMP_NUM_THREADS=1 timm train.py data --config {run.config} --model {run.model} "
            f"--num-classes 4 --seed {run.seed} " in text
        )
    for part in (
        "torch 2.14.1",
        "A processor, 2 cores, no GPU",
        "aaaaaaaaaaaa, with local changes",
        "last epoch",
    ):
        assert part in text


def test_tables_and_figures_lie_beside_the_page(fake_study):
    plan = fake_study(effect=2.0)
    write_report(plan)
    lines = (plan.root / "table.md").read_text().splitlines()
    assert [line.count("|") for line in lines[:6]] == [10] * 6
    rows = list(csv.DictReader((plan.root / "table.csv").open()))
    assert [(row["smoothing"], row["student"]) for row in rows] == [
        ("0.0", "small"),
        ("0.0", "big"),
        ("0.1", "small"),
        ("0.1", "big"),
    ]
    runs = list(csv.DictReader((plan.root / "runs.csv").open()))
    chosen = [
        float(r["top1"])
        for r in runs
        if (r["role"], r["model"], r["smoothing"]) == ("student", "small", "0.1")
    ]
    assert float(rows[2]["student_top1_mean"]) == pytest.approx(sum(chosen) / 3)
    figures = {path.name for path in (plan.root / "figures").iterdir()}
    assert {"difference.png", "difference.svg", "difference.csv", "curves.csv"} <= figures
    assert len(list(csv.DictReader((plan.root / "figures" / "curves.csv").open()))) == 18 * 5


def test_the_same_results_give_the_same_page(fake_study):
    plan = fake_study()
    write_report(plan)
    before = (plan.root / "index.html").read_text()
    write_report(plan)
    assert (plan.root / "index.html").read_text() == before


def test_numbers_have_a_true_minus_sign_and_nan_is_a_dash():
    assert (number(-0.5, 2), number(0.5, 1, sign=True), number(float("nan"), 2)) == ("−0.50", "+0.5", "–")
    assert interval_text(None, "points") == "–"


def test_a_result_leads_to_its_runs_commands(fake_study):
    plan = fake_study(seeds=[0, 1], hard_weights=[0.0, 0.5])
    lost = [run for run in plan.runs if run.model == "small" and run.hard_weight and run.smoothing]
    for run in lost:
        (plan.folder(run) / JOB).unlink()
    results = read_results(plan)
    html = render_page(results, judge(results), None, [], rows=table_rows(results), layouts=[], drawn=[])
    rows = html[html.index('class="data results"') : html.index("</table>")].split("<tr")[2:]
    assert len(rows) == 8
    for row in rows:
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        ids = re.findall(r'href="#(runs-\d+)"', row)
        alpha, student, hard = cells[1], cells[4], cells[6]
        missing = (alpha, student, hard) == ("0.1", "small", "0.5")
        titles = [re.search(f'<h3 id="{id_}" tabindex="-1">(.*?)</h3>', html).group(1) for id_ in ids]
        expected = [f"Teacher big, α = {alpha}", f"Student {student} of big, α = {alpha}, T = 1, λ = {hard}"]
        assert titles == expected[: 1 if missing else 2]
    assert f"each of the {len(plan.runs) - len(lost)} runs" in html


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_every_colour_of_text_can_be_read_on_what_lies_behind_it(theme):
    css = (Path(page.__file__).parent / "templates" / "page.css").read_text()
    roots = re.findall(r":root \{(.*?)\}", css, re.S)
    assert len(roots) == 3
    light, dark, paper = (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+);", root)) for root in roots)
    colors = {"light": light, "dark": {**light, **dark}, "print": {**light, **paper}}[theme]
    pairs = [
        *((text, back) for text in ("ink", "soft", "link") for back in ("paper",)),
        *((name, f"{name}-wash") for name in ("yes", "no", "open")),
        *(("ink", back) for back in ("wash", "no-wash")),
        ("no", "paper"),
    ]
    assert [pair for pair in pairs if contrast(*(colors[name] for name in pair)) < 4.5] == []


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2."""
    lights = []
    for color in (first, second):
        digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


def test_a_title_cannot_end_the_string_it_is_in():
    assert css_string('a <b> &amp; "c"\n\\') == ('"a \\3c b\\3e  \\26  \\22 c\\22 \\a \\5c "')


def test_equal_gpus_are_counted():
    machine = {"cpu": "C", "cores": 8, "gpus": ["H", "H", "A"], "cuda": "12.8"}
    assert machine_text(machine) == "C, 8 cores, 2 × H, A (CUDA 12.8)"
    assert machine_text({**machine, "gpus": [], "cuda": None}) == "C, 8 cores, no GPU"


def test_how_the_data_were_made_is_there(fake_study):
    plan = replace(fake_study(seeds=[0]), prepare="digits")
    rows = dict(provenance_rows(read_results(plan)))
    assert rows["Data made by"] == "lskd data digits --output data"
