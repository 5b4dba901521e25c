"""``lskd export``: a trained network to take away."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder of a study (runs/digits): its best student; or of one of its runs, teachers too.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write; export/<run> in the study's folder."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the best student; without it the one with the median score."),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write it as ONNX too, or not.")] = True,
) -> None:
    """Write a run's network: safetensors, configuration, ONNX and a model card with the verdict behind it."""
    from lskd_study.export.folder import export as write

    print(write(run, output, seed, onnx))
