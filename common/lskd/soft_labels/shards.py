"""Soft labels that several jobs wrote, each a shard, put together into one store."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lskd.errors import SoftLabelsError
from lskd.soft_labels.format import check_identity, parsed_shard, read_manifest, shard_folders
from lskd.soft_labels.forms import TEACHER_FORM, form_of_store
from lskd.soft_labels.store import SoftLabels, SoftLabelsWriter


def merge_shards(folder: str | Path) -> SoftLabels:
    """Make the store in ``folder`` of the shards in there, whose blocks are all checked before.

    The rows are copied and the shards stay. A merge that was killed goes on where it stopped.

    Returns:
        The store: the same files, byte for byte, as one job would have written.

    Raises:
        SoftLabelsError: a shard is missing, unfinished, damaged, there twice or does not belong to the
            others; nothing is written then. Or the disk cannot take it.
    """
    folder = Path(folder)
    shards = _shards(folder)
    for shard in shards:
        shard.verify()
    first = shards[0]
    layout = replace(first.layout, shard="")
    with SoftLabelsWriter(folder, layout, first.identity, merging=True) as writer:
        for shard in shards:
            writer.copy(shard, start=max(writer.keys - shard.layout.first, 0))
    return SoftLabels(folder)


def _shards(folder: Path) -> list[SoftLabels]:
    """Return all shards in their order, or say what is wrong with them."""
    found: dict[int, SoftLabels] = {}
    of = 0
    for path in shard_folders(folder):
        shard = SoftLabels(path, shard=read_manifest(path).layout.shard)
        number, count = parsed_shard(shard.layout.shard)
        first, of = next(iter(found.values()), shard), of or count
        if number in found or count != of:
            other = found.get(number, first)
            raise SoftLabelsError(
                f"{path} (shard {shard.layout.shard}) overlaps with {other.path} (shard "
                f"{other.layout.shard}); remove the one that does not belong there"
            )
        check_identity(path, _compared(shard), _compared(first), f"{first.path} beside them")
        check_identity(first.path, _compared(first), _compared(shard), f"{path} beside them")
        found[number] = shard
    if not found:
        raise SoftLabelsError(f"{folder} has no shards to merge; check the path")
    if missing := [number for number in range(1, of + 1) if number not in found]:
        named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise SoftLabelsError(f"{folder} lacks {len(missing)} of {of} shards ({named}); write them first")
    for shard in found.values():
        if not shard.complete:
            raise SoftLabelsError(
                f"{shard.path} is unfinished: {len(shard)} of {shard.layout.keys} keys; the command that "
                "wrote it goes on"
            )
    return [found[number] for number in sorted(found)]


def _compared(shard: SoftLabels) -> dict[str, Any]:
    """Return what shards must agree in: of a fast teacher its mode, not what was measured of it."""
    identity = shard.identity
    layout = replace(shard.layout, shard="")
    return {**identity, TEACHER_FORM: form_of_store(shard.path, identity).mode, "layout": vars(layout)}
