"""``lskd recipe``: what recipes there are, what is in them, and whether they still work."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lskd import LskdError
from lskd.base.install import how_to_install

app = typer.Typer(
    help="The recipes that come with lskd: each experiment of the paper, and some beyond it.",
    no_args_is_help=True,
)


@app.command("list")
def list_recipes() -> None:
    """Name the recipes: table or figure of the paper, ecosystem, number of runs, data."""
    from lskd_study.plan.recipes import catalogue, runs_and_data

    rows = [("NAME", "PAPER", "ECOSYSTEM", "RUNS", "DATA")]
    for recipe in catalogue():
        rows.append((recipe.name, recipe.place or "-", recipe.ecosystem, *runs_and_data(recipe)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="As `lskd recipe list` has it.")]) -> None:
    """Print a recipe's files, each with its path: what to run, what to expect, what is assumed."""
    from lskd_study.plan.recipes import find_recipe

    for number, path in enumerate(find_recipe(name).files):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise LskdError(
                f"{path} of recipe {name} cannot be read ({error.strerror}); restore it"
            ) from None
        print(f"{chr(10) if number else ''}==> {path} <==")
        print(text, end="" if text.endswith("\n") else "\n")


@app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Which recipes, or study files; none: all."),
    ] = None,
) -> None:
    """Build each recipe's real parts on a miniature of its data, take two steps and evaluate, on the CPU.

    Prints parameters, operations, the corners of the learning rate's curve and an estimate of GPU-hours.
    """
    from lskd_study.base.extras import require_study_extra
    from lskd_study.plan.recipes import catalogue, find_recipe

    recipes = [find_recipe(name) for name in names] if names else catalogue()
    require_study_extra()
    from lskd_study.recipe_check import Checks
    from lskd_study.recipe_check.report import footer

    failed = 0
    with tempfile.TemporaryDirectory(prefix="lskd-recipes-") as scratch:
        for outcome in Checks(Path(scratch)).check_all(recipes):
            if outcome.checked is not None:
                print(outcome.checked.text(), flush=True)
                continue
            problem = outcome.problem
            if outcome.missing:
                problem = f"{outcome.missing} is not installed; {how_to_install(outcome.missing)}"
                if not names:  # asked for by name it is an error, in the whole list it is none
                    print(f"{outcome.name}: not checked, {problem}", flush=True)
                    continue
            failed += 1
            about = "" if problem.startswith(outcome.name) else f"{outcome.name}: "
            print(f"lskd: error: {about}{problem}", file=sys.stderr, flush=True)
    if failed < len(recipes):
        print(footer())
    raise typer.Exit(2 if failed else 0)
