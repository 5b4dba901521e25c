"""The commands in the headers of all recipes, by the real parsers: what a reader pastes has to run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from lskd_study.cli import main as cli
from lskd_study.plan.recipes import catalogue, find_recipe, header_of, recipes_folder
from lskd_study.runs.scheduler import check_snakemake_options

pytestmark = pytest.mark.unit

ROOT = recipes_folder()
LINE = re.compile(r"^ {2,}((?:lskd|timm|mim|fairseq-hydra-train|cp) .*)$")  # indented, in the comment
QUOTED = re.compile(r"`(lskd [^`]*)`")
DATA = {recipe.path: yaml.safe_load(recipe.path.read_text())["data"]["path"] for recipe in catalogue()
        if recipe.kind == "study"}  # fmt: skip


def commands(path: Path) -> list[list[str]]:
    """Return the commands of a header, their words."""
    text = re.sub(r"\\\n *", " ", header_of(path))
    lines = [match[1] for line in text.splitlines() if (match := LINE.match(line))]
    quoted = [match for match in QUOTED.findall(text.replace("\n", " ")) if "..." not in match]
    parts = [part for line in lines for part in line.split(" && ")] + quoted
    return [shlex.split(part, comments=True) for part in parts]


def parsed(words: list[str]) -> tuple[str, Any]:
    """Find a command of ``lskd`` and let it parse its words, without running it; its name and context."""
    command, name = get_command(cli.app), []
    words = list(words)
    while hasattr(command, "commands"):
        if not words:  # `lskd data`, named as a whole
            return " ".join(name), None
        name.append(words.pop(0))
        assert name[-1] in command.commands, f"lskd {' '.join(name)}"
        command = command.commands[name[-1]]
    alone = not words and name[0] in ("data", "figure")  # named, not to be run as it stands
    return " ".join(name), None if alone else command.make_context(name[-1], words)


FILES = [pytest.param(path, id=str(path.relative_to(ROOT)))
         for path in sorted([*ROOT.rglob("*.yaml"), *ROOT.rglob("*.py")]) if commands(path)]  # fmt: skip


def test_every_recipe_says_how_to_run_it():
    said = {param.values[0] for param in FILES}
    for recipe in catalogue():
        assert said & set(recipe.files), recipe.name


@pytest.mark.parametrize("path", FILES)
def test_commands_parse(path):
    for words in commands(path):
        check = {"lskd": lskd, "timm": timm, "mim": mim, "fairseq-hydra-train": fairseq, "cp": copies}
        check[words[0]](words[1:], path)


def lskd(words: list[str], path: Path) -> None:
    name, context = parsed(words)
    if name == "study":
        assert (ROOT.parent / context.params["file"]).is_file() or find_recipe(context.params["file"])
        check_snakemake_options(context.args)
    elif name.startswith("recipe "):
        for asked in context.params["names"]:
            find_recipe(asked)
    elif name.startswith("data ") and context is not None:
        output = context.params["output"]
        if output is None:  # beside the source
            output = f"{context.params['source']}_{context.params['classes']}"
        made = {str(output), str(context.params.get("data_bin"))}
        # What it makes is what the recipe reads.
        read = {data for study, data in DATA.items() if study.parent == path.parent} or {"data/digits"}
        assert made & read or path.parent.name == "fixres"


def timm(words: list[str], path: Path) -> None:
    from timm_ls_kd.trainer.arguments import parse_arguments

    words = [word for word in words[1:] if word != "..."]
    if "--config" in words:
        config = words.index("--config") + 1
        assert (ROOT.parent / words[config]).resolve() == path.resolve()
        words[config] = str(path)
    args = parse_arguments(words)
    assert args.data_dir in {*DATA.values(), "data/imagenet"}


def mim(words: list[str], path: Path) -> None:
    assert words[:2] == ["train", "mmcls"]
    assert (ROOT.parent / words[2]).resolve() == path.resolve()
    assert all(word in ("--work-dir", "--cfg-options") for word in words[3:] if word.startswith("-"))


def fairseq(words: list[str], path: Path) -> None:
    options = dict(zip(words[::2], words[1::2], strict=True))
    config = ROOT.parent / options["--config-dir"] / f"{options['--config-name']}.yaml"
    assert config.resolve() == path.resolve()


def copies(words: list[str], path: Path) -> None:
    outputs = {yaml.safe_load(study.read_text())["output"] for study in DATA}
    assert words[0] == "-r"
    assert words[1].removesuffix("/teachers") in outputs
    assert words[2].removesuffix("/") == yaml.safe_load(path.read_text())["output"]


@pytest.mark.parametrize(
    "words",
    ["study recipes/digits/study.yaml --coers 2", "data cub201 x", "data cub200 x --outptu y", "data noise"],
)
def test_a_wrong_command_is_noticed(words):
    with pytest.raises(Exception):  # noqa: B017, PT011 - of click's, or of lskd's own
        lskd(
            [*words.split(), "--seed", "x"] if words == "data noise" else words.split(),
            ROOT / "digits" / "study.yaml",
        )
