import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fuzz import attacks
from lskd.base.files import read_csv
from lskd_study.base.text import csv_text
from lskd_study.pages.notices import still_falls
from lskd_study.pages.page import css_string, interval_text, machine_text, number
from lskd_study.pages.study import compared, write_report
from lskd_study.plan.plan import CURVES, JOB, LOGITS

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
    assert len(checked.ids) == len(set(checked.ids))
    return html, checked, re.sub(r"\s+", " ", " ".join(checked.text))


def test_the_page_is_whole_in_itself(fake_study):
    plan = fake_study(effect=2.0)
    answer = write_report(plan)
    html, checked, text = parse(plan)
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
    assert not [path for name in ("table2.csv", "published.csv") for path in plan.root.glob(name)]
    assert "the paper’s Table" not in text.replace("The layout of the paper’s Table 2", "")
    assert "Simulated study <of> nothing" in text  # escaped in the source
    assert "<of>" not in html
    sentence = re.search(r'id="answer">(.*?)</p>', html, re.S).group(1)
    assert re.sub(r"<[^>]+>", "", sentence).split() == ["✓", *answer.split()]


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        (
            {"effect": 2.0},
            r"Supported\. On these data students of label-smoothed teachers \(α\s=\s0\.1\) scored "
            r"\d+\.\d\d points higher in top-1 accuracy than students of unsmoothed teachers "
            r"\(95 % interval \+\d+\.\d\d to \+\d+\.\d\d; 3 seeds, 2 students, 240 validation images\)\.",
        ),
        ({"effect": 0.0}, r"Cannot tell\. .*a difference of either sign is possible.*"),
        ({"effect": -2.0}, r"Not supported: .* points lower .*"),
        (
            {"effect": 2.0, "seeds": [0]},
            r"Cannot tell\. .*\(95 % interval over the images alone \+.*1 seed, 2 students.*\. One seed: how "
            r"much seeds vary is unknown, so no verdict is possible; add seeds\.",
        ),
        ({"temperatures": [4.0]}, r".*T\s=\s4, λ\s=\s0\).*"),
        ({"hard_weights": [0.5]}, r".*T\s=\s1, λ\s=\s0.5\).*"),
    ],
)
def test_the_opening_sentence_says_verdict_difference_interval_and_seeds(fake_study, changes, answer):
    assert re.fullmatch(answer, write_report(fake_study(**changes)))


SETTING_COLUMN = '<th scope="col" class="n">λ</th>'
VARIED = [SETTING_COLUMN, "plus λ times the cross-entropy with the hard labels"]


@pytest.mark.parametrize(
    ("changes", "there", "absent"),
    [
        (
            {},
            [
                "alone: no hard labels, temperature 1. Results are those of the last epoch",
                "trained without and with label smoothing",
                "minus students of unsmoothed teachers, same seeds",
                *("torch 2.14.1", "A processor, 2 cores, no GPU", "aaaaaaaaaaaa, with local changes"),
            ],
            [SETTING_COLUMN],
        ),
        ({"temperatures": [4.0]}, [*VARIED, "Student small, teacher big, T = 4, λ = 0"], ["no hard"]),
        (
            {"hard_weights": [0.5]},
            [*VARIED, "Student small, teacher big, T = 1, λ = 0.5"],
            ["no hard labels"],
        ),
        (
            {"smoothing": [0.05, 0.1]},
            [
                "trained with each label smoothing (α = 0.05, 0.1;",
                "teachers with α = 0.1 minus students of teachers with α = 0.05, same seeds",
            ],
            ["unsmoothed", "without and with", "not smoothed"],
        ),
        ({"seeds": [0]}, ["Bar: 95 % interval, over the images alone."], ["corrected for"]),
        (
            {"smoothing": [0.0, 0.1, 0.2], "temperatures": [1.0, 4.0]},
            ["α 0.2 against 0, T = 4, λ = 0"],
            ["no hard labels"],
        ),
    ],
)
def test_the_page_says_what_was_compared(fake_study, changes, there, absent):
    plan = fake_study(**changes)
    write_report(plan)
    html, _, text = parse(plan)
    found = text.replace("\xa0", " ") + html.partition("</head>")[2]
    assert [part for part in there if part not in found] == []
    assert [part for part in absent if part in found] == []
    for run in plan.runs:  # every command
        assert (
            f"OMP_NUM_THREADS=1 timm train.py data --config {run.config} --model {run.model} "
            f"--num-classes 4 --seed {run.seed} " in text
        )


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


