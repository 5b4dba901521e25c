"""JSON annotations: read, and complained about in one line."""

from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.files import parse_json
from lskd_study.data._archives import find_source, read_members


def read_json(source: Path, name: str, dataset: str) -> dict[str, Any]:
    """Return what the file ``name`` in ``source`` says; it may lie in ``name.tar.gz``.

    Raises:
        LskdError: for a file that is missing or is no JSON object.
    """
    file = find_source(source, (name, f"{name}.tar.gz"), dataset)
    if file.name == name:
        try:
            text = file.read_bytes()
        except OSError as error:
            raise LskdError(f"{file} cannot be read ({error.strerror})") from None
    else:
        texts = [m.read() for m in read_members(file) if m.name.rpartition("/")[2] == name]
        if not texts:
            raise LskdError(f"{file} has no {name}; get it again")
        text = texts[0]
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
