"""Texts of JSON, YAML and tables with any value in any place."""

import copy
import csv
import functools
import io
import json
import random
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz.attacks import NAMES

_ODD = (
    *(0, -1, 1, 2, 7, 0.5, -0.0, 1e300, -1e-300, 10**12, 2**31, 2**63, -(2**63), 10**400, True, False, None),
    *(
        "",
        "x",
        "1",
        "0.1",
        "nan",
        "inf",
        "-1",
        "true",
        "é" * 300,
        "\x1b[2J\n",
        "\u2028",
        "../../x",
        "/dev/zero",
    ),
    *("a" * 5000, "${a}", "\ud800", [], {}, [[]], {"": {}}, *NAMES),
)
_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=20),
        st.sampled_from(_ODD),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@functools.cache
def pool() -> list[Any]:
    """Return values of every kind, the same in every process."""
    found: list[Any] = list(_ODD)

    @seed(18)
    @settings(
        max_examples=100,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_VALUES)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def in_json(also: Callable[[Any], None] = lambda content: None) -> Callable[[random.Random, bytes], bytes]:
    """Return what varies a JSON text in its structure; ``also``: makes a checksum fit again, say."""
    pool()  # once, before any fork

    def vary(dice: random.Random, data: bytes) -> bytes:
        content = json.loads(_as_json(data))
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            content = _vary(dice, content)
        if isinstance(content, dict) and dice.random() < 0.8:
            also(content)
        return json.dumps(content).encode()

    return vary


@functools.lru_cache(64)
def _as_json(data: bytes) -> str:
    """Return YAML, of which JSON is a part, as JSON."""
    try:
        json.loads(data)
        return data.decode()
    except ValueError:
        return json.dumps(yaml.safe_load(data))


def _vary(dice: random.Random, content: Any) -> Any:
    places = list(_places(content))
    value = copy.deepcopy(dice.choice(pool()))  # a change in it is no change of the pool
    if not places:
        return value
    owner, key = dice.choice(places)
    match dice.randrange(8):
        case 0:
            del owner[key]
        case 1:
            other, there = dice.choice(places)
            owner[key] = json.loads(json.dumps(other[there]))
        case 2 if isinstance(owner, dict):
            owner[value if isinstance(value, str) else str(key)[1:]] = owner.pop(key)
        case 3 if isinstance(number := owner[key], int | float):
            third = max(-1e300, min(number, 1e300)) / 3
            owner[key] = dice.choice(
                (-number, number + 1, number * 10, third, str(number), [number], bool(number))
            )
        case 4 if isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        case _:
            owner[key] = value
    return content


def _places(content: Any) -> Any:
    parts = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(parts):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def in_csv(dice: random.Random, data: bytes) -> bytes:
    """Vary a table in its cells, rows and columns."""
    rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
    for _ in range(dice.choice((1, 1, 2, 4))):
        row = dice.choice(rows)
        match dice.randrange(5):
            case 0:
                rows.append(list(row))
            case 1 if len(rows) > 1:
                rows.remove(row)
            case 2 if row:
                row.pop(dice.randrange(len(row)))
            case 3:
                row.append("1")
            case _ if row:
                row[dice.randrange(len(row))] = str(dice.choice(pool()))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")
