"""Find recipe files: beside the checkout, or inside the installed package."""

from pathlib import Path

from lskd import LskdError


def recipes_folder() -> Path:
    """Return the folder of recipes that came with this installation."""
    package = Path(__file__).parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parents[1] / "recipes"


def find_study_file(name: str) -> Path:
    """Return the study file of that name: a path, or, where there is none, the packaged ``recipes/...`` file.

    Raises:
        LskdError: when there is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    if path.parts[:1] == ("recipes",) and ".." not in path.parts:
        packaged = recipes_folder().joinpath(*path.parts[1:])
        if packaged.is_file():
            return packaged
    known = sorted(
        f"recipes/{found.parent.name}/study.yaml" for found in recipes_folder().glob("*/study.yaml")
    )
    raise LskdError(f"no study file {name}; recipes that come with lskd: {', '.join(known) or 'none'}")
