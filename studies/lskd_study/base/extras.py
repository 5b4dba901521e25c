"""One clear line for a part of the study whose libraries are not installed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lskd import LskdError
from lskd.base.install import how_to_install

STUDY_MODULES = ("jinja2", "matplotlib", "pyarrow", "pydantic", "scipy", "sklearn", "snakemake", "timm")


def missing_study_modules() -> list[str]:
    """Return the modules of the extra ``study`` that are not installed."""
    return [name for name in STUDY_MODULES if importlib.util.find_spec(name) is None]


def require_study_extra() -> None:
    """Check that all of the extra ``study`` is here, before hours of training and not after.

    Raises:
        LskdError: naming what is missing and what to install.
    """
    missing = missing_study_modules()
    if missing:
        raise LskdError(f"this needs {', '.join(missing)}, not installed here; {how_to_install('study')}")


def require_ecosystem(name: str, file: Path) -> None:
    """Check that the trainers of a study file are here.

    Raises:
        LskdError: naming the extra to install.
    """
    if importlib.util.find_spec(name) is None:
        raise LskdError(f"{file} is a study of {name}, not installed here; {how_to_install(name)}")


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Turn a missing third-party module within the block into an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing.startswith("lskd"):
            raise
        raise LskdError(f"this needs {missing}, not installed here; {how_to_install(extra)}") from error


needs_study_extra = partial(_needs, "study")
needs_fairseq_extra = partial(_needs, "fairseq")
