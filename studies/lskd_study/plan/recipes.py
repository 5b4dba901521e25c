"""The recipes that came with this installation: their files, names, headers, and what each asks for."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lskd import LskdError
from lskd.base.files import read_yaml
from lskd_study.base.text import nearest
from lskd_study.plan.kinds import Ecosystem

# Keys by which a YAML file is known to be for `lskd`, and not a trainer's own.
_STUDY_KEYS = ({"smoothing", "seeds", "teachers"}, {"kind", "teachers"})
_PLACE = re.compile(r"(?:Tables?|Figs?\.|Secs?\.) \d+(?: and \d+)*")


@dataclass(frozen=True)
class Recipe:
    """Something to run.

    Attributes:
        name: how commands call it: the path below the folder of recipes, without ``study`` and suffix.
        path: the file to run; of fairseq a folder with the files of a teacher and a student.
        kind: a study that trains, a list of teachers to measure, or runs of a trainer by hand.
        ecosystem: whose extra it needs; mmcls for a study whose students are mmcls'.
    """

    name: str
    path: Path
    kind: Literal["study", "teachers", "run"]
    ecosystem: Ecosystem

    @property
    def files(self) -> list[Path]:
        """The file to run and the trainers' files that it names, in the order in which they are read."""
        if self.path.is_dir():
            return [self.path / "teacher.yaml", self.path / "student.yaml"]
        if self.kind != "study":
            return [self.path]
        content = read_yaml(self.path)
        entries = [*(content.get("teachers") or []), *(content.get("students") or [])]
        configs = dict.fromkeys(str(entry["config"]) for entry in entries)
        return [self.path, *((self.path.parent / config) for config in configs)]

    @property
    def header(self) -> str:
        """The comment that the first file begins with."""
        return header_of(self.files[0])

    @property
    def place(self) -> str:
        """Tables, figures or sections of the paper that the header's first paragraph names; '' for none."""
        first = self.header.split("\n\n", 1)[0].replace("\n", " ")
        return ", ".join(dict.fromkeys(match.group() for match in _PLACE.finditer(first)))


def recipes_folder() -> Path:
    """Return the folder of recipes: beside the checkout, or inside the installed package."""
    package = Path(__file__).parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parents[1] / "recipes"


def find_study_file(name: str) -> Path:
    """Return the study file of that name: a path, or, where there is none, a packaged recipe's.

    Raises:
        LskdError: when there is neither, or a trainer runs the recipe.
    """
    path = Path(name)
    if path.exists():
        return path
    if path.parts[:1] == ("recipes",) and ".." not in path.parts:
        packaged = recipes_folder().joinpath(*path.parts[1:])
        if packaged.is_file():
            return packaged
    recipe = find_recipe(name)
    if recipe.kind == "run":
        raise LskdError(f"{name} is no study; `lskd recipe show {recipe.name}` has the command that runs it")
    return recipe.path


def header_of(path: Path) -> str:
    """Return the comment at the top of a YAML file, or a Python file's docstring, without comment marks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text.split('"""')[1].strip() if text.startswith('"""') else ""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(comment)


def catalogue() -> list[Recipe]:
    """Return all recipes, sorted by name."""
    root = recipes_folder()
    recipes = [found for path in root.glob("*/*.yaml") if (found := _of_file(path, _name(path, root)))]
    # A trainer's file is a recipe only where no study beside it runs it.
    folders, run = {recipe.path.parent for recipe in recipes}, {f for recipe in recipes for f in recipe.files}
    for path in (*root.glob("*.py"), *root.glob("*/*.py")):
        if not path.parent.name.startswith("_") and path not in run:
            recipes.append(Recipe(_name(path, root), path, "run", "mmcls"))
    for path in root.glob("*/teacher.yaml"):
        content = read_yaml(path) if path.parent not in folders else None
        if isinstance(content, dict) and isinstance(content.get("task"), dict):
            recipes.append(Recipe(path.parent.name, path.parent, "run", "fairseq"))
    return sorted(recipes, key=lambda recipe: recipe.name)


def _of_file(path: Path, name: str) -> Recipe | None:
    """Return the recipe that a study file is; None for a file of a trainer's options."""
    try:
        content = read_yaml(path)
    except LskdError:
        return None
    if not isinstance(content, dict) or not any(keys <= content.keys() for keys in _STUDY_KEYS):
        return None
    ecosystem = content.get("ecosystem", "timm")
    kind: Literal["study", "teachers"] = "teachers" if "kind" in content else "study"
    return Recipe(name, path, kind, ecosystem if ecosystem in ("mmcls", "fairseq") else "timm")


def _name(path: Path, root: Path) -> str:
    relative = path.relative_to(root).with_suffix("")
    return str(relative.parent if relative.name == "study" else relative)


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name; the path of a study file of one's own is one too.

    Raises:
        LskdError: when there is none, with the nearest names.
    """
    known = {recipe.name: recipe for recipe in catalogue()}
    short = name.removeprefix("recipes/").removesuffix("/")
    short = short.removesuffix(".yaml").removesuffix(".py").removesuffix("/study")
    path = Path(name)
    if path.is_file() and path.suffix == ".yaml" and (own := _of_file(path, name)):
        return own
    if short in known:
        return known[short]
    if path.is_file():
        raise LskdError(f"{name} is a trainer's own file; name the study that runs it (`lskd recipe list`)")
    # 'imagenet' means one of imagenet/table2, imagenet/table7, ...
    below = [other for other in known if other.startswith(f"{short}/")]
    near = below[0] if below else nearest(short, known)
    hint = f"did you mean {near}? " if near else ""
    raise LskdError(f"no file or recipe {name!r}; {hint}`lskd recipe list` names all {len(known)}")


def runs_and_data(recipe: Recipe) -> tuple[str, str]:
    """Return how many runs a recipe has, and the data it reads; '?' for what needs an extra to be known.

    Raises:
        LskdError: a study file that is not as it should be.
    """
    from lskd_study.plan.plan import expand
    from lskd_study.plan.schema import load_study
    from lskd_study.plan.teacher_list import load_teachers

    if recipe.kind == "teachers":
        listed = load_teachers(recipe.path)
        return str(len(listed.teachers)), listed.data.path if listed.data else "stored logits"
    if recipe.kind == "study":
        study = load_study(recipe.path)
        teachers, students = (
            [(one.model, one.config) for one in several] for several in (study.teachers, study.students)
        )
        settings = study.temperatures, study.hard_weights, study.controls, study.student_seeds
        runs = expand(study.smoothing.values, study.seeds, teachers, students, *settings)
        return str(len(runs)), study.data.path
    if recipe.ecosystem == "fairseq":
        return "2", str(read_yaml(recipe.files[0])["task"]["data"])
    try:
        from mmengine.config import Config
    except ModuleNotFoundError:
        return "1", "?"
    return "1", str(Config.fromfile(str(recipe.path)).data_root)
