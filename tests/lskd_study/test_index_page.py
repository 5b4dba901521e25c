"""One page over several studies, from the real command."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lskd_study.cli.main import main
from lskd_study.pages.study import write_report
from lskd_study.pages.teachers import write_teachers_report
from lskd_study.pages.verdicts import VERDICTS_FILE, read_record
from lskd_study.plan.plan import JOB
from simulated import cells, html_tables

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def studies(tmp_path_factory, fake_study_at, translation_study_at) -> list[Path]:
    """Finished studies: one that supports the claim, one that contradicts it, one with more settings."""
    made = []
    for name, maker, changes in (
        ("better", fake_study_at, {"effect": 2.0}),
        ("the worse", fake_study_at, {"effect": -2.0}),
        ("translated", translation_study_at, {"effect": 0.0, "temperatures": [1.0, 4.0], "seeds": [0, 1]}),
    ):
        plan = maker(tmp_path_factory.mktemp("studies") / name)(
            students=[("small", "student.yaml")], **changes
        )
        if name == "translated":
            (plan.folder(plan.runs[-1]) / "job.json").unlink()
        write_report(plan)
        made.append(plan.root)
    return made


def test_of_many_settings_the_headlines_is_drawn(fake_study_at, tmp_path):
    for name, alphas in (("few", [0.0, 0.1]), ("many", [0.0, 0.05, 0.1, 0.2])):
        (tmp_path / name).mkdir()
        write_report(fake_study_at(tmp_path / name)(smoothing=alphas, temperatures=[1.0, 2.0, 4.0]))
    page = tmp_path / "i.html"
    folders = [str(tmp_path / name / "out") for name in ("few", "many")]
    assert main(["index", *folders, "--output", str(page)]) == 0
    drawn = re.findall(r">([^<>]*)</text>", page.read_text())
    assert drawn[-4:] == ["out, α = 0.1, T = 1", "out, T = 4", "out, T = 2", "out, T = 1"]
    assert "with more than 6 in its headline’s; its page draws all" in page.read_text()
    assert main(["index", folders[0], "--output", str(page)]) == 0
    assert "its page draws all" not in page.read_text()


def rows_of(page: Path) -> list[list[str]]:
    (table,) = html_tables(page, 'class="data cards studies"')
    return cells(table, "tbody")


def test_one_line_per_study_with_relative_links(studies, tmp_path, capsys):
    output = tmp_path / "pages" / "all.html"
    assert main(["index", *map(str, studies), "--output", str(output), "--title", "Three <of> them"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "Of 3 studies, 1 study supports the paper’s claim that a label-smoothed teacher distils a better "
        "student, 1 contradicts it, and 1 cannot tell. 1 study adds no new teachers. "
        "1 run is missing."
    )
    assert said[1] == str(output)
    html = output.read_text()
    assert "Three &lt;of&gt; them" in html
    assert said[0] in html
    # Rows from below: folders, and what their settings differ in.
    drawn = re.findall(r">([^<>]*)</text>", html)
    assert drawn[-4:] == ["out, T = 4", "out, T = 1", "out", "out"]
    rows = rows_of(output)
    assert [row[1] for row in rows] == ["✓ supported", "✗ contradicted", "? cannot tell"]
    assert [row[6:] for row in rows] == [["1 × 1 × 3", "0"], ["1 × 1 × 3", "0"], ["1 × 1 × 2", "1 of 12"]]
    assert rows[0][4].startswith(
        "✓ supported: better student ✓ supported: no worse student ✓ supported: larger"
    )
    assert "✓ supported: lower instability" in rows[0][4]
    assert rows[1][2].startswith("−")
    for folder, link in zip(studies, re.findall(r'<th scope="row"><a href="([^"]*)">', html), strict=True):
        assert not link.startswith("/")
        assert " " not in link
        assert (output.parent / link.replace("%20", " ")).resolve() == (folder / "index.html").resolve()
    for line in (read_record(folder).recommendation.sentence for folder in studies):
        assert line.replace("'", "&#39;") in html


@pytest.fixture
def copied(studies, tmp_path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    for name in (VERDICTS_FILE, "index.html"):
        shutil.copy(studies[2] / name, folder)
    return folder


def changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def change_record(folder: Path) -> None:
        content = json.loads((folder / VERDICTS_FILE).read_text())
        change(content)
        (folder / VERDICTS_FILE).write_text(json.dumps(content))

    return change_record


def test_several_settings_of_a_claim_get_a_mark_each(copied, tmp_path):
    def mark(content: dict) -> None:
        first, second = (f for f in content["findings"] if f["claim"] == "larger-loss")
        first["verdict"], second["verdict"] = "supported", "cannot tell"

    changed(mark)(copied)
    assert main(["index", *[str(copied)] * 2, "--output", str(tmp_path / "i.html")]) == 0
    (row,) = rows_of(tmp_path / "i.html")  # named twice, shown once
    assert "✓? supported in 1 of 2, cannot tell in 1 of 2: larger loss" in row[4]


def test_teachers_alone_have_their_line_too(tmp_path, fake_study, studies):
    plan = fake_study(students=[], seeds=[0])
    write_teachers_report(plan)
    assert main(["index", str(plan.root), "--output", str(tmp_path / "i.html")]) == 0
    (row,) = rows_of(tmp_path / "i.html")
    assert row[1:4] == ["no students", "–", "–"]
    assert row[4].startswith("? cannot tell: better teacher")  # one seed
    assert row[5:] == ["data 4 classes, 240 images", "1 × 0 × 1", "0"]
    html = (tmp_path / "i.html").read_text()
    assert "no student was taught" in html
    assert "<svg" not in html.partition("<main")[0]
    assert main(["index", str(plan.root), str(studies[0]), "--output", str(tmp_path / "i.html")]) == 0
    assert "so not drawn: 1." in (tmp_path / "i.html").read_text()
    page = (plan.root / "index.html").read_text()
    assert 'id="claims"' in page
    assert "Label smoothing lowers the teacher’s 1−S" in page
    assert "distils a better student" not in page


def test_one_seed_of_teachers_that_saw_other_data_recommends_nothing(fake_study):
    plan = fake_study(students=[], seeds=[0])
    path = plan.folder(plan.runs[0]) / JOB
    job = json.loads(path.read_text())
    write_teachers_report(plan)
    assert read_record(plan.root).recommendation.sentence.startswith("Distil from")
    path.write_text(json.dumps({**job, "data": {**job["data"], "sha256": "1" * 64}}))
    write_teachers_report(plan)
    said = read_record(plan.root).recommendation.sentence
    assert said == "No recommendation: the data changed within the study."


def test_a_difference_too_small_to_matter_is_a_part_of_the_answer(copied, tmp_path, capsys):
    changed(lambda content: content["headline"].update(verdict="too small to matter"))(copied)
    assert main(["index", str(copied), "--output", str(tmp_path / "i.html")]) == 0
    assert "0 contradict it, in 1 the difference is too small to matter, and 0 cannot tell" in (
        capsys.readouterr().out
    )


def test_a_headline_of_the_same_runs_is_no_second_one(copied, studies, tmp_path, capsys):
    assert main(["index", str(copied), *map(str, studies), "--output", str(tmp_path / "i.html")]) == 0
    said = capsys.readouterr().out
    assert "and 2 cannot tell. 1 study has the same runs behind the headline as another. 2 studies" in said
    assert "2 studies add no new teachers. 2 runs" in said


def test_a_setting_without_an_interval_is_counted(copied, tmp_path):
    changed(lambda content: content["findings"][1].update(low=None))(copied)
    assert read_record(copied).findings[1].claim == "better-student"
    assert main(["index", str(copied), "--output", str(tmp_path / "i.html")]) == 0
    assert "so not drawn: 1." in (tmp_path / "i.html").read_text()


def test_claims_that_take_several_studies_have_a_section(studies, tmp_path, fake_study_at):
    """Studies of one student on the same images, whose teachers make a trend together; one was moved."""
    folders = []
    for number, names in enumerate(("ab", "cd")):
        teachers = [(name, "teacher.yaml") for name in names]
        changes = {"students": [("small", "student.yaml")], "teachers": teachers, "seeds": [0, 1]}
        plan = fake_study_at(tmp_path / str(number))(per_class=20, **changes)
        write_report(plan)
        folders.append(plan.root)
    shutil.move(folders[1], tmp_path / "moved")
    folders[1] = tmp_path / "moved"
    assert main(["index", *map(str, [*folders, studies[2]]), "--output", str(tmp_path / "i.html")]) == 0
    html = (tmp_path / "i.html").read_text()
    section = html[html.index('id="claims-together"') :].split("</section>")[0]
    assert "Better teachers teach better" in section
    assert "4 networks" in section or "differ by little more" in section
    assert "The 0 tests" not in section
    assert main(["index", str(folders[0]), str(studies[2]), "--output", str(tmp_path / "j.html")]) == 0
    assert "claims-together" not in (tmp_path / "j.html").read_text()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / VERDICTS_FILE).unlink(), "contains no study"),
        (lambda folder: (folder / "index.html").unlink(), "has no page"),
        (lambda folder: (folder / VERDICTS_FILE).write_text("[" * 100_000), "is damaged"),
        (lambda folder: (folder / VERDICTS_FILE).write_bytes(b'{"title": "\xff"}'), "is damaged"),
        (changed(lambda c: c["findings"][0].update(estimate=float("inf"))), "is damaged"),
        (changed(lambda c: c.update(format=2)), "another version"),
        (changed(lambda c: c["findings"][0].update(verdict="perhaps")), "findings.0.verdict"),
        (changed(lambda c: c.pop("seeds")), "(seeds: Field required)"),
    ],
)
def test_a_folder_without_a_study_is_one_line_and_no_page(copied, tmp_path, capsys, damage, said):
    damage(copied)
    output = tmp_path / "all.html"
    assert main(["index", str(copied), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lskd: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert str(copied) in error
    assert not output.exists()


def test_a_studys_own_page_is_not_overwritten(studies, capsys):
    page = studies[0] / "index.html"
    before = page.read_bytes()
    assert main(["index", str(studies[1]), "--output", str(page)]) == 2
    assert "a study's own page" in capsys.readouterr().err
    assert page.read_bytes() == before


def test_what_cannot_be_written_is_one_line(studies, tmp_path, capsys):
    assert main(["index", str(studies[0]), "--output", str(tmp_path)]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_later_version_adds_is_passed_over(copied, tmp_path):
    changed(lambda c: c["findings"][0].update(power=0.8))(copied)
    assert main(["index", str(copied), "--output", str(tmp_path / "i.html")]) == 0


def test_a_study_with_a_failed_run_has_no_verdict_and_says_why(fake_study_at, fail, tmp_path, capsys):
    plan = fake_study_at(tmp_path)(seeds=[0, 1], students=[("small", "student.yaml")], per_class=20)
    fail(plan, plan.runs[0], "epoch 3: the training loss is nan")
    write_report(plan)
    output = tmp_path / "all.html"
    assert main(["index", str(plan.root), "--output", str(output)]) == 0
    assert "1 study has no verdict, because runs failed. 2 runs failed." in capsys.readouterr().out
    (row,) = rows_of(output)
    assert (row[1], row[-1]) == ("– no verdict", "2 of 8")
    assert "2 of 8 runs failed." in row[0]
