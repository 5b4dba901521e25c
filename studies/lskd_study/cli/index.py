"""``lskd index``: one page over several studies."""

from pathlib import Path
from typing import Annotated

import typer


def index(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR", help="Output folders of `lskd study`, e.g. runs/digits runs/cub200/table2."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Page to write; its links to the studies are relative.")
    ] = Path("studies.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Studies of label smoothing and distillation",
) -> None:
    """Write one page over several studies: each with its answer, verdicts, data and missing runs."""
    from lskd_study.base.extras import require_extra

    require_extra()
    from lskd_study.pages.index import write_index

    print(write_index(folders, output, title))
    print(output)
