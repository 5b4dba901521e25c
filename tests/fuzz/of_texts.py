"""Files that people write: studies, lists of teachers, trainers' files, recipes."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fuzz import attacks
from fuzz.harness import Read, one_file, same
from lskd import LskdError
from lskd.base import files
from lskd_study.plan.recipes import recipes_folder


def study_file(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.plan.schema import Study, load_study
    from scenes import STUDY

    def read(path: Path) -> None:
        study = load_study(path)
        same(study, Study.model_validate(json.loads(study.model_dump_json())))
        same(study, Study.model_validate(yaml.safe_load(path.read_bytes())))

    recipes = [*recipes_folder().glob("*/study.yaml"), *recipes_folder().glob("*/table*.yaml")]
    sound = [path.read_bytes() for path in sorted(recipes) if b"kind: stability" not in path.read_bytes()]
    return [yaml.safe_dump(STUDY).encode(), *sound], one_file("study.yaml", read)(folder)


def study_plan(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.plan.plan import Plan
    from lskd_study.study.engine import make_plan
    from scenes import STUDY

    for name in ("t.yaml", "s.yaml"):
        (folder / name).write_text("epochs: 1\nbatch_size: 2\n")

    def read(path: Path) -> None:
        plan = make_plan(str(path), str(folder / "out"))
        plan.write()
        same(dataclasses.asdict(Plan.read(folder / "out" / "plan.json")), dataclasses.asdict(plan))

    more = {"students": [{"model": "test_byobnet", "config": "s.yaml"}] * 1, "controls": ["hard", "smoothed"]}
    more |= {
        "temperatures": [1, 2.5],
        "hard_weights": [0, 0.5],
        "student_seeds": 2,
        "soft_labels": {"top_k": 1},
    }
    sound = [STUDY, STUDY | more, STUDY | {"students": [], "seeds": [0, 1, 2], "last_epochs": 1}]
    return [json.dumps(one).encode() for one in sound], one_file("study.yaml", read)(folder)


def teacher_list(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.plan.teacher_list import TeacherList, is_teacher_list, load_teachers

    def read(path: Path) -> None:
        is_teacher_list(path)
        found = load_teachers(path)
        same(found, TeacherList.model_validate(json.loads(found.model_dump_json())))

    content = yaml.safe_load((recipes_folder() / "stability" / "study.yaml").read_text())
    return [json.dumps(content).encode(), yaml.safe_dump(content).encode()], one_file("study.yaml", read)(
        folder
    )


def trainer_file(ecosystem: str, role: str, model: str, sound: Callable[[], Sequence[bytes]]) -> Any:
    def prepare(folder: Path) -> tuple[Sequence[bytes], Read]:
        from lskd_study.trainers import trainer_of

        trainer = trainer_of(ecosystem, "student")

        def read(path: Path) -> None:
            config = trainer.read_config(path)
            same(config, json.loads(json.dumps(config, allow_nan=False)))
            trainer.check_config(config, str(path), role, model)

        return sound(), one_file("trainer.yaml", read)(folder)

    return prepare


def recipe_texts(*names: str) -> Callable[[], Sequence[bytes]]:
    def sound() -> Sequence[bytes]:
        texts = [(recipes_folder() / name).read_bytes() for name in names]
        return [*texts, *(json.dumps(yaml.safe_load(text)).encode() for text in texts)]

    return sound


def mmcls_settings(folder: Path) -> tuple[Sequence[bytes], Read]:
    """A configuration is a program, so its settings are varied and not its text."""
    from mmengine.config import Config

    from lskd_study.trainers.mmcls import Mmcls

    config = Config.fromfile(str(recipes_folder() / "digits_bnn" / "student.py"), import_custom_modules=False)

    def read(data: bytes) -> None:
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise LskdError("no settings") from None
        if not isinstance(content, dict):
            raise LskdError("no settings")
        for role in ("student", "control"):
            Mmcls().check_config(content, "student.py", role, "bnn")

    return [json.dumps(config.to_dict(), default=str).encode()], read


def yaml_bounds(folder: Path) -> tuple[Sequence[bytes], Read]:
    def read(path: Path) -> None:
        found = files.read_yaml(path)
        same(str(found), str(yaml.safe_load(path.read_bytes())))

    small = [text for _, text in attacks.yamls() if len(text) < 2000]
    return [
        b"a: [1, {b: 0x1f, c: 1:30}]\nd: &x {e: 2024-01-01}\nf: {<<: *x, g: !!set {h}}\n",
        *small,
    ], one_file("x.yaml", read)(folder)


def recipe(folder: Path) -> tuple[Sequence[bytes], Read]:
    from lskd_study.plan.recipes import _of_file, runs_and_data

    def read(path: Path) -> None:
        if (found := _of_file(path, "x")) is None:
            raise LskdError("no recipe")
        runs_and_data(found)
        assert isinstance([*found.files, found.header, found.place], list)

    sound = [(recipes_folder() / name / "study.yaml").read_bytes() for name in ("digits", "stability")]
    return sound, one_file("study.yaml", read)(folder)
