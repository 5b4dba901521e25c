"""lskd's plugin for timm: distillation in timm's own script or in a bundled trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lskd.teachers.outputs import Evaluation
    from timm_ls_kd.evaluation import collect_logits
    from timm_ls_kd.task import LsKdTask

__all__ = ["Evaluation", "LsKdTask", "collect_logits"]

_HOMES = {
    "Evaluation": "evaluation",
    "collect_logits": "evaluation",
    "LsKdTask": "task",
}


def __getattr__(name: str) -> Any:
    """Import timm only when something of it is asked for: the command's errors and help must be quick."""
    if name in _HOMES:
        return getattr(import_module(f"timm_ls_kd.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'timm_ls_kd' has no attribute '{name}'")
