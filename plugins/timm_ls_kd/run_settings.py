"""YAML files of defaults, as timm's scripts read them and as every run writes one (args.yaml)."""

import argparse
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import read_yaml
from timm_ls_kd.upstream_only import UPSTREAM_ONLY

# Set by a launched run, or about the run rather than the recipe: args.yaml of a run may hold them.
_IGNORED = frozenset({"data", "config", "distributed", "world_size", "rank", "local_rank", "prefetcher"})


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from argument names to values.

    Raises:
        LskdError: missing file, not YAML, or not a mapping with words as keys.
    """
    content = read_yaml(path, "config file")
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise LskdError(f"config file {path} must map argument names to values, such as 'lr: 0.1'.")
    return content


def settings_beside(checkpoint: Path, model: str) -> dict[str, Any]:
    """Read the args.yaml that timm's trainers leave beside a checkpoint; {} when it is not this model's."""
    try:
        content = read_config(checkpoint.parent / "args.yaml")
    except LskdError:
        return {}
    return content if _architecture(content.get("model")) == _architecture(model) else {}


def _architecture(name: object) -> str:
    return str(name).partition(".")[0]


def apply_config(parser: argparse.ArgumentParser, config: dict[str, Any], path: str) -> list[str]:
    """Make the values of `config` the parser's defaults.

    Returns:
        Warnings, one line each: keys that the trainer does not know.

    Raises:
        LskdError: a value of the wrong type, or an upstream-only argument that is switched on.
    """
    actions = {action.dest: action for action in parser._actions}
    unknown = []
    defaults = {}
    for key, value in config.items():
        if key in actions and key not in ("help", "config"):
            if value is not None:  # null: as if the key were not there
                defaults[key] = converted(actions[key], value, path)
        elif key in UPSTREAM_ONLY:
            if value not in (UPSTREAM_ONLY[key], None):
                raise LskdError(
                    f"{path} sets {key}, an argument of timm's upstream train.py only; "
                    "remove it or pass that script's path: timm /path/to/train.py ..."
                )
        elif key not in _IGNORED:
            unknown.append(key)
    parser.set_defaults(**defaults)
    if not unknown:
        return []
    return [f"{path}: unknown key{'s' * (len(unknown) > 1)} {', '.join(sorted(unknown))} ignored"]


def converted(action: argparse.Action, value: Any, path: str) -> Any:
    """Bring a YAML value to what the same text on the command line would have given.

    Raises:
        LskdError: a value of the wrong type, or none of the argument's choices.
    """

    def refuse(expected: str) -> LskdError:
        return LskdError(f"{path}: {action.dest} must be {expected}, got {value!r}.")

    if action.nargs == 0:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if isinstance(action.default, dict):
        if not isinstance(value, dict):
            raise refuse("a mapping")
        return value
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            raise refuse("a list" if not isinstance(action.nargs, int) else f"a list of {action.nargs}")
        return [_scalar(action, item, refuse) for item in value]
    return _scalar(action, value, refuse)


def _scalar(action: argparse.Action, value: Any, refuse: Any) -> Any:
    wanted: Any = action.type or str
    if (
        value is None
        or isinstance(value, bool | list | dict)
        or (wanted is int and isinstance(value, float) and value % 1)
    ):
        raise refuse({int: "a whole number", float: "a number"}.get(wanted, "text"))
    try:
        # YAML 1.1 reads 1e-4 as text; float() takes it as the number that was meant.
        result = wanted(value) if not isinstance(value, float) or wanted is not int else int(value)
    except (TypeError, ValueError, OverflowError):
        raise refuse({int: "a whole number", float: "a number"}.get(wanted, "text")) from None
    if action.choices is not None and result not in action.choices:
        raise refuse("one of " + ", ".join(repr(choice) for choice in action.choices))
    return result
