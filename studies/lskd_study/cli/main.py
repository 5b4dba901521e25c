"""The ``lskd`` command."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from lskd import LskdError
from lskd.base.files import full_disk
from lskd.errors import from_outside, printable
from lskd_study.base.extras import not_installed
from lskd_study.cli import figure, recipe, soft_labels
from lskd_study.cli.export import export
from lskd_study.cli.index import index
from lskd_study.cli.stability import stability
from lskd_study.data import commands as data

MAX_SEEDS = 20

app = typer.Typer(
    help="Does a label-smoothed teacher distil a better student? On your data, with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, group in {"data": data, "figure": figure, "soft-labels": soft_labels, "recipe": recipe}.items():
    app.add_typer(group.app, name=name)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def study(
    context: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="Study file, recipe's name, or output folder of a study, e.g. recipes/digits/study.yaml.",
            show_default=False,
        ),
    ] = None,
    own: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Instead of a file: images of your own, train/<class>/, val/<class>/."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of results instead of the study file's.")] = None,
    cores: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time (threads x runs on this machine); 1 unless on a cluster."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Print what there is to do.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of study files, for editors.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --own: do not ask before training.")] = False,
    until_decided: Annotated[
        bool,
        typer.Option("--until-decided", help="Add seeds, by a rule that keeps the 5 %, until it is decided."),
    ] = False,
    max_seeds: Annotated[
        int | None, typer.Option(min=3, help="With --until-decided: the most seeds; 20.")
    ] = None,
    variance_from: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Results of a similar study: how much its seeds vary says what this can tell."
        ),
    ] = None,
    check_results: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Instead of a file: compute published studies' figures anew, from their files.",
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.01, help="With --own: the most hours; 1, with a GPU 12.", show_default=False),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, max=1000, help="With --own: how many seeds; 5.", show_default=False)
    ] = None,
    smoothing: Annotated[
        str | None,
        typer.Option(
            metavar="A,B[,...]", help="With --own: the teachers' smoothing; 0,0.1.", show_default=False
        ),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER[,STUDENT...]", help="With --own: timm's names of networks.", show_default=False
        ),
    ] = None,
) -> None:
    """Run a study, or go on with one, and write its page. Other options go to Snakemake (--profile slurm)."""
    options = [option for option in context.args if option != "--"]
    if schema:
        from lskd_study.plan.json_schema import schema_text

        print(schema_text(), end="")
        return
    if check_results is not None:
        from lskd_study.study.check_results import check_results as check

        print(check(check_results))
        return
    if max_seeds is not None and not until_decided:
        raise LskdError("--max-seeds is for --until-decided; the seeds of a study stand in its file")
    most = (max_seeds or MAX_SEEDS) if until_decided else None
    if own is not None:
        from lskd_study.study.own import run_own
        from lskd_study.study.own_choice import Asked

        if file is not None and not file.startswith("-"):
            raise LskdError(f"--own needs no study file; leave out {file}")
        options = [file, *options] if file else options
        status = run_own(
            own,
            output,
            cores or 1,
            dry_run,
            yes,
            hours,
            options,
            asked=Asked.read(seeds, smoothing, models),
            max_seeds=most,
            variance_from=variance_from,
        )
        raise typer.Exit(status)
    for name, value in {"hours": hours, "seeds": seeds, "smoothing": smoothing, "models": models}.items():
        if value is not None:
            raise LskdError(f"--{name} is for --own; what a study does stands in its file")
    if file is None:
        raise LskdError("name a study file, or a folder of images of your own by --own DIR")
    from lskd_study.study.engine import run_study

    status = run_study(file, output, cores, dry_run, options, max_seeds=most, variance_from=variance_from)
    raise typer.Exit(status)


app.command()(stability)
app.command()(index)
app.command()(export)


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print which adapters are usable here, which versions there are, and how to get what is missing."""
    from lskd_study.cli.doctor import diagnose, is_healthy, render

    findings = diagnose()
    print(render(findings, as_json=json_output))
    raise typer.Exit(0 if is_healthy(findings) else 1)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; what the user can fix is one line on stderr and exit status 2."""
    try:
        status = app(args=arguments, prog_name="lskd", standalone_mode=False)
    except LskdError as error:
        if status := getattr(error, "status", 0):  # a study that was asked to stop
            with contextlib.suppress(OSError):  # SIGHUP: there may be no terminal any more
                print(f"lskd: {printable(str(error))}", file=sys.stderr, flush=True)
            return int(status)
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if (missing := not_installed(error)) is None:
            raise
        return _fail(str(missing))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        if (ours := from_outside(error) or full_disk(error)) is not None:
            return _fail(str(ours))
        # Errors of the command line itself; their class is click's or typer's, depending on typer's version.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # the help was printed instead
            return 2
        return _fail(str(error.format_message()))
    if status == 130:  # what typer makes of Ctrl-C
        print("lskd: stopped; the same command goes on from here", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    print(f"lskd: error: {printable(message)}", file=sys.stderr)
    return 2
