"""Arguments that several data sets share, as the command line shows them; None stands for the default.

A data set is declared once, by the function that makes it: `lskd data` reads its name, its arguments and the
first line of its docstring.
"""

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[Path, typer.Argument(help="Folder with the publisher's files, see docs/data.md.")]
OfFolder = Annotated[Path, typer.Argument(help="Image folder: train/<class>/ and val/<class>/.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
OutputBeside = Annotated[
    Path | None,
    typer.Option(help="Folder to write.", show_default="beside the source, with the command's name"),
]
Copy = Annotated[bool, typer.Option("--copy", help="Copy files where links would do.")]
NoChecksum = Annotated[bool, typer.Option("--no-checksum", help="Do not compute the archives' MD5.")]
Expect = Annotated[
    str | None,
    typer.Option(help="Numbers of images instead of the published ones: train=N,val=N,classes=N."),
]
Seed = Annotated[int, typer.Option(help="Of the random draws.")]
Lists = Annotated[
    Path | None, typer.Option(help="Folder of the published text lists.", show_default="the source")
]
EvaluateOn = Annotated[str, typer.Option(help="The list that becomes val/: val (the paper's) or test.")]
Subwords = Annotated[int, typer.Option(help="Subwords to learn.")]
