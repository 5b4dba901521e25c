"""The JSON schema of study files, for editors: generated from the model that reads them.

It ships as ``study.schema.json`` in the folder of recipes. In the vocabulary of draft 7, which editors know.
"""

import json
import re
from typing import Any, get_args

from lskd_study.data.options import TEXT
from lskd_study.plan.kinds import TRANSLATION, Control, Ecosystem, kind_of
from lskd_study.plan.recipes import recipes_folder
from lskd_study.plan.schema import Prepare, Study
from lskd_study.plan.teacher_list import TeacherList

FILE = "study.schema.json"


def study_schema() -> dict[str, Any]:
    """Return the schema of a study file, or of a list of teachers where it has a ``kind``."""
    definitions: dict[str, Any] = {}
    for model in (Study, TeacherList):
        own = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= own.pop("$defs", {})
        definitions[model.__name__] = own
    _refine(definitions)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A study of lskd",
        "type": "object",
        "if": {"required": ["kind"]},
        "then": {"$ref": "#/$defs/TeacherList"},
        "else": {"$ref": "#/$defs/Study"},
        "$defs": _plain(definitions),
    }


def schema_text() -> str:
    """Return the schema as the file contains it."""
    text = json.dumps(study_schema(), indent=1, ensure_ascii=False)
    # What contains no other list or mapping on one line: a third of the length, and easier to compare.
    return re.sub(r"[\[{][^\[\]{}]{1,140}[\]}]", lambda found: " ".join(found.group().split()), text) + "\n"


def modeline() -> str:
    """Return the comment by which an editor finds the schema of this installation."""
    return f"# yaml-language-server: $schema={(recipes_folder() / FILE).resolve()}"


def _refine(definitions: dict[str, Any]) -> None:
    """Add what the model checks in code: what belongs to an ecosystem."""
    kinds: dict[bool, list[str | None]] = {True: [None], False: [None]}
    for name in get_args(Prepare):
        kinds[name in TEXT].append(name)
    (translates,) = [name for name in get_args(Ecosystem) if kind_of(name) is TRANSLATION]
    definitions["Data"]["if"] = {"properties": {"options": {"minProperties": 1}}, "required": ["options"]}
    definitions["Data"]["then"] = {"properties": {"prepare": {"type": "string"}}, "required": ["prepare"]}
    definitions["Study"]["allOf"] = [
        {
            "if": {"properties": {"ecosystem": {"const": translates}}, "required": ["ecosystem"]},
            "then": {
                "properties": {
                    "data": {
                        "properties": {"prepare": {"enum": kinds[True]}},
                        "not": {"required": ["num_classes"]},
                    },
                    "students": {"minItems": 1},
                    "paper": {"enum": [[]]},
                    "published": {"type": "null"},
                },
                "required": ["students"],
            },
            "else": {
                "properties": {
                    "data": {"properties": {"prepare": {"enum": kinds[False]}}, "required": ["num_classes"]}
                }
            },
        },
        {
            "if": {"properties": {"ecosystem": {"const": "mmcls"}}, "required": ["ecosystem"]},
            "else": {
                "properties": {
                    "controls": {"items": {"enum": [name for name in get_args(Control) if name != "real"]}}
                }
            },
        },
        {
            "if": {"properties": {"controls": {"minItems": 1}}, "required": ["controls"]},
            "then": {"properties": {"students": {"minItems": 1}}, "required": ["students"]},
        },
    ]


def _plain(schema: Any) -> Any:
    """Drop titles made of the keys' own names, and put what stands beside a reference where it counts."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        key: _plain(value)
        for key, value in schema.items()
        if not ((key == "title" and isinstance(value, str)) or (key == "default" and value is None))
    }
    if "$ref" in plain and len(plain) > 1:  # draft 7 looks at nothing beside a reference
        plain["allOf"] = [{"$ref": plain.pop("$ref")}]
    return plain
