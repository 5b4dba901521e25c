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


def apply_config(parser: argparse.ArgumentParser, config: dict[str, Any], path: str) -> list[str]:
    """Make the values of `config`, read as the command line would be, the parser's defaults.

    Returns:
        Warnings, one line each: keys that the trainer does not know.

    Raises:
        LskdError: a value that the argument does not take, or an upstream-only argument that is set.
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
    return {
        key: _value_of(parser, actions[key], value, path)
        for key, value in config.items()
        if value is not None
    }


def _value_of(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, path: str) -> Any:
    def require(kind: type | tuple[type, ...], item: Any, wanted: str) -> None:
        if not isinstance(item, kind) or isinstance(item, bool) != (kind is bool):
            raise LskdError(f"{path}: {action.dest} must be {wanted}, got {value!r}.")

    def convert(item: Any, wanted: str) -> Any:
        require((int, float, str), item, wanted)
        # As on a command line, where 90.0 is a whole number, too.
        text = str(int(item) if isinstance(item, float) and item.is_integer() else item)
        try:
            result = parser._get_value(action, text)
            parser._check_value(action, result)
        except argparse.ArgumentError as error:
            try:
                parser.error(str(error))
            except LskdError as refused:
                named = re.sub(r"^--[\w-]+(?= must)", action.dest, str(refused))
                raise LskdError(f"{path}: {named}") from None
        return result

    if action.nargs == 0:
        require(bool, value, "true or false")
        return value
    if isinstance(action.default, dict):
        require(dict, value, "a mapping")
        return value
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        wanted = f"a list of {action.nargs}" if isinstance(action.nargs, int) else "a list"
        require(list, value, wanted)
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise LskdError(f"{path}: {action.dest} must be {wanted}, got {value!r}.")
        return [convert(item, f"{wanted}, each one value") for item in value]
    return convert(value, "one value")
