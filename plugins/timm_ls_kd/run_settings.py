"""YAML files of defaults, as timm's scripts read them and as every run writes one (args.yaml)."""

import argparse
import re
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import read_yaml

# Arguments that only timm's upstream train.py knows, with their defaults there.
UPSTREAM_ONLY: dict[str, Any] = read_yaml(Path(__file__).with_name("upstream_only.yaml"), "table")
# Set by a launched run, or about the run rather than the recipe: args.yaml of a run may contain them.
_IGNORED = frozenset({"data", "config", "distributed", "world_size", "rank", "local_rank", "prefetcher"})


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from argument names to values.

    Raises:
        LskdError: missing file, not YAML, or not a mapping with text as keys.
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
    """Make the values of `config`, read as the command line would be, the parser's defaults.

    Returns:
        Warnings, one line each: keys that the trainer does not know.

    Raises:
        LskdError: a value that the argument does not take, or an upstream-only argument that is switched on.
    """
    known = {action.dest for action in parser._actions} - {"help", "config"}
    parser.set_defaults(**values_of(parser, {k: v for k, v in config.items() if k in known}, path))
    unknown = sorted(config.keys() - known - UPSTREAM_ONLY.keys() - _IGNORED)
    for key in config.keys() & UPSTREAM_ONLY.keys() - known:
        if config[key] not in (UPSTREAM_ONLY[key], None):
            raise LskdError(
                f"{path} sets {key}, an argument of timm's upstream train.py only; "
                "remove it or pass that script's path: timm /path/to/train.py ..."
            )
    if not unknown:
        return []
    return [f"{path}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)} ignored"]


def values_of(parser: argparse.ArgumentParser, config: dict[str, Any], path: str) -> dict[str, Any]:
    """Return what `parser` makes of a YAML file's values; null is as if the key were not there.

    Raises:
        LskdError: a value that the argument does not take.
    """
    actions = {action.dest: action for action in parser._actions}
    unset = object()
    found = argparse.Namespace(**dict.fromkeys(actions, unset))
    argv: list[str] = []
    for key, value in config.items():
        action = actions[key]
        flag = action.option_strings[-1] if action.option_strings else ""
        kind: type | tuple[type, ...] = (int, float, str)
        wanted = "one value"
        if action.nargs == 0:
            kind, wanted = bool, "true or false"
        elif isinstance(action.default, dict):
            kind, wanted = dict, "a mapping"
        elif action.nargs in ("+", "*") or isinstance(action.nargs, int):
            kind, wanted = list, "a list"
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise LskdError(f"{path}: {key} must be {wanted}, got {value!r}.")
        if isinstance(value, bool):
            argv += [flag] * value
        elif isinstance(value, dict):
            setattr(found, key, value)
        elif isinstance(value, list):
            argv += [flag, *map(_text, value)]
        else:
            argv.append(f"{flag}={_text(value)}" if flag else _text(value))
    try:
        parser.parse_args(argv, found)
    except LskdError as error:
        text = re.sub(r"^--([\w-]+)(?= must)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise LskdError(f"{path}: {text}") from None
    return {key: value for key in config if (value := getattr(found, key)) not in (unset, None)}


def _text(value: Any) -> str:
    """Return a value as on a command line: 90.0 is a whole number, too."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
