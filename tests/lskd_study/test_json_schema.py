"""The JSON schema that ships for editors, by an independent validator, against the model and all recipes."""

import contextlib
import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from lskd import LskdError
from lskd_study.cli import main as cli
from lskd_study.plan.json_schema import FILE, modeline, study_schema
from lskd_study.plan.recipes import catalogue, recipes_folder
from lskd_study.plan.schema import load_study
from lskd_study.plan.teacher_list import load_teachers

pytestmark = pytest.mark.unit

STUDY = {
    "title": "T",
    "data": {"path": "d", "num_classes": 3},
    "output": "out",
    "smoothing": {"values": [0, 0.1]},
    "seeds": [0, 1],
    "teachers": [{"model": "resnet18", "config": "t.yaml"}],
    "students": [{"model": "resnet10t", "config": "s.yaml"}],
}
TEACHERS = {
    "kind": "stability",
    "title": "T",
    "output": "o",
    "teachers": [{"name": "a", "logits": "a.npz"}],
}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    schema = json.loads((recipes_folder() / FILE).read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_the_shipped_file_is_the_models(capsys):
    assert cli.main(["study", "--schema"]) == 0
    shipped = (recipes_folder() / FILE).read_text(encoding="utf-8")
    assert shipped == capsys.readouterr().out, f"lskd study --schema > recipes/{FILE} makes it again"
    assert json.loads(shipped) == study_schema()


def described(schema: object, path: str = "") -> list[str]:
    """Return the keys that have no description."""
    if isinstance(schema, list):
        return [name for item in schema for name in described(item, path)]
    if not isinstance(schema, dict):
        return []
    missing = []
    for key, value in schema.items():
        if key == "properties":
            missing += [f"{path}.{name}" for name, own in value.items() if "description" not in own]
        missing += described(value, f"{path}/{key}")
    return missing


def test_every_key_is_described():
    schema = study_schema()
    assert described(schema) == []
    spoilt = copy.deepcopy(schema)
    del spoilt["$defs"]["Study"]["properties"]["seeds"]["description"]
    assert described(spoilt) == ["/$defs/Study.seeds"]


RECIPES = [recipe for recipe in catalogue() if recipe.kind != "run"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_is_valid_and_names_the_schema(validator, recipe):
    text = recipe.path.read_text(encoding="utf-8")
    assert list(validator.iter_errors(yaml.safe_load(text))) == []
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(.+)$", text, re.MULTILINE)
    assert (recipe.path.parent / named).resolve() == (recipes_folder() / FILE).resolve()
    assert "yaml-language-server" not in recipe.header


def test_an_installed_schema_is_named_by_its_place():
    assert Path(modeline().partition("$schema=")[2]) == (recipes_folder() / FILE).resolve()


# What is changed (... leaves a key out), and whether that is accepted.
STUDIES = [
    ({}, True),
    ({"ecosystem": "fairseq", "data": {"path": "d"}}, True),
    (
        {"ecosystem": "fairseq", "data": {"path": "d", "prepare": "ding", "options": {"held-out": 3}}},
        True,
    ),
    ({"ecosystem": "fairseq", "data": {"path": "d"}, "paper": [], "published": None}, True),
    ({"data": {"path": "d", "num_classes": 3, "options": {}}}, True),
    ({"ecosystem": "mmcls"}, True),
    ({"ecosystem": "keras"}, False),
    ({"data": {"path": "d", "num_classes": 1}}, False),
    ({"data": {"path": "d", "num_classes": 3, "prepare": "noise", "options": {"source": "x"}}}, True),
    ({"data": {"path": "d", "num_classes": 10, "prepare": "digits"}}, True),
    ({"data": {"path": "d", "num_classes": 10, "prepare": "digitz"}}, False),
    ({"smoothing": {"values": [0]}}, False),
    ({"smoothing": {"values": [0, 0]}}, False),
    ({"smoothing": {"values": [0, 1]}}, False),
    ({"smoothing": {"values": [0, 0.1], "convention": "mine"}}, False),
    ({"seeds": []}, False),
    ({"seeds": [0, 0]}, False),
    ({"seeds": [-1]}, False),
    ({"temperatures": [0]}, False),
    ({"temperatures": [0.5, 2]}, True),
    ({"hard_weights": [1.1]}, False),
    ({"teachers": []}, False),
    ({"teachers": [{"model": "resnet18"}]}, False),
    ({"students": []}, True),
    ({"controls": []}, True),
    ({"controls": ["hard", "smoothed"]}, True),
    ({"controls": ["hard", "hard"]}, False),
    ({"controls": ["soft"]}, False),
    ({"controls": [], "students": ...}, True),
    ({"margin": 0}, False),
    ({"tracker": "mlflow"}, False),
    ({"ecosystem": "mmcls", "controls": ["hard", "real"]}, True),
    ({"resources": {"threads": 0}}, False),
    ({"resources": {"threads": 2, "extra": {"mem_mb": 100}}}, True),
    ({"resources": {"thread": 2}}, False),
    ({"sedes": [1]}, False),
    ({"title": ""}, False),
    ({"kind": "stability"}, False),
    ({"paper": "Table 8"}, True),
    ({"paper": ["Table 2", "Fig. 5"]}, True),
    ({"paper": "Table 5"}, False),
    ({"paper": ["Tabel 8"]}, False),
    ({"published": {"source": "A", "figures": []}}, False),
]
# What the schema accepts, because no key is wrong by itself, and the model refuses.
TOGETHER = [
    {"ecosystem": "fairseq"},
    {"ecosystem": "fairseq", "data": {"path": "d"}, "students": []},
    {"ecosystem": "fairseq", "data": {"path": "d", "prepare": "digits"}},
    {"ecosystem": "fairseq", "data": {"path": "d"}, "paper": "Table 8"},
    {"data": {"path": "d", "num_classes": 3, "options": {"seed": 1}}},
    {"data": {"path": "d"}},
    {"controls": ["hard"], "students": []},
    {"controls": ["hard"], "students": ...},
    {"controls": ["real"]},
]
LISTS = [
    ({}, True),
    ({"kind": "others"}, False),
    ({"teachers": []}, False),
    ({"data": {"path": "d", "spilt": "x"}}, False),
]


@pytest.mark.parametrize(
    ("read", "content", "accepted"),
    [(load_study, STUDY | change, accepted) for change, accepted in STUDIES]
    + [(load_teachers, TEACHERS | change, accepted) for change, accepted in LISTS],
)
def test_model_and_schema_agree(validator, tmp_path, read, content, accepted):
    content = {key: value for key, value in content.items() if value is not ...}
    assert validator.is_valid(content) == accepted
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with contextlib.nullcontext() if accepted else pytest.raises(LskdError):
        read(tmp_path / "study.yaml")


@pytest.mark.parametrize("change", TOGETHER)
def test_which_keys_go_together_the_model_says(validator, tmp_path, change):
    content = {key: value for key, value in (STUDY | change).items() if value is not ...}
    assert validator.is_valid(content)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(LskdError, match=r"\A.*study\.yaml:[1-9]\d*: .+\Z"):
        load_study(tmp_path / "study.yaml")
