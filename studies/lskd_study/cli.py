"""The ``lskd`` command."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lskd import LskdError
from lskd_study import figure_command, recipe_command, soft_labels_command
from lskd_study.data import command as data_command
from lskd_study.data.command import say
from lskd_study.index_command import index
from lskd_study.stability_command import stability

app = typer.Typer(
    help="Does a label-smoothed teacher distil a better student? On your data, with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Make data sets: image folders (train/<class>/, val/<class>/) and parallel text for fairseq.",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")
data_app.add_typer(data_command.app)
app.add_typer(figure_command.app, name="figure")
app.add_typer(soft_labels_command.app, name="soft-labels")
app.add_typer(recipe_command.app, name="recipe")


@app.callback()
def _lskd() -> None:
    """Keep sub-commands even where there is one only."""


DataBin = Annotated[
    Path | None, typer.Option(help="Folder for fairseq-preprocess' output too, made in the same step.")
]


@data_app.command()
def digits(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/digits"),
) -> None:
    """Write scikit-learn's 1,797 handwritten digits as PNG images, with a fixed split."""
    from lskd_study.data.digits import prepare_digits

    say(output, *prepare_digits(output))


@data_app.command()
def iwslt14(
    archive: Annotated[Path, typer.Option(help="The publisher's de-en.tgz.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/iwslt14_de_en"),
    data_bin: DataBin = None,
) -> None:
    """Write IWSLT'14 German-English as fairseq's prepare script does, with joint subwords."""
    from lskd_study.data.iwslt14 import EXPECTED, prepare_iwslt14

    manifest, written = prepare_iwslt14(output, archive)
    _binarise_or_say(output, manifest, written, data_bin, {})
    if not manifest.get("sizes_as_expected"):
        print(f"lskd: warning: expected {EXPECTED}; the archive is not the one of 2014", file=sys.stderr)


@data_app.command()
def ding(
    file: Annotated[
        Path, typer.Option(help="The dictionary; Debian's package trans-de-en installs it there.")
    ] = Path("/usr/share/trans/de-en"),
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/ding_de_en"),
    sentences_only: Annotated[bool, typer.Option(help="Train on whole sentences alone.")] = False,
    held_out: Annotated[int, typer.Option(help="Sentences in each of valid and test.")] = 1000,
    bpe_tokens: Annotated[int, typer.Option(help="Subwords to learn.")] = 10_000,
    data_bin: DataBin = None,
) -> None:
    """Write the German-English text of the Ding dictionary: sentences and phrases, with a fixed split."""
    from lskd_study.data.ding import prepare_ding

    options = {"sentences-only": sentences_only, "held-out": held_out, "bpe-tokens": bpe_tokens}
    made = prepare_ding(output, file, sentences_only, bpe_tokens, held_out)
    _binarise_or_say(output, *made, data_bin, options)


@data_app.command()
def number_words(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/number_words_de_en"),
    train: Annotated[int, typer.Option(help="Training pairs.")] = 20_000,
    valid: Annotated[int, typer.Option(help="Validation pairs.")] = 500,
    test: Annotated[int, typer.Option(help="Test pairs.")] = 500,
    bpe_tokens: Annotated[int, typer.Option(help="Subwords to learn.")] = 200,
    seed: Annotated[int, typer.Option(help="Which numbers.")] = 1,
    data_bin: DataBin = None,
) -> None:
    """Write numbers below a million in German and English words; needs no data at all."""
    from lskd_study.data.number_words import prepare_number_words

    options = {"train": train, "valid": valid, "test": test, "bpe-tokens": bpe_tokens, "seed": seed}
    made = prepare_number_words(output, train, valid, test, bpe_tokens, seed)
    _binarise_or_say(output, *made, data_bin, options)


def _binarise_or_say(
    output: Path,
    manifest: dict[str, Any],
    written: bool,
    data_bin: Path | None,
    options: Mapping[str, bool | int | str],
) -> None:
    """Say what was written, and binarise it or print the command that does."""
    pairs = manifest["pairs"]
    state = "written" if written else "already there"
    print(
        f"{output}: {pairs['train']} training, {pairs['valid']} validation and {pairs['test']} test pairs, "
        f"{state}"
    )
    if data_bin is not None:
        from lskd_study.data.data_bin import write_data_bin

        binarised = write_data_bin(data_bin, output, manifest, options)
        print(f"{data_bin}: data-bin, {'written' if binarised else 'already there'}")
        return
    print(
        f"next: fairseq-preprocess -s de -t en --trainpref {output}/train --validpref {output}/valid "
        f"--testpref {output}/test --destdir {output}-bin"
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def study(
    context: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]", help="Study file, e.g. recipes/digits/study.yaml.", show_default=False
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
    hours: Annotated[
        float | None,
        typer.Option(min=0.01, help="With --own: what it may take; 1, with a GPU 12.", show_default=False),
    ] = None,
) -> None:
    """Run a study, or go on with one, and write its page. Other options go to Snakemake (--profile slurm)."""
    options = [option for option in context.args if option != "--"]
    if schema:
        from lskd_study.json_schema import schema_text

        print(schema_text(), end="")
        return
    if own is not None:
        from lskd_study.own.command import run_own

        if file is not None and not file.startswith("-"):
            raise LskdError(f"--own needs no study file; leave out {file}")
        options = [file, *options] if file else options
        raise typer.Exit(run_own(own, output, cores or 1, dry_run, yes, hours, options))
    if file is None:
        raise LskdError("name a study file, or a folder of images of your own by --own DIR")
    from lskd_study.engine import run_study

    raise typer.Exit(run_study(file, output, cores, dry_run, options))


app.command()(stability)
app.command()(index)


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which adapters are usable here, which versions there are, and how to get what is missing."""
    from lskd_study.doctor import diagnose, render

    report = diagnose()
    print(render(report, as_json=json_output))
    raise typer.Exit(0 if report.healthy else 1)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; what the user can mend is one line on stderr and exit status 2."""
    try:
        status = app(args=arguments, prog_name="lskd", standalone_mode=False)
    except LskdError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        # Errors of the command line itself; their class is click's or typer's, depending on typer's version.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # the help was printed instead
            return 2
        return _fail(" ".join(str(error.format_message()).split()))
    if status == 130:  # what typer makes of Ctrl-C
        print("lskd: stopped; the same command goes on from here", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    print(f"lskd: error: {message}", file=sys.stderr)
    return 2
