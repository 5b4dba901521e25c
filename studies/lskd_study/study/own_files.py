"""The study file and the trainer's files of a study of one's own images, to be read and changed."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from lskd_study.plan.json_schema import modeline
from lskd_study.study.own_choice import Choice
from lskd_study.study.own_images import OwnImages

STUDY, TEACHER, STUDENT = "study.yaml", "teacher.yaml", "student.yaml"
LINKS = "images"  # folder in the output whose train and val are links, where the own ones have other names

_TRAINER_HEADER = """\
# {role}, in timm's own options (`timm train.py --help`). The study adds model, classes, smoothing, seed and
# folders.
#
# To start from weights instead of at random, add one of
#   initial_checkpoint: FILE   # of this model, these classes and {channels} channel{s}; nothing is downloaded
#   pretrained: true           # timm's, which timm downloads; with a tag in the model's name
"""


def data_path(images: OwnImages, output: str) -> str:
    """Return the study's data folder: the own one, or links to its splits under the usual names."""
    return images.folder if images.usual_names else str(Path(output, LINKS))


def study_files(images: OwnImages, choice: Choice, output: str, about: str) -> dict[str, str]:
    """Return the text of each file by its name."""
    options = choice.trainer_options()
    channels = 1 if choice.grey else 3
    files = {STUDY: _study(images, choice, output, about)}
    for name, role in ((TEACHER, "Teachers"), (STUDENT, "Students")):
        header = _TRAINER_HEADER.format(role=role, channels=channels, s="s" * (channels > 1))
        files[name] = header + _yaml(options)
    return files


def _study(images: OwnImages, choice: Choice, output: str, about: str) -> str:
    path = data_path(images, output)
    command = shlex.join(["lskd", "study", str(Path(output, STUDY))])
    lines = [
        "# Does a label-smoothed teacher distil a better student? On images of one's own.",
        "#",
        f"#   {command} --cores 2",
        "#",
        "# Written by `lskd study --own`. Change what you like, here and in the trainer's files beside it;",
        "# the command above goes on with it. docs/study.md explains each key.",
        f"# {images.describe()}.",
        f"# {about}",
        "",
    ]
    lines.append(modeline())
    name = Path(images.folder).resolve().name
    own: dict[str, Any] = {
        "title": f"Does a label-smoothed teacher distil a better student? {name}",
        **({"note": choice.cut} if choice.cut else {}),
        "ecosystem": "timm",
        "data": {"path": path, "num_classes": len(images.classes)},
        "output": output,
        "smoothing": {"values": list(choice.smoothing), "convention": "paper"},
        "seeds": list(choice.seeds),
        "teachers": [{"model": choice.teacher, "config": TEACHER}],
        "students": [{"model": model, "config": STUDENT} for model in choice.students],
        "controls": ["hard", "smoothed"],
        "temperatures": [1],
        "hard_weights": [0],
        "resources": {"threads": 1} | ({"extra": {"gpu": 1}} if choice.gpu else {}),
    }
    return "\n".join(lines) + "\n" + _yaml(own)


def _yaml(content: dict[str, Any]) -> str:
    """Return a mapping as a person would write it: what contains plain values alone in one line."""
    return str(
        yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    )
