"""What recipes say: commands by the real parsers, the paper's figures; `lskd recipe list` and `show`."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from lskd_study.cli import main as cli
from lskd_study.paper.printed import load_tables
from lskd_study.plan.recipes import catalogue, find_recipe, header_of, recipes_folder
from lskd_study.runs.scheduler import check_snakemake_options

pytestmark = pytest.mark.unit

ROOT = recipes_folder()
LINE = re.compile(r"^ {2,}((?:lskd|timm|mim|fairseq-hydra-train|cp) .*)$")  # indented, in the comment
QUOTED = re.compile(r"`(lskd [^`]*)`")
STUDIES = {r.path: yaml.safe_load(r.path.read_text()) for r in catalogue() if r.kind == "study"}
DATA = {path: study["data"]["path"] for path, study in STUDIES.items()}


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


FILES = [path for path in sorted([*ROOT.rglob("*.yaml"), *ROOT.rglob("*.py")]) if commands(path)]


def test_every_recipe_says_how_to_run_it():
    for recipe in catalogue():
        assert set(FILES) & set(recipe.files), recipe.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_parse(path):
    for words in commands(path):
        check = {"lskd": lskd, "timm": timm, "mim": mim, "fairseq-hydra-train": fairseq, "cp": copies}
        check[words[0]](words[1:], path)


def lskd(words: list[str], path: Path) -> None:
    name, context = parsed(words)
    if name == "study":
        assert (ROOT.parent / context.params["file"]).is_file() or find_recipe(context.params["file"])
        check_snakemake_options(context.args)
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
    outputs = {study["output"] for study in STUDIES.values()}
    assert words[0] == "-r"
    assert words[1].removesuffix("/teachers") in outputs
    assert words[2].removesuffix("/") == yaml.safe_load(path.read_text())["output"]


@pytest.mark.parametrize(
    "words",
    [
        "study recipes/digits/study.yaml --coers 2",
        "data cub201 x",
        "data cub200 x --outptu y",
        "data noise --seed x",
    ],
)
def test_a_wrong_command_is_noticed(words):
    with pytest.raises(Exception):  # noqa: B017, PT011 - of click's, or of lskd's own
        lskd(words.split(), ROOT / "digits" / "study.yaml")


VISION = ("cub200", "fixres", "imagenet", "imagenet_100_500")
VISION += ("imagenet_lt", "imaterialist", "inat2019", "places_lt")


def test_expected_figures_are_the_papers():
    rows = [row for table in load_tables().tables.values() for row in table.rows]
    printed = {f"{v:.3f}" for row in rows for v in row.values.values() if isinstance(v, float)}
    for path in (path for folder in VISION for path in (ROOT / folder).glob("*.yaml")):
        if path.stem != "temperature":  # Chandrasegaran et al.'s
            assert set(re.findall(r"\b\d\d\.\d{3}\b", header_of(path))) <= printed, path


def test_list_names_every_recipe_with_its_table(capsys, costs):
    assert cli.main(["recipe", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() - {"NAME"} == {recipe.name for recipe in catalogue()} == costs.documented.keys()
    assert lines["imagenet/table9"].split()[1:] == ["Table", "9", "timm", "8", "data/imagenet"]


def test_show_prints_a_recipes_files(capsys):
    assert cli.main(["recipe", "show", "cub200/table2"]) == 0
    out = capsys.readouterr().out
    for name in ("table2.yaml", "teacher.yaml", "student.yaml"):
        assert (ROOT / "cub200" / name).read_text() in out


def test_an_unknown_name_is_one_line_with_the_nearest(capsys):
    assert cli.main(["recipe", "show", "imagenet/tabel2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "unknown recipe 'imagenet/tabel2'; did you mean imagenet/table2?" in err
    assert err.count("\n") == 1
