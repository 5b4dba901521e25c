"""`lskd study --check-results`: published numbers are those that their files give, and no others."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from lskd_study.cli.main import main
from lskd_study.pages.study import write_report

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
    alone = [one for one in findings if one["quantity"] == "separation"]
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