def test_the_page_shows_the_commands_that_write_elsewhere_and_that_made_the_data(fake_study):
    plan = replace(fake_study(), prepare="digits")
    path = plan.folder(plan.runs[0]) / JOB
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0,1", "UNSET": ""}
    changes = {"command": "timm train.py --of-the-study", "environment": environment}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    write_report(plan)
    _, _, text = parse(plan)
    assert "OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=0,1 timm train.py data" in text
    assert f"--output rerun --experiment {plan.runs[0].id}" in text
    assert "--of-the-study" not in text
    assert "Data made by lskd data digits --output data" in text


def test_the_commands_of_a_moved_study_name_its_new_folder(fake_study):
    plan = fake_study()
    shutil.move(plan.root, plan.root.with_name("moved"))
    moved = replace(plan, output="moved")
    write_report(moved)
    _, _, text = parse(moved)
    student = next(run for run in moved.runs if run.role == "student")
    assert f"--kd-teacher-checkpoint moved/teachers/{student.teacher}/last.pth.tar" in text
    assert "out/teachers" not in text


def test_tables_and_figures_lie_beside_the_page(fake_study):
    plan = fake_study(effect=2.0)
    write_report(plan)
    lines = (plan.root / "table.md").read_text().splitlines()
    assert [line.count("|") for line in lines[:6]] == [10] * 6
    rows = read_csv(plan.root / "table.csv")
    assert [(row["smoothing"], row["student"]) for row in rows] == [
        ("0.0", "small"),
        ("0.0", "big"),
        ("0.1", "small"),
        ("0.1", "big"),
    ]
    runs = read_csv(plan.root / "runs.csv")
    chosen = [
        float(r["top1"])
        for r in runs
        if (r["role"], r["model"], r["smoothing"]) == ("student", "small", "0.1")
    ]
    assert float(rows[2]["student_top1_mean"]) == pytest.approx(sum(chosen) / 3)
    figures = {path.name for path in (plan.root / "figures").iterdir()}
    assert {"difference.png", "difference.svg", "difference.csv", "curves.csv"} <= figures
    assert "settings.csv" not in figures  # of one setting the headline's figure is all
    assert len(read_csv(plan.root / "figures" / "curves.csv")) == 18 * 5


def test_the_headlines_difference_is_drawn_in_every_setting(fake_study):
    plan = fake_study(effect=2.0, smoothing=[0.0, 0.05, 0.1], temperatures=[1.0, 4.0])
    write_report(plan)
    findings = json.loads((plan.root / "verdicts.json").read_text())["findings"]
    own = [one for one in findings if one["claim"] == findings[0]["claim"]]
    drawn = read_csv(plan.root / "figures" / "settings.csv")
    for column, part in (("difference_points", "estimate"), ("low", "low"), ("high", "high")):
        assert [float(row[column]) for row in drawn] == pytest.approx([one[part] for one in own])
    assert [row["students"] for row in drawn] == [f"α = {a}, T = {t}" for t in (1, 4) for a in (0.1, 0.05)]
    assert (plan.root / "index.html").read_text().count('<figure class="difference">') == 2


def test_the_same_results_give_the_same_page(fake_study):
    plan = fake_study()
    write_report(plan)
    before = (plan.root / "index.html").read_text()
    write_report(plan)
    assert (plan.root / "index.html").read_text() == before


