"""What recipes say: commands by the real parsers, the paper's figures; `lskd recipe list` and `show`."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lskd_study.claims.outlook import assumed, before, level_of
from lskd_study.claims.statements import claims_of
from lskd_study.cli import main as cli
from lskd_study.paper.printed import load_tables
from lskd_study.plan.recipes import catalogue, find_recipe, header_of, recipes_folder
from lskd_study.runs.scheduler import check_snakemake_options
from lskd_study.stats.power import Variances
from lskd_study.study.engine import make_plan
from parsed import parsed

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
        here = [study["data"] for file, study in STUDIES.items() if file.parent == path.parent]
        read = {data["path"] for data in here} or {"data/digits"}
        read |= {data.get("options", {}).get("source") for data in here}
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
    assert re.sub("/(teachers|soft_labels)$", "", words[1]) in outputs
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


@pytest.mark.parametrize("name", ["imagenet/table2", "cub200/table2"])
def test_the_papers_tables_say_what_three_seeds_can_see(name):
    """By the study's own statistics at its headline's level, with the assumptions that the headers name."""
    study = find_recipe(name)
    plan = make_plan(str(study.path), None)
    level = level_of(claims_of(plan)[0], plan)
    header = " ".join(header_of(study.path).split())
    assert len(STUDIES[study.path]["seeds"]) == 3
    assert "by 0.10, 0.15 or 0.25 points between seeds and arms differ on 5 % of" in header
    images = int(re.search(r"the ([\d,]+) images", header)[1].replace(",", ""))
    varies = [Variances(2 * sd**2, 100**2 * 0.05 / images, images - 1) for sd in (0.10, 0.15, 0.25)]
    said = re.findall(r"for ([\d.]+) points (?:it )?is ((?:\.\d\d(?:, )?)+)", header)
    assert {points for points, _ in said} >= {"0.4"}
    for points, powers in said:
        assert powers.strip(", ") == ", ".join(
            f"{one.power(3, float(points), level):.2f}"[1:] for one in varies
        )
    for powers in re.findall(r"five seeds have ((?:\.\d\d(?:, )?)+)", header):
        assert powers.strip(", ") == ", ".join(f"{one.power(5, 0.4, level):.2f}"[1:] for one in varies)
    if "which no number of seeds makes .80" in header:
        assert [one.seeds_for(0.4, level=level) for one in varies] == [None] * 3


def test_the_manual_quotes_what_a_dry_run_says_of_power():
    plan = make_plan(str(ROOT / "digits" / "study.yaml"), None)
    first, *rest = before(plan, assumed(plan, 596))
    block = "\n".join([f"warning: {first}", *(f"  power    {line}" for line in rest)])
    manual = Path(__file__).parents[2] / "docs" / "study.md"
    assert f"```\n{block}\n```" in manual.read_text(encoding="utf-8")


def test_ours_have_five_seeds():
    """And the paper's own tables three, or the single run that they print; FixRes is its Fig. 8, right."""
    for path, study in STUDIES.items():
        if "seeds" in study and path.parent.name != "fashion_mnist":  # by docs/results/plan.md
            papers = study.get("paper") or path.parent.name == "fixres"
            assert len(study["seeds"]) in ((1, 3) if papers else (5,)), path
            if len(study["seeds"]) == 1:
                assert 'with one seed a difference is always "cannot tell"' in header_of(path)


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
    assert "no file or recipe 'imagenet/tabel2'; did you mean imagenet/table2?" in err
    assert err.count("\n") == 1
