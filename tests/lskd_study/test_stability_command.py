"""`lskd stability` in this process, on files of logits."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors
from scipy import special

from lskd_study.claims.measures import ACCURACY, MEASURES, STABILITIES

pytestmark = pytest.mark.unit

CLASSES, IMAGES = 5, 24


def arrays(seed=0, strength=3.0, samples=CLASSES * IMAGES, classes=CLASSES):
    generator = np.random.default_rng(7)
    labels = np.arange(samples) % classes
    logits = generator.normal(size=(samples, classes)) + 0.3 * np.random.default_rng(seed).normal(
        size=(samples, classes)
    )
    logits[np.arange(samples), labels] += strength
    return {"logits": logits.astype(np.float32), "labels": labels}


@pytest.fixture
def files(scene):
    np.savez("a.npz", **arrays())
    np.savez("b.npz", **arrays(1, 2.0))
    return scene


def measured(files, *words):
    """What is written as JSON, an object for each teacher."""
    files.run("stability", *words, "--json", "out.json")
    return json.loads(Path("out.json").read_text())


TWO = ("--logits", "a.npz", "--logits", "b.npz")


def test_two_files_side_by_side(files):
    out = files.run("stability", *TWO, "--json", "out.json", "--csv", "out/t.csv", "--replicates", "300")
    first, second = json.loads(Path("out.json").read_text())
    for found, stored in ((first, arrays()), (second, arrays(1, 2.0))):
        p = special.softmax(stored["logits"].astype(np.float64), axis=1)
        own = p[np.arange(len(p)), stored["labels"]]
        assert found["top1"] == pytest.approx(100 * (p.argmax(1) == stored["labels"]).mean())
        std = np.mean([own[stored["labels"] == c].std(ddof=1) for c in range(CLASSES)])
        assert found["one_minus_stability"]["target_std"] == pytest.approx(std, abs=1e-6)
        assert (found["top5"], 0 <= found["ece"] <= 1) == (100, True)
    assert (first["name"], second["name"]) == ("a", "b")
    assert {d["from"] for d in second["differences"]} == {"a"}
    with Path("out/t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["teacher"] for row in rows} == {"a", "b"}
    # The texts of a study's page.
    sources = {one.id: one.source for one in (ACCURACY, *MEASURES, *STABILITIES)}
    assert {row["quantity"]: row["source"] for row in rows if row["source"]} == first["sources"]
    assert first["sources"].items() <= sources.items()
    assert first["sources"].keys() >= {"top1", "nll", "aurc", "dark_knowledge", "target_std"}
    assert out.startswith("Distil from a, the more accurate.\n")  # the advice, before any table
    assert "top-1 accuracy" in out
    assert "95 % interval" in out


def test_selective_risk_and_dark_knowledge_are_measured_and_compared(files):
    found = measured(files, *TWO)
    spreads = []
    for teacher, stored in zip(found, (arrays(), arrays(1, 2.0)), strict=True):
        logits, labels = stored["logits"].astype(np.float64), stored["labels"]
        p, wrong = special.softmax(logits, axis=1), logits.argmax(1) != labels
        centred = logits - logits.mean(1, keepdims=True)
        for name, sure in (
            ("aurc", p.max(1)),
            ("aurc_normalised", centred.max(1) / np.linalg.norm(centred, 5, axis=1)),
        ):
            ranked = wrong[np.argsort(-sure)]
            area = np.mean([ranked[: k + 1].mean() for k in range(len(ranked))])
            assert teacher[name] == pytest.approx(100 * area), name
        spreads.append(np.mean([np.var(np.delete(row, c)) for row, c in zip(p, labels, strict=True)]))
        assert teacher["dark_knowledge"] == pytest.approx(spreads[-1])
    compared = {one["quantity"]: one for one in found[1]["differences"]}
    assert compared["aurc"]["estimate"] == pytest.approx(found[1]["aurc"] - found[0]["aurc"])
    ratio = compared["dark_knowledge"]
    assert (ratio["ratio"], "ratio" in compared["aurc"]) == (True, False)
    assert ratio["estimate"] == pytest.approx(spreads[1] / spreads[0])
    for one in (ratio, compared["aurc"], compared["aurc_normalised"]):
        assert one["low"] < one["estimate"] < one["high"]
    out = files.run("stability", *TWO, "--csv", "t.csv")
    assert f"× {ratio['estimate']:.3g}" in out
    with Path("t.csv").open(newline="") as file:
        assert "dark knowledge: variance of the wrong classes' probabilities (ratio)" in {
            row["meaning"] for row in csv.DictReader(file)
        }


def test_of_two_classes_there_is_no_dark_knowledge_and_of_bfloat16_there_is(files):
    for name in "cd":
        np.savez(f"{name}.npz", **arrays(classes=2))
    found = measured(files, "--logits", "c.npz", "--logits", "d.npz")
    assert [found[0][name] for name in ("aurc_normalised", "dark_knowledge")] == [None, None]
    assert not {"aurc_normalised", "dark_knowledge"} & {one["quantity"] for one in found[1]["differences"]}
    halves = {name: torch.from_numpy(array) for name, array in arrays().items()}
    save_tensors({**halves, "logits": halves["logits"].bfloat16()}, "half.safetensors")
    exact, half = measured(files, "--logits", "a.npz", "--logits", "half.safetensors")
    for name in ("aurc", "aurc_normalised", "dark_knowledge"):
        assert half[name] == pytest.approx(exact[name], rel=0.1)


def test_order_of_samples_does_not_matter(files):
    stored = arrays()
    order = np.random.default_rng(0).permutation(len(stored["labels"]))
    np.savez_compressed("shuffled.npz", **{name: array[order] for name, array in stored.items()})
    save_file({k: np.ascontiguousarray(v) for k, v in stored.items()}, "sorted.safetensors")
    one, two = measured(files, "--logits", "shuffled.npz", "--logits", "sorted.safetensors")
    for name in ("top1", "nll", "ece", "entropy", "aurc", "aurc_normalised", "dark_knowledge"):
        assert one[name] == pytest.approx(two[name], rel=1e-6)
    assert one["one_minus_stability"] == pytest.approx(two["one_minus_stability"], rel=1e-5)
    assert one["calibrated"] == pytest.approx(two["calibrated"], rel=1e-5)


def test_the_same_numbers_every_time_in_the_place_of_an_older_result(files):
    Path("out.json").write_bytes(b"\xff\xfe")
    assert measured(files, *TWO) == measured(files, *TWO)


def test_names_temperatures_and_correction(files):
    words = ("--logits", "a.npz", "--logits", "a.npz", "--name", "x", "--name", "y")
    x, y = measured(files, *words, "--temperature", "1", "--temperature", "8", "--small-class-correction")
    assert (x["name"], y["name"]) == ("x", "y")
    assert [mass["temperature"] for mass in x["target_mass"]] == [1, 8]
    assert x["small_class_correction"] is True
    assert x["target_mass"][1]["chance_like"] is True
    assert any("temperature 8" in line for line in x["warnings"])


def test_files_of_the_same_name_are_numbered(files):
    Path("c").mkdir()
    np.savez("c/a.npz", **arrays(1))
    found = measured(files, "--logits", "a.npz", "--logits", "c/a.npz", "--logits", "b.npz")
    assert [teacher["name"] for teacher in found] == ["a (1)", "a (2)", "b"]


def test_probabilities_in_the_place_of_logits_are_warned_of(files):
    stored = arrays()
    stored["logits"] = special.softmax(stored["logits"], axis=1)
    np.savez("p.npz", **stored)
    probabilities, logits = measured(files, "--logits", "p.npz", "--logits", "a.npz")
    assert any("before the softmax" in line for line in probabilities["warnings"])
    assert not any("softmax" in line for line in logits["warnings"])


# Bad input: one line, nothing written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.arange(120) % 5 + 1}, ("label", "sample 4", "5")),
        ({"logits": np.full((120, 5), np.nan, np.float32)}, ("sample 0", "finite")),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(files, change, words):
    np.savez("bad.npz", **{**arrays(), **change})
    line = files.refused("stability", "--logits", "a.npz", "--logits", "bad.npz", "--json", "out.json")
    for word in ("bad", *words):
        assert word in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("no teacher", "--logits", "--model")),
        (("--logits", "none.npz"), ("none.npz", "does not exist")),
        (("--logits", "a.npz", "--name", "x", "--name", "y"), ("--name",)),
        (("--logits", "a.npz", "--logits", "b.npz", "--name", "x", "--name", "x"), ("--name",)),
        (("--logits", "a.npz", "--temperature", "0"), ("--temperature",)),
        (("--logits", "a.npz", "--temperature", "nan"), ("--temperature",)),
        (("--logits", "a.npz", "--replicates", "5"), ("replicates",)),
        (("--logits", "a.npz", "--json", "a.npz/out.json"), ("cannot write",)),
        (("--logits", "a.npz", "--json", "."), ("cannot write",)),
        (("--logits", "a.npz", "--json", "/"), ("cannot write /: it is a folder",)),
        (("--logits", "a.npz", "--json", "n" * 300), ("cannot write", "File name too long")),
        (("--logits", "n" * 300), ("does not exist",)),
        (("--model", "test_resnet"), ("--data-dir",)),
        (("--logits", "a.npz", "--features"), ("--save-outputs",)),
        (("--model", "no_such_model", "--data-dir", "."), ("no_such_model",)),
        (
            ("--model", "test_resnet", "--checkpoint", "a.npz", "--checkpoint", "b.npz"),
            ("2 --checkpoint", "--list"),
        ),
        (("--logits", "a.npz", "--json", "b.npz", "--logits", "b.npz"), ("b.npz", "read from")),
        (("--logits", "a.npz", "--json", "x", "--csv", "x"), ("written twice",)),
        (("--logits", "a.npz", "--json", "pipe"), ("pipe", "no file")),
        (("--list", "none.yaml"), ("none.yaml",)),
        (("--logits", "a.npz", "--list", "none.yaml"), ("--list",)),
        (("--logits", "a.npz", "--output", "out"), ("--output is for a list",)),
        (("--logits", "a.npz", "--nonsense"), ("--nonsense",)),
    ],
)
def test_what_is_wrong_with_the_options_is_one_line(files, options, words):
    os.mkfifo("pipe")
    line = files.refused("stability", *options)
    for word in words:
        assert word in line


# A list of teachers


LIST = {
    "kind": "stability",
    "title": "Two",
    "output": "runs/two",
    "temperatures": [1, 4],
    "teachers": [
        {"name": "plain", "logits": "a.npz", "network": "ResNet-50", "smoothing": 0},
        {"name": "smoothed", "logits": "b.npz", "network": "ResNet-50", "smoothing": 0.1},
    ],
}


def write(**changes):
    with open("teachers.yaml", "w") as file:
        yaml.safe_dump({k: v for k, v in {**LIST, **changes}.items() if v is not None}, file, sort_keys=False)


@pytest.mark.parametrize("options", [(), ("--output", "runs/other")])
def test_a_list_of_teachers_has_a_page_and_the_papers_tables(files, options):
    write()
    files.run("stability", "--list", "teachers.yaml", *options)
    output = Path(options[1] if options else "runs/two")
    assert sorted(path.name for path in output.iterdir()) == [
        "index.html",
        "stability.csv",
        "stability.json",
        "table1.csv",
        "table10.csv",
        "verdicts.json",
    ]
    assert "0.3217" in (output / "table1.csv").read_text()  # the paper's ResNet-50 without smoothing
    assert "0.1733" in (output / "table10.csv").read_text()
    found = json.loads((output / "stability.json").read_text())
    assert [mass["temperature"] for mass in found[0]["target_mass"]] == [1, 4]


def test_a_list_writes_into_its_own_folder_alone(files):
    write()
    line = files.refused("stability", "--list", "teachers.yaml", "--json", "x.json")
    assert "leave out x.json" in line


def test_a_list_is_no_study_and_its_results_are_no_studys(files):
    write()
    line = files.refused("study", "teachers.yaml")
    assert "measure them with `lskd stability --list teachers.yaml`" in line
    Path("runs/two").mkdir(parents=True)
    Path("runs/two/plan.json").touch()
    assert "results of a study that trains" in files.refused("stability", "--list", "teachers.yaml")


TEACHER = LIST["teachers"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"title": None}, ("'title' is missing",)),
        ({"seeds": [1]}, ("unknown key 'seeds'",)),
        ({"seeds": [1], "kind": None}, ("is a study, not a list of teachers; run it with `lskd study",)),
        ({"teachers": []}, ("teachers",)),
        ({"temprature": [1]}, ("'temprature'", "did you mean 'temperatures'")),
        ({"data": {"path": "d", "spilt": "val"}}, ("'spilt'", "did you mean 'split'")),
        ({"teachers": [{**TEACHER, "chekpoint": "x"}]}, ("chekpoint", "did you mean 'checkpoint'")),
        (
            {"teachers": [{**TEACHER, "tolerance": {"acuracy": 1, "one_minus_s": 1}}]},
            ("'acuracy'", "did you mean 'accuracy'"),
        ),
        ({"teachers": [{"name": "a"}]}, ("one of model, config and logits",)),
        ({"teachers": [{**TEACHER, "model": "resnet18"}]}, ("one of model, config and logits",)),
        ({"teachers": [{**TEACHER, "checkpoint": "a.pth"}]}, ("need no checkpoint",)),
        ({"teachers": [{**TEACHER, "network": "ResNet-19"}]}, ("Table 1", "ResNet-18")),
        ({"teachers": [{**TEACHER, "smoothing": 1.5}]}, ("smoothing",)),
        ({"teachers": [TEACHER, TEACHER]}, ("'plain'",)),
        ({"temperatures": [0]}, ("temperatures",)),
        ({"teachers": [{"name": "gone", "logits": "gone.npz"}]}, ("gone.npz",)),
        ({"teachers": [TEACHER, {"name": "gone", "model": "resnet18", "checkpoint": "g.pth"}]}, ("g.pth",)),
    ],
)
def test_what_is_wrong_with_a_list_is_one_line(files, changes, words):
    write(**changes)
    line = files.refused("stability", "--list", "teachers.yaml")
    for word in words:
        assert word in line, line


def test_the_recipe_of_tables_1_and_10(scene):
    """Its header says what the paper prints; the rows that it names are those of public weights."""
    from lskd_study.paper.printed import load_tables
    from lskd_study.plan.recipes import find_study_file
    from lskd_study.plan.teacher_list import load_teachers

    path = find_study_file("recipes/stability/study.yaml")
    study = load_teachers(path)
    header = path.read_text().split("kind:")[0]
    public = [row for row in load_tables()["Table 1"].rows if row["weights"]]
    assert {entry.network for entry in study.teachers} == {row.name for row in public}
    for row in public:
        between = load_tables()["Table 10"].row(row.name).number("instability_without")
        (line,) = [line for line in header.splitlines() if f" {row.name} " in line]
        printed = [float(word) for word in line.split()[-4:]]
        columns = ("top1_without", "top5_without", "instability_without")
        assert printed == [*(row.number(column) for column in columns), between]
    line = scene.refused("stability", "--list", "recipes/stability/study.yaml")
    assert "data/imagenet" in line or "resnet18-f37072fd.pth" in line
