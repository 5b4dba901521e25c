"""``lskd recipe``: what recipes there are, and what is in them."""

from typing import Annotated

import typer

from lskd import LskdError

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
