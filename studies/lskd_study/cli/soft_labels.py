"""``lskd soft-labels``: look at what a teacher said and is stored, check it, and have it written."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lskd import LskdError
from lskd.base.install import how_to_install

if TYPE_CHECKING:
    from lskd import SoftLabels

# For each ecosystem: packages of which one must be there, and the module that writes.
WRITERS = {
    "timm": (("timm",), ("timm_ls_kd", "soft-labels")),
    "fairseq": (("fairseq",), ("fairseq_kd.soft_labels",)),
    "mmcls": (("mmcls", "mmpretrain"), ("mmcls_bnn.soft_labels",)),
}

_SHOWN = 20  # damaged blocks that are named one by one

app = typer.Typer(
    help="Soft labels on disk: what a teacher said, written once and read by many students.",
    no_args_is_help=True,
)

_Folder = Annotated[str, typer.Argument(metavar="DIR", help="Folder of the soft labels, or its URL.")]


@app.command()
def info(
    folder: _Folder, json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Print what the soft labels in DIR are of, how far they got, and what they take.

    What is at a URL is copied into the user's cache folder first, as a training does.
    """
    labels, name, _ = _open(folder)
    content = describe(labels)
    if not json_output and (error := labels.own_error):
        content["own_error"] = str(error)
    print(json.dumps(content, indent=2) if json_output else _for_people(name, content))


@app.command()
def verify(folder: _Folder) -> None:
    """Check every block of every file in DIR against its checksum; exit status 2 where one is damaged.

    Of a URL the copy in the user's cache folder is checked, not what is at the URL now.
    """
    labels, name, fix = _open(folder)  # the manifest, the lengths of the files and the checksums themselves
    with typer.progressbar(labels.damages(), length=labels.blocks, label="blocks", file=sys.stderr) as bar:
        damages = [str(damage) for damage in bar if damage is not None]
    for line in damages[:_SHOWN]:
        print(line, file=sys.stderr)
    if damages:
        more = f", {len(damages) - _SHOWN} of them not shown" if len(damages) > _SHOWN else ""
        raise LskdError(f"{len(damages)} of {labels.blocks} blocks in {name} are damaged{more}{fix}")
    print(f"{name}: {labels.blocks} blocks, all as they were written; {_progress(describe(labels))}")


@app.command()
def merge(folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the shards.")]) -> None:
    """Make one store of the shards in DIR, which several jobs wrote (--kd-soft-labels-shard, --shard).

    Nothing is written unless all shards are there, complete, sound, and of one teacher, data and layout.

    The shards stay: remove them afterwards.
    """
    from lskd.soft_labels.remote import written_folder
    from lskd.soft_labels.shards import merge_shards

    labels = merge_shards(written_folder(folder))
    print(f"{folder}: {_progress(describe(labels))}; {folder}/shard-* can be removed")


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def write(
    context: typer.Context,
    ecosystem: Annotated[str, typer.Argument(metavar="timm|fairseq|mmcls")],
) -> None:
    """Have a teacher's soft labels written by the trainer's own command, which gets the other arguments.

    `lskd soft-labels write timm --help` shows those of timm.
    """
    if ecosystem in ("-h", "--help"):
        print(context.get_help())
        return
    if ecosystem not in WRITERS:
        raise LskdError(f"there is no writer for '{ecosystem}'; give one of {', '.join(WRITERS)}")
    packages, module = WRITERS[ecosystem]
    if not any(importlib.util.find_spec(package) for package in packages):
        raise LskdError(f"{ecosystem} is not installed here; {how_to_install(ecosystem)}")
    done = subprocess.run([sys.executable, "-m", *module, *context.args], check=False)
    raise typer.Exit(done.returncode)


def _open(folder: str) -> tuple["SoftLabels", str, str]:
    """Return soft labels, what to call them, and what helps where they are damaged."""
    from lskd import SoftLabels  # numpy takes a while
    from lskd.soft_labels.remote import local_folder, without_secrets

    local = local_folder(folder)
    if "://" not in folder:
        return SoftLabels(local), folder, ""
    name, fix = f"the copy of {without_secrets(folder)} in {local}", f"; remove {local}, it is copied again"
    try:
        return SoftLabels(local), name, fix
    except LskdError as error:
        raise LskdError(f"{name} cannot be read ({error}){fix}") from None


def describe(labels: "SoftLabels") -> dict[str, Any]:
    """Return the manifest's content with what is kept, and ``bytes`` in all and ``bytes_per_row``."""
    return labels.info() | {"bytes_per_row": labels.layout.row.itemsize, "kept": labels.layout.kept}


def _for_people(name: str, content: Mapping[str, Any]) -> str:
    layout = content["layout"]
    per_sample = layout["rows_per_sample"]
    size = content["bytes_per_row"] * (per_sample or 1)
    unit = "a sample and epoch" if per_sample else "a row (a target token)"
    error = content.get("own_error")
    lines = [
        ("soft labels", name),
        ("written", _progress(content)),
        ("classes", f"{content['kept']}, {layout['values']}"),
        (
            "rows",
            f"{per_sample} a sample" if per_sample else f"{content['written']['rows']}, any number a sample",
        ),
        ("seeds", "of the augmentation, in each row" if layout["seeds"] else "none"),
        ("size", f"{content['bytes'] / 2**20:.1f} MiB, {size} bytes {unit}"),
        ("error", error or "not measured"),
        *_flat(content["identity"]),
    ]
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:{width}}  {value}" for key, value in lines)


def _progress(content: Mapping[str, Any]) -> str:
    layout, written = content["layout"], content["written"]
    samples, epochs, keys = layout["samples"], layout["epochs"], written["keys"]
    if written["complete"]:
        unit = "view" if layout.get("views") else "epoch"
        return f"complete: {samples} samples, {epochs} {unit}{'s' * (epochs > 1)}"
    whole, rest = divmod(keys, max(samples, 1))
    return (
        f"unfinished: {keys} of {samples * epochs} "
        f"({whole} of {epochs} epochs and {rest} of {samples} samples); the command that wrote them goes on"
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append((prefix + name, "none" if value is None else " ".join(str(value).split())))
    return lines
