"""One clear line for a part of the study whose libraries are not installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lskd import LskdError
from lskd.base.install import how_to_install

STUDY_MODULES = (
    *("jinja2", "matplotlib", "pandas", "pyarrow", "pydantic"),
    *("scipy", "sklearn", "snakemake", "timm"),
)
EXPORT_MODULES = ("onnx", "onnxscript", "onnxruntime")
_EXTRA_OF = {
    **dict.fromkeys(EXPORT_MODULES, "export"),
    **dict.fromkeys((*STUDY_MODULES, "PIL", "psutil", "rich", "torchvision", "tqdm"), "study"),
    **dict.fromkeys(("mmcls", "mmcv", "mmengine"), "mmcls"),
    **dict.fromkeys(
        (
            *("fairseq", "fairseq_cli", "hydra", "omegaconf", "bitarray", "regex"),
            *("sacrebleu", "sacremoses", "subword_nmt", "num2words"),
        ),
        "fairseq",
    ),
}


def missing_modules(names: Sequence[str]) -> list[str]:
    """Return those of some modules that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def require_extra(name: str = "study", what: str = "this", otherwise: str = "") -> None:
    """Check that all of an extra is here, before hours of training and not after.

    Raises:
        LskdError: naming what is missing and what to install.
    """
    if missing := missing_modules({"study": STUDY_MODULES, "export": EXPORT_MODULES}[name]):
        fix = f"{otherwise}{how_to_install(name)}"
        raise LskdError(f"{what} needs {', '.join(missing)}, not installed here; {fix}")


def require_ecosystem(name: str, file: Path) -> None:
    """Check that the trainers of a study file are here.

    Raises:
        LskdError: naming the extra to install.
    """
    if importlib.util.find_spec(name) is None:
        raise LskdError(f"{file} is a study of {name}, not installed here; {how_to_install(name)}")


def not_installed(error: ModuleNotFoundError) -> LskdError | None:
    """Return the one line for an import that failed: what to install; None for what no extra brings."""
    missing = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF.get(missing)
    return (
        None
        if extra is None
        else LskdError(f"this needs {missing}, not installed here; {how_to_install(extra)}")
    )
