"""The JSON schema of study files, for editors: generated from the model that reads them.

It ships as ``study.schema.json`` in the folder of recipes. In the vocabulary of draft 7, which editors know.
It says what each key may be; which keys go together only the model says, with the line in the file.
"""

import json
import re
from typing import Any

from lskd_study.plan.recipes import recipes_folder
from lskd_study.plan.schema import Study
from lskd_study.plan.teacher_list import TeacherList

FILE = "study.schema.json"


def study_schema() -> dict[str, Any]:
    """Return the schema of a study file, or of a list of teachers where it has a ``kind``."""
    definitions: dict[str, Any] = {}
    for model in (Study, TeacherList):
        own = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= own.pop("$defs", {})
        definitions[model.__name__] = own
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
