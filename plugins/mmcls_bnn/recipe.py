"""Reading the model of a recipe."""

from pathlib import Path
from typing import Any

from mmengine.config import Config

from lskd import LskdError
from mmcls_bnn.packed import deployable


def read_recipe(path: str) -> dict[str, Any]:
    """Return the student's config in a recipe, without what training needs.

    Raises:
        LskdError: for a file that is missing or is no config of a model.
    """
    if not Path(path).is_file():
        raise LskdError(f"config {path} does not exist; give the path of a recipe.")
    try:
        recipe = Config.fromfile(path)
    except LskdError:
        raise
    except Exception as error:  # a config is a program
        raise LskdError(f"config {path} cannot be read: {' '.join(str(error).split())[:200]}.") from None
    if "model" not in recipe:
        raise LskdError(f"config {path} has no model; give a recipe.")
    preprocessor = recipe.get("data_preprocessor")
    return deployable(recipe.model.to_dict(), preprocessor and preprocessor.to_dict())
