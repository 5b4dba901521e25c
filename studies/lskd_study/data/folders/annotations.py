"""JSON annotations: read, and complained about in one line."""

from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import parse_json, read_bytes
from lskd_study.data.expected import PUBLISHED
from lskd_study.data.folders.archives import check_md5, find_source, read_members

LIMIT = 512 << 20  # bytes; the list of the million images of iMaterialist has about 200 MB


def read_json(source: Path, name: str, dataset: str, checksum: bool = True) -> dict[str, Any]:
    """Return what the file ``name`` in ``source`` says; it may lie in ``name.tar.gz``, whose MD5 comes first.

    Raises:
        LskdError: for a file that is missing, too large, another than the publisher's or no JSON object.
    """
    file = find_source(source, (name, f"{name}.tar.gz"), dataset)
    if file.name == name:
        text = read_bytes(file, LIMIT, "a list of annotations", "get it again")
    else:
        if checksum and file.name in PUBLISHED[dataset].md5:
            check_md5(None, file, PUBLISHED[dataset].md5[file.name])
        found = (m.read(LIMIT) for m in read_members(file) if m.name.rpartition("/")[2] == name)
        text = next(found, b"")
        if not text:
            raise LskdError(f"{file} has no {name}; get it again")
    try:
        content = parse_json(text.decode())
    except ValueError as error:
        raise LskdError(f"{file} is no JSON, or is cut short ({error}); get it again") from None
    if not isinstance(content, dict):
        raise LskdError(f"{file} is not a list of annotations; get it again")
    return content


def only_name(text: Any, where: Path | str) -> str:
    """Return a file name that is nothing else: no folder, nothing that leads elsewhere.

    Raises:
        LskdError: for anything else.
    """
    if not isinstance(text, str) or not text or "/" in text or "\0" in text or text[0] == ".":
        raise LskdError(f"{where} names an image {text!r}; that is no file name")
    return text
