"""Recipes: how one is read, whether its variables are what is used, and how a command about one ends."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from mmengine.config import Config

from lskd import LskdError
from lskd.base.files import full_disk
from lskd.errors import from_outside, one_line, report
from mmcls_bnn.binary.packed import deployable

Dataclass = TypeVar("Dataclass")
LARGEST = 2**31 - 1  # of numbers that become sizes of tensors


def read_config(
    path: str | Path, options: Mapping[str, Any] | None = None, what: str = "config", kind: str = "a recipe"
) -> Config:
    """Return a recipe with the options of a command line, `--cfg-options`.

    Args:
        what: what the file is called in messages.

    Raises:
        LskdError: for a file that is missing or is no config.
    """
    if not Path(path).is_file():
        raise LskdError(f"{what} {path} does not exist; give the path of {kind}.")
    try:
        recipe = Config.fromfile(str(path))
        recipe.merge_from_dict(dict(options or {}))
    except LskdError:
        raise
    except Exception as error:  # a config is a program
        raise LskdError(f"{what} {path} cannot be read: {one_line(error, 200)}.") from None
    return recipe


def read_recipe(path: str) -> dict[str, Any]:
    """Return the student's config in a recipe, without what training needs.

    Raises:
        LskdError: for a file that is missing or is no config of a model.
    """
    recipe = read_config(path)
    if "model" not in recipe:
        raise LskdError(f"config {path} has no model; give a recipe.")
    return deployable(recipe)


def settings_of(kind: type[Dataclass], values: Any, where: str, example: str, **defaults: Any) -> Dataclass:
    """Build a dataclass of settings from a recipe's dictionary, which stands there as `where`.

    Raises:
        LskdError: for no dictionary (an `example` of one is named), and for a key that is unknown.
    """
    if not isinstance(values, Mapping):
        raise LskdError(f"{where} is {values!r}; give dict({example}).")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise LskdError(f"{where} has an unknown key {key!r}; there are {', '.join(known)}.")
    return kind(**{**defaults, **values})


def check_count(name: str, value: Any, least: int = 1, largest: int = LARGEST) -> None:
    """Refuse what is no whole number from `least` to `largest`; by default those that torch takes for a size.

    Raises:
        LskdError: naming it.
    """
    if not isinstance(value, int) or not least <= value <= largest:
        raise LskdError(f"{name} is {value!r}; it must be a whole number from {least} to {largest}.")


def check_variables(recipe: Config) -> None:
    """Refuse a variable that says something else than the setting that is used, logged and dumped.

    A recipe is a program that has run before `--cfg-options` change anything: what its variables stood in
    does not change with them.

    Args:
        recipe: as it is used, with the path of its file, if there is one.

    Raises:
        LskdError: naming the variable and the setting.
    """
    written = Config.fromfile(recipe.filename, import_custom_modules=False) if recipe.filename else {}
    for name, value in recipe.items():
        if name not in written or value == written[name]:
            continue
        stale = [key for key, used in _called(recipe, name) if key != name and used == written[name]]
        if stale:
            raise LskdError(
                f"{name}={value!r} changes nothing once the recipe has been read; set {', '.join(stale)}."
            )


def _called(part: Any, name: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of all settings of a name."""
    for key, value in part.items() if isinstance(part, Mapping | Config) else ():
        if key == name:
            yield path + key, value
        yield from _called(value, name, f"{path}{key}.")


def run(work: Callable[[], str]) -> int:
    """Print what `work` returns, or its error; return the exit status."""
    try:
        print(work())
    except LskdError as error:
        return report("mmcls_bnn", error)
    except (OSError, RuntimeError) as error:
        if (ours := from_outside(error) or full_disk(error)) is None:
            raise
        return report("mmcls_bnn", ours)
    return 0