MACHINE = {"cpu": "C", "cores": 8, "gpus": ["H", "H", "A"], "cuda": "12.8"}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(-0.5, 2), "−0.50"),  # a true minus sign
        (number(0.5, 1, sign=True), "+0.5"),
        (number(float("nan"), 2), "–"),
        (interval_text(None, "points"), "–"),
        (
            css_string('a <b> &amp; "c"\n\\'),
            '"a \\3c b\\3e  \\26  \\22 c\\22 \\a \\5c "',
        ),  # a title cannot end it
        (machine_text(MACHINE), "C, 8 cores, 2 × H, A (CUDA 12.8)"),
        (machine_text({**MACHINE, "gpus": [], "cuda": None}), "C, 8 cores, no GPU"),
        *((compared("a", "b", "BLEU", x), "a showed no difference in BLEU from b") for x in (0.004, -0.004)),
        (compared("a", "b", "BLEU", 0.006), "a scored 0.01 points higher in BLEU than b"),
        (compared("a", "b", "BLEU", -1.0), "a scored 1.00 points lower in BLEU than b"),
    ],
)
def test_how_values_are_written(written, expected):
    assert written == expected


def test_a_result_leads_to_its_runs_commands(fake_study):
    plan = fake_study(seeds=[0, 1], hard_weights=[0.0, 0.5])
    lost = [run for run in plan.runs if run.model == "small" and run.hard_weight and run.smoothing]
    for run in lost:
        (plan.folder(run) / JOB).unlink()
    write_report(plan)
    html, _, _ = parse(plan)
    rows = html[html.index('class="data cards results"') : html.index("</table>")].split("<tr")[2:]
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


def test_a_failed_run_is_named_above_the_verdict_and_takes_it_away(fake_study, fail):
    plan = fake_study(effect=2.0)
    failed = next(run for run in plan.runs if run.role == "student" and not run.smoothing)
    fail(plan, failed, "epoch 3: the training loss is nan; the run diverged")
    answer = write_report(plan)
    html, _, text = parse(plan)
    assert answer.startswith("No verdict. ")
    assert f"run {failed.id} failed in epoch 3" in answer
    assert html.index(f"{failed.id}: epoch 3: the training loss is nan") < html.index('id="answer"')
    assert "1 of 18 runs failed." in text
    assert re.search(r"2 failed|, 1 failed", text)  # in the table of results
    assert "no difference: a run failed" in html  # in the figure of differences, for this student and all
    assert html.count("not drawn: 1 run that failed") == 4  # in each panel of its curves
    assert "17 finished, 1 failed, 0 missing" in text
    rows = read_csv(plan.root / "runs.csv")
    assert [(row["run"], row["top1"], row["failed"][:7]) for row in rows if row["failed"]] == [
        (failed.id, "", "epoch 3")
    ]
    table = (plan.root / "table.md").read_text()
    assert table.count(", 1 failed") == 2
    record = json.loads((plan.root / "verdicts.json").read_text())
    assert record["headline"]["verdict"] == "no verdict"
    assert record["runs"]["failed"] == [
        {
            "run": failed.id,
            "epoch": 3,
            "reason": "epoch 3: the training loss is nan; the run diverged",
        }
    ]
    for found in record["findings"]:
        about_students = found["role"] != "teacher"
        assert (found["verdict"] in ("no verdict", None)) == about_students, found["claim"]
        if about_students:
            assert found["estimate"] is None
            assert f"run {failed.id} failed in epoch 3" in found["note"]


def test_a_study_whose_runs_all_failed_has_a_page_that_says_so(fake_study, fail):
    plan = fake_study(seeds=[0])
    for run in plan.runs:
        if run.role == "teacher":
            fail(plan, run, "epoch 0: the training loss is nan")
    assert write_report(plan).startswith("No verdict. ")
    _, _, text = parse(plan)
    assert "6 of 6 runs failed." in text


