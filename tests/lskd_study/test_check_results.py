"""`lskd study --check-results`: published numbers are those that their files give, and no others."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from lskd import LskdError
from lskd_study.claims import judge
from lskd_study.claims.recommendation import recommend
from lskd_study.cli.main import main
from lskd_study.pages.page import interval_text
from lskd_study.pages.study import write_report
from lskd_study.pages.tables import runs_csv, table_csv, table_rows
from lskd_study.pages.verdicts import study_record
from lskd_study.results.read import read_results
from lskd_study.stats.intervals import Part, parts_interval
from lskd_study.stats.sequential import looks
from lskd_study.stats.trends import METHOD
from lskd_study.study import check_results

pytestmark = pytest.mark.unit

TRAINER = {"in_chans": 1, "img_size": 32, "epochs": 5}
MATRIX = {
    "smoothing": [0.0, 0.1, 0.2],
    "seeds": [0, 1, 2, 3],
    "temperatures": [1.0, 4.0],
    "hard_weights": [0.0, 0.5],
    "controls": ["hard", "smoothed"],
}


NETWORKS = {"teachers": "resnet18", "students": "resnet10t"}


@pytest.fixture(scope="module")
def study(fake_study_at, tmp_path_factory):
    """A simulated study with every kind of contrast but trends over networks, and what is published of it."""
    root = tmp_path_factory.mktemp("published")
    networks = {role: [(name, f"{role[:-1]}.yaml")] for role, name in NETWORKS.items()}
    plan = fake_study_at(root)(effect=0.5, **MATRIX, **networks)
    study = {
        "title": "Published",
        "ecosystem": "timm",
        "data": {"path": "data", "num_classes": 4},
        "output": "out",
        "smoothing": {"values": MATRIX["smoothing"], "convention": "paper"},
        **{name: MATRIX[name] for name in MATRIX if name != "smoothing"},
        **{role: [{"model": name, "config": f"{role[:-1]}.yaml"}] for role, name in NETWORKS.items()},
    }
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    for role in NETWORKS:
        (root / f"{role[:-1]}.yaml").write_text(yaml.safe_dump(TRAINER))
    write_report(plan)
    folder = root / "results" / "one"
    folder.mkdir(parents=True)
    for name in ("verdicts.json", "runs.csv", "table.csv", "index.html"):
        shutil.copy(plan.root / name, folder)
    shutil.rmtree(plan.root)
    return root


@pytest.fixture
def published(study, tmp_path, monkeypatch):
    shutil.copytree(study, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results" / "one"


def check(published, capsys):
    """Return the exit status and what was said."""
    status = main(["study", "--check-results", str(published.parent)])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_what_a_study_wrote_is_what_its_files_give(published, capsys):
    findings = json.loads((published / "verdicts.json").read_text())["findings"]
    alone = [one for one in findings if "separation" in one["quantity"] or one["claim"] == "same-direction"]
    said = f"1 study: {len(findings)} findings as published, {len(findings) - len(alone)} of them from"
    assert check(published, capsys) == (0, f"{said} their runs' values\n")
    assert {one["verdict"] for one in findings} >= {"supported", "cannot tell", None}
    shutil.rmtree(published)
    assert check(published, capsys)[0] == 2


NUMBERS = ["estimate", "low", "high", "p", "p_holm", "verdict"]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_of_a_finding_counts(published, capsys, name):
    """Each of some claims, together all of them."""
    path = published / "verdicts.json"
    whole = path.read_text()
    findings = json.loads(whole)["findings"]
    of_each_claim = {one["claim"]: place for place, one in enumerate(findings)}
    for claim, place in list(of_each_claim.items())[NUMBERS.index(name) :: 3]:
        changed = json.loads(whole)
        one = changed["findings"][place]
        if one[name] is None:
            continue
        words = {"supported": "cannot tell"}
        one[name] = words.get(one[name], "supported") if name == "verdict" else one[name] * 1.001 + 1e-6
        path.write_text(json.dumps(changed))
        status, said = check(published, capsys)
        assert status == 2, claim
        assert f"{claim}, {one['setting']['words']}: " in said


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("rank correlation", {"estimate": 0.77}),
        ("rank correlation", {"measure": "ece"}),
        ("regret", {"estimate": 0.77}),
        ("regret", {"picked": "d"}),
        ("regret", {"values": [[1, 2]] * 3}),
        ("regret", {"values": [[1, 2]] * 4}),
        ("regret", {"measure": "nothing"}),
    ],
)
def test_how_measures_rank_teachers_follows_from_the_teachers_values(published, capsys, kind, change):
    path = published / "verdicts.json"
    record = json.loads(path.read_text())
    one = next(one for one in record["measures"] if (one["measure"], one["kind"]) == ("nll", kind))
    assert len(one["values"]) == (3 if kind == "regret" else 0)
    one |= change
    path.write_text(json.dumps(record))
    status, said = check(published, capsys)
    assert status == 2
    assert "does not rank the teachers" in said or "is damaged" in said


@pytest.mark.parametrize("part", ["sentence", "reason"])
def test_what_is_recommended_follows_from_the_verdicts(published, capsys, part):
    path, page = published / "verdicts.json", published / "index.html"
    whole = path.read_text()
    record = json.loads(whole)
    said = record["recommendation"][part]
    record["recommendation"][part] = "Distil from any teacher."
    path.write_text(json.dumps(record))
    assert f"the verdicts give another {part}: {said}" in check(published, capsys)[1]
    path.write_text(whole)
    page.write_text(page.read_text().replace(said, "Distil from any teacher."))
    assert f"the recommendation's {part} is not on the page" in check(published, capsys)[1]


@pytest.mark.parametrize("column", ["top1", "one_minus_s", "train_ce"])
def test_a_run_with_another_value(published, capsys, column):
    table = pd.read_csv(published / "runs.csv")
    chosen = table.role == ("teacher" if column == "one_minus_s" else "student")
    table.loc[chosen, column] += 0.01 * np.arange(chosen.sum())
    table.to_csv(published / "runs.csv", index=False)
    status, said = check(published, capsys)
    assert status == 2
    assert "runs.csv gives" in said


def test_a_page_of_another_run_and_a_file_that_asks_for_less(published, capsys, tmp_path):
    page = published / "index.html"
    whole = page.read_text()
    page.write_text(re.sub(r"[+−]\d+\.\d+ to", "+0.00 to", whole))
    assert "the interval is not on the page" in check(published, capsys)[1]
    page.write_text(whole)
    study = yaml.safe_load((tmp_path / "study.yaml").read_text())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"seeds": [0, 1, 2]}))
    assert "seeds is [0, 1, 2, 3], in study.yaml it is" in check(published, capsys)[1]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"temperatures": [1.0]}))
    status, said = check(published, capsys)
    assert status == 2
    assert "Traceback" not in said


def test_what_the_study_does_not_ask_for_and_files_that_are_damaged(published, capsys, tmp_path):
    whole = {path: path.read_bytes() for path in published.iterdir()}
    record = json.loads(whole[published / "verdicts.json"])
    supported = next(n for n, one in enumerate(record["findings"]) if one["verdict"] == "supported")

    def refused(message, **changes):
        """Of the whole record, or with ``at`` of one finding."""
        changed = json.loads(json.dumps(record))
        at = changes.pop("at", None)
        (changed if at is None else changed["findings"][at]).update(changes)
        (published / "verdicts.json").write_text(json.dumps(changed))
        status, said = check(published, capsys)
        (published / "verdicts.json").write_bytes(whole[published / "verdicts.json"])
        assert (status, message in said) == (2, True), said

    findings, (first, second, *others) = record["findings"], record["findings"]
    refused("are not those of study.yaml", findings=[second, first, *others])
    refused(f"{second['claim']}, {second['setting']['words']} is missing", findings=[first, *others])
    refused("are not those of study.yaml", findings=[first, second, second, *others])
    refused("the headline", headline=record["headline"] | {"verdict": "contradicted"})
    refused("is not in study.yaml", at=0, setting=first["setting"] | {"smoothing": 0.3})
    refused("the verdict is 'no verdict'", at=supported, verdict="no verdict")
    refused("its parts give nan", at=supported, parts=[], method="t interval")
    refused("its parts give", at=supported, parts=[], method="rule of three", p=0.0)
    known = findings[supported]
    refused("null is", at=supported, null=known["null"] - 1)
    refused("seeds are 5", at=supported, seeds=5)
    damaged = "verdicts.json is damaged"
    refused(damaged, at=supported, parts=[[-1.0, 3]])
    refused(damaged, at=supported, parts=[[1.0, 10**400]])
    refused(damaged, at=supported, estimate=1e300)
    refused("teachers alone", kind="teachers")
    refused("last_epochs", last_epochs=2)
    refused("looks is [4, 9]", looks=[4, 9])
    refused("of no look", looks=[0])
    refused("its parts give", looks=list(looks(4, 9)))  # whose intervals are wider
    refused("of no look", looks=list(looks(4, 9)), seeds=[0, 1, 2, 3, 4])
    refused("of no look", looks=list(looks(4, 9)), seeds=[0, 1])

    def damage(name, content, message):
        (published / name).write_bytes(content)
        status, said = check(published, capsys)
        (published / name).write_bytes(whole[published / name])
        assert (status, message in said) == (2, True), said

    damage("index.html", b"\xff\xfe", "the interval is not on the page")
    runs = whole[published / "runs.csv"].decode()
    damage("runs.csv", runs.replace("train_ce", "other").encode(), "has no column train_ce")
    damage("runs.csv", re.sub(r"\d+\.\d+", "many", runs).encode(), "runs.csv: 'many' is no number")
    damage("table.csv", re.sub(rb"\d+\.\d{4,}", b"many", whole[published / "table.csv"]), "no number")
    lost = pd.read_csv(published / "runs.csv").assign(train_ce=np.nan)
    damage("runs.csv", lost.to_csv(index=False).encode(), "runs.csv gives nan")
    for name in ("runs.csv", "table.csv", "index.html"):
        (published / name).unlink()
        assert f"{name} cannot be read" in check(published, capsys)[1]
        (published / name).write_bytes(whole[published / name])
    assert check(published, capsys)[0] == 0


def test_what_is_said_of_the_method_hides_no_variance(published, capsys):
    """A quarter of what seeds vary, with all that follows from it, in a study that pools nothing."""
    record = json.loads((published / "verdicts.json").read_text())
    one = next(one for one in record["findings"] if one["quantity"] == "train_kl")
    (variance, df), *_ = one["parts"]
    made = parts_interval(one["estimate"], [Part(variance / 4, df)], (one["seeds"], one["samples"]), "")
    one |= {"parts": made.parts, "low": made.low, "high": made.high, "p": made.p_value}
    one["method"] += "; seed variance pooled over 2 settings (moderated t)"
    (published / "verdicts.json").write_text(json.dumps(record))
    with (published / "index.html").open("a") as page:
        page.write(interval_text(made, one["unit"]))
    status, said = check(published, capsys)
    assert (status, "the standard error over seeds is" in said) == (2, True), said


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Publish a study whose plan is at hand, with its intervals and advice alone on its page; check it."""

    def check_plan(plan):
        results = read_results(plan)
        findings, folder = judge(results), tmp_path / "published"
        advice = recommend(results, findings)
        folder.mkdir()
        texts = {
            "verdicts.json": study_record(results, findings, "", recommendation=advice).text(),
            "runs.csv": runs_csv(results),
            "table.csv": table_csv(table_rows(results)),
            "index.html": " ".join(
                [str(advice), *(interval_text(one.interval, one.claim.unit) for one in findings)]
            ),
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
        monkeypatch.setattr(check_results, "make_plan", lambda *_: plan)
        return {one.claim.id: one for one in findings}, check_results.check_results(folder)

    return check_plan


SMALL = {"students": [("small", "student.yaml")], "per_class": 12, "noise": 0.1}


def test_one_seed_is_no_verdict_whatever_the_method_is_called(fake_study, publish, tmp_path):
    """A trend over networks has one, of samples alone."""
    publish(fake_study(effect=2.0, seeds=[0], students=SMALL["students"]))
    path = tmp_path / "published" / "verdicts.json"
    record = json.loads(path.read_text())
    for one in record["findings"]:
        if one["claim"] == "better-student":
            one |= {"method": METHOD, "verdict": "supported", "p_holm": one["p"]}
            record["headline"]["verdict"] = "supported"
    path.write_text(json.dumps(record))
    with pytest.raises(LskdError, match="its parts give"):
        check_results.check_results(tmp_path / "published")


def test_a_direction_that_samples_leave_open_is_none_that_seeds_alone_would_give(fake_study, publish):
    found, said = publish(fake_study(seed=7, **SMALL))
    assert found["same-direction"].interval is None
    assert "8 of them from" in said


def test_differences_of_rounded_values_differ_by_more_than_one_of_them(fake_study, publish):
    many = {**MATRIX, "seeds": [0], "controls": []}
    assert "findings as published" in publish(fake_study(**many, students=SMALL["students"]))[1]


def test_perplexities_have_eight_digits_as_accuracies_have(translation_study, publish):
    many = {**MATRIX, "seeds": [0, 1, 2]}
    found, said = publish(translation_study(sentences=30, perplexity_effect=4.0, **many))
    assert found["worse-perplexity"].interval.estimate > 100
    assert "findings as published" in said


def test_classes_of_two_images_have_no_difference_in_stability(fake_study, publish):
    found, _ = publish(fake_study(per_class=2, students=SMALL["students"]))
    assert found["lower-instability"].interval is None


def test_seeds_that_agree_vary_as_their_samples_do(fake_study, leave, publish):
    """Their differences are the same but for the digits of runs.csv."""
    plan = fake_study(per_class=15, students=SMALL["students"], seeds=[0, 1])
    results, (labels, wrong) = (
        read_results(plan),
        (np.repeat(np.arange(4), 15), {0: ([5], [0, 1]), 1: ([6, 7], [2, 3, 4])}),
    )
    for run in plan.runs:
        if run.role == "student":
            logits = 3 * np.eye(4)[labels]
            logits[wrong[run.seed][int(run.smoothing > 0)]] *= -1
            leave(
                plan,
                run,
                logits,
                labels,
                {name: own[-1] for name, own in results.finished[run.id].curves.items()},
            )
    assert publish(plan)[0]["better-student"].interval.parts[0].variance > 0.01


def test_a_study_of_which_a_run_failed_and_one_that_was_looked_at(fake_study, fail, publish, tmp_path):
    plan = fake_study(students=SMALL["students"])
    fail(plan, next(run for run in plan.runs if run.role == "student"), "diverged in epoch 2")
    assert publish(plan)[0]["better-student"].verdict == "no verdict"
    text = (tmp_path / "published" / "verdicts.json").read_text()
    (tmp_path / "published" / "verdicts.json").write_text(text.replace("no verdict", "cannot tell"))
    with pytest.raises(LskdError, match="the verdict is 'cannot tell'"):
        check_results.check_results(tmp_path / "published")
    shutil.rmtree(tmp_path / "published")
    publish(dataclasses.replace(fake_study(students=SMALL["students"]), looks=[3, 5]))
