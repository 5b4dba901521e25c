"""Every block of Python on the errata page runs, and says what the text says."""

import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).parents[2] / "docs" / "errata.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^### (E\d\d) .+?(?=^##|\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

SECTIONS = {match[1]: match[0] for match in SECTION.finditer(PAGE)}
BLOCKS = [
    pytest.param(block, id=f"{entry}-{number}")
    for entry, text in SECTIONS.items()
    for number, block in enumerate(BLOCK.findall(text))
]


@cache
def run(block: str) -> str:
    """Run a block, whose assertions are its test, and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(block, "errata.md", "exec"), {"__name__": "errata"})
    return output.getvalue()


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str) -> None:
    assert "assert " in block
    run(block)


def test_every_block_is_in_an_entry() -> None:
    assert len(BLOCKS) == PAGE.count("```python") > 10
    assert PAGE.count("```") == 2 * len(BLOCKS)


def test_entries_are_numbered_once_and_all_cross_references_exist() -> None:
    numbers = re.findall(r"^### (E\d\d)", PAGE, re.MULTILINE)
    assert numbers == [f"E{i:02}" for i in range(1, len(numbers) + 1)]
    assert set(re.findall(r"\bE\d\d\b", PAGE)) == set(numbers)


def test_known_inconsistencies_have_an_entry() -> None:
    known = yaml.safe_load(Path(__file__).with_name("known_inconsistencies.yaml").read_text(encoding="utf-8"))
    assert {entry["errata"] for entry in known} <= SECTIONS.keys()


def test_numbers_of_the_simulation_are_those_in_the_table() -> None:
    (block,) = BLOCK.findall(SECTIONS["E07"])
    printed = run(block).splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in SECTIONS["E07"].splitlines()]
    table = {cells[0]: [float(x) for x in cells[1:]] for cells in rows if cells[0].endswith(" rivals")}
    assert len(table) == len(printed) == 2
    for line in printed:
        name, *values = line.split(" | ")
        assert [float(x) for x in values] == pytest.approx(table[name], abs=0.003)