def test_what_weakens_a_verdict_stands_above_it(fake_study, capsys):
    plan = fake_study(effect=2.0)
    weak = plan.runs[0]
    rewritten = plan.folder(weak) / LOGITS
    tensors = load_file(rewritten)
    save_file(tensors | {"logits": np.roll(tensors["logits"], 60, axis=0)}, rewritten)
    path = plan.folder(plan.runs[1]) / JOB
    job = json.loads(path.read_text())
    job["data"]["sha256"] = "1" * 64
    path.write_text(json.dumps(job))
    for run in plan.runs:
        if run.role == "student" and run.model == "small" and run.smoothing:
            table = plan.folder(run) / CURVES
            header, *lines = csv.reader(table.read_text().splitlines())
            rows = [
                dict(zip(header, line, strict=True)) | {"train_ce": str(9 - i)}
                for i, line in enumerate(lines)
            ]
            table.write_text(csv_text(header, [list(row.values()) for row in rows]))
    write_report(replace(plan, note="5 of 30 epochs, to fit --hours 1"))
    html, _, _ = parse(plan)
    above = unescape(html[html.index("<h1>") : html.index('id="answer"')])
    assert re.search(rf"{weak.id}: right on \d+\.\d % of 240 validation images, chance is 25\.0 %", above)
    assert f"{'1' * 12}: {plan.runs[1].id}" in above
    assert "5 of 30 epochs, to fit --hours 1" in above
    assert "student small of big, α = 0.1" in above.split("still fell")[1]
    record = json.loads((plan.root / "verdicts.json").read_text())
    assert record["at_chance"] == [weak.id]
    assert record["data_changed"]["1" * 64] == [plan.runs[1].id]
    assert record["still_falling"] == ["student small of big, α = 0.1"]
    assert len(record["notices"]) == 5  # with a teacher at chance, students score no lower than theirs
    assert all(f"lskd: note: {line}" in capsys.readouterr().err for line in record["notices"][:1])


@pytest.mark.parametrize(
    ("loss", "falls"),
    [
        ([2, 1.5, 1, 0.5], True),
        ([2, 1, 0.5, 0.25, 0.12, 0.06, 0.03, 0.016, 0.008, 0.004], False),
        ([102, 101, 100.5, 100.25, 100.12, 100.06, 100.03, 100.016, 100.008, 100.004], False),
        ([1, 2, 3], False),
        ([1, 1], False),
        ([2, 1], True),
        ([2], False),
        # A last epoch that happens to be lower, of twenty: the last two are held against the two before.
        ([2, *[1.0] * 18, 0.97], False),
    ],
)
def test_a_loss_still_falls_where_its_last_epochs_take_a_part_of_the_whole_fall(loss, falls):
    assert still_falls(np.array(loss, dtype=float)) == falls


@pytest.mark.filterwarnings("ignore:Glyph")  # no font has one of a control character
@pytest.mark.parametrize("role", ["teachers", "students"])
def test_names_are_never_formulas_nor_markup(fake_study, role):
    names = {"teachers": attacks.NAMES[:1], "students": attacks.NAMES[:1]} | {role: attacks.NAMES}
    changes = {one: [(name, f"{one[:-1]}.yaml") for name in own] for one, own in names.items()}
    plan = fake_study(seeds=[0, 1], **changes)
    write_report(plan)
    html, _, text = parse(plan)
    assert not re.search(r"<(img src|script>document|b onmouseover)", html)
    with (plan.root / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    for name in attacks.NAMES:
        assert " ".join(name.split()) in text
        assert (f"'{name}" if name[0] in "=+-@\t" else name) in {
            row[2 * (role == "students")] for row in rows
        }
    assert all(float(row[7]) > 0 for row in rows[1:])  # numbers stay numbers
    table = (plan.root / "table.md").read_text().splitlines()
    assert {line.replace("\\|", "").count("|") for line in table if line.startswith("|")} == {10}
    assert not any("<" in line for line in table)


def test_a_page_of_images_is_written_without_the_extra_of_translation(fake_study):
    plan = fake_study()
    code = (
        "import sys; sys.modules['sacrebleu'] = sys.modules['fairseq'] = None\n"
        "from pathlib import Path; from lskd_study.plan.plan import Plan\n"
        "import lskd_study.pages.index, lskd_study.pages.teachers\n"
        "from lskd_study.pages.study import write_report\n"
        "print(write_report(Plan.read(Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(plan.root / "plan.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("Cannot tell. ")
