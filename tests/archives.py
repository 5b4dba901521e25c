"""Tar archives of members that are given by name."""

import io
import tarfile
from pathlib import Path


def pack(file: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file
