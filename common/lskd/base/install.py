"""How what is missing is installed: lskd is on no package index, so from where it came."""

import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

_CHECKOUT = Path(__file__).resolve().parents[3]


def how_to_install(extra: str, options: str = "") -> str:
    """Return the pip command that installs an extra of lskd: from this checkout, or from the wheel it is."""
    pip = f"pip install {options} " if options else "pip install "
    if all((_CHECKOUT / name).is_file() for name in ("pyproject.toml", "constraints.txt")):
        return f"cd {shlex.quote(str(_CHECKOUT))} && {pip}-c constraints.txt -e '.[{extra}]'"
    return f"{pip}{shlex.quote(f'{_wheel()}[{extra}]')}"


def _wheel() -> str:
    """Return the file that lskd was installed from, as pip noted it; a stand-in where it is gone."""
    try:
        noted = json.loads(metadata.distribution("lskd").read_text("direct_url.json") or "{}")
        path = Path(unquote(urlsplit(str(noted["url"])).path))
        if path.is_file():
            return str(path)
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        pass
    return "THE_WHEEL_OF_LSKD.whl"
