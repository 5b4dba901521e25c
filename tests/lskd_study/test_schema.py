from pathlib import Path

import pytest

from lskd import LskdError
from lskd_study.plan.schema import load_study, read_trainer_config
from lskd_study.plan.teacher_list import load_teachers
from timm_ls_kd.run_settings import read_config

pytestmark = pytest.mark.unit

GOOD = """\
title: A study
data:
  path: data/x
  num_classes: 10
output: runs/x
smoothing:
  values: [0, 0.1]
seeds: [0, 1, 2]
teachers:
  - {model: resnet18, config: t.yaml}
students:
  - model: resnet10t
    config: s.yaml
"""


def load(tmp_path: Path, text: str):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return load_study(path)


def test_tables_of_the_paper_are_one_or_several(tmp_path):
    assert load(tmp_path, GOOD).papers_tables == []
    assert load(tmp_path, GOOD + "paper: Table 8\n").papers_tables == ["Table 8"]
    assert load(tmp_path, GOOD + "paper: [Table 2, Fig. 5]\n").papers_tables == ["Table 2", "Fig. 5"]


def test_a_good_file_gets_the_papers_defaults(tmp_path):
    study = load(tmp_path, GOOD)
    assert (study.temperatures, study.hard_weights) == ([1.0], [0.0])
    assert study.smoothing.convention == "paper"


# What is added to the file, and what is said of its line.
FIGURE = "published: {{source: A, figures: [{{student: {}, smoothing: {}, {}: 70}}]}}"
ADDED = [
    ("temperatures: [0]", "temperatures.0: .*greater than 0"),
    ("hard_weights: [1.5]", "hard_weights.0: .*less than or"),
    ("paper: Tabel 8", r"paper: 'Tabel 8' is no table .*did you mean 'Table 8'\?"),
    ("paper: [Table 2, Table 1]", "paper: 'Table 1' is shown where teachers are compared alone"),
    ("ecosystem: keras", "ecosystem: .*'timm'"),
    (
        FIGURE.format("resnet18", 0, "top1"),
        "published.figures.0.student: .*; it has resnet10t",
    ),
    (FIGURE.format("resnet10t", 0.2, "top1"), "published.figures.0.smoothing: .*; it has 0.0, 0.1"),
    (FIGURE.format("resnet10t", 0, "top2"), r"unknown key 'top2'; did you mean 'top1'\?"),
]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("output: runs/x", "zzz: 1", "5: unknown key 'zzz'; valid here: title, "),
        ("num_classes: 10", "num_classes: ten", "4: data.num_classes: .*integer.*'ten'"),
        ("num_classes: 10", "num_classes: true", "4: data.num_classes: .*integer"),
        ("seeds: [0, 1, 2]", "seeds: []", "8: seeds: .*at least 1"),
        ("seeds: [0, 1, 2]", "seeds: [0, 1, 1]", "8: seeds: 1 given twice"),
        ("seeds: [0, 1, 2]", "seeds: 3", "8: seeds: .*list"),
        ("seeds: [0, 1, 2]\n", "", "1: 'seeds' is missing"),
        ("seeds: [0, 1, 2]", "seeds: [0, 1", "9: .*fix the YAML"),
        ("[0, 0.1]", "[0, 1.0]", "7: smoothing.values.1: .*less than 1.*1.0"),
        ("[0, 0.1]", "[-0.1, 0]", "7: smoothing.values.0: .*greater than or equal to 0"),
        ("[0, 0.1]", "[0.1]", "7: smoothing.values: a study compares at least two"),
        ("title: A study", "title: A study\ntitle: B", "2: key 'title' is given twice"),
        ("title: A study", "title: !!python/object/apply:os.system ['true']", "1: "),
        *(("output: runs/x", f"output: runs/x\n{line}", f"6: {said}") for line, said in ADDED),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_line(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(LskdError, match=f"study.yaml:{message}") as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    with pytest.raises(LskdError, match="a study file is a mapping"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("epochs: 2020-01-01\n", "leave out dates,"),
        ("lr: .nan\n", r".inf and .nan$"),
        ("a: {1: 2}\n", "put keys such as 1, on and ~ in quotes"),
        ("on: 2\n", "on and ~"),
        ("a: {~: 2}\n", "on and ~"),
        ("a: !!omap [b: 1]\n", r"tags \(!!omap\)"),
    ],
)
def test_a_trainers_file_holds_plain_values_only(tmp_path, text, advice):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(LskdError, match=rf"contains more than numbers, text, lists and mappings.*{advice}"):
        read_trainer_config(tmp_path / "t.yaml")


BILLION = "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}' if level else 'x'] * 9)}]\n" for level in range(15)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION, "too much with its aliases"),
        ("model_kwargs: &a {x: *a}\n", "within its own anchor"),
        ("mean: " + 2000 * "[" + 2000 * "]", "nested too deeply"),
    ],
)
def test_aliases_and_depth_have_a_bound_in_every_file_of_a_study(tmp_path, text, message):
    """Nine aliases of nine aliases of ...: 10 lines, 10^14 numbers."""
    (tmp_path / "t.yaml").write_text(text)
    for read in (read_trainer_config, load_study, load_teachers, read_config):
        with pytest.raises(LskdError, match=message) as caught:
            read(tmp_path / "t.yaml")
        assert "\n" not in str(caught.value)


def test_a_missing_or_binary_study_file(tmp_path):
    with pytest.raises(LskdError, match=r"none\.yaml cannot be read as a study file"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LskdError, match="not a text file"):
        load_study(tmp_path / "b.yaml")


def test_a_trainers_file_may_not_set_what_the_study_sets(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("epochs: 3\n")
    assert read_trainer_config(path) == {"epochs": 3}
    path.write_text("epochs: 3\nkd-temperature: 4\nsmoothing: 0.1\n")
    with pytest.raises(LskdError, match="sets kd_temperature, smoothing, which the study sets"):
        read_trainer_config(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(LskdError, match="not a mapping"):
        read_trainer_config(path)
    with pytest.raises(LskdError, match="cannot be read as a trainer's file"):
        read_trainer_config(tmp_path / "none.yaml")
