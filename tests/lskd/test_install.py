"""What messages say about parts that are not installed must work: lskd is on no package index."""

import json
import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lskd.base import install
from lskd.base.install import how_to_install

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


def test_in_a_checkout_it_is_the_checkout():
    here = shlex.quote(str(ROOT))
    assert how_to_install("timm") == f"cd {here} && pip install -c constraints.txt -e '.[timm]'"
    assert " pip install --force-reinstall -c " in how_to_install("study", "--force-reinstall")


def test_elsewhere_it_is_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "_CHECKOUT", tmp_path)
    wheel = tmp_path / "a b" / "lskd-0.1.0-py3-none-any.whl"

    class Distribution:
        note: str | None = json.dumps({"url": wheel.as_uri(), "archive_info": {}})

        def read_text(self, name: str) -> str | None:
            return self.note

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution)
    monkeypatch.setattr(Distribution, "read_text", lambda name: Distribution.note)
    assert how_to_install("timm") == "pip install 'THE_WHEEL_OF_LSKD.whl[timm]'"
    wheel.parent.mkdir()
    wheel.touch()
    assert how_to_install("timm") == f"pip install '{wheel}[timm]'"
    for note in (None, "[]", "{", '{"url": 3}'):
        Distribution.note = note
        assert how_to_install("timm") == "pip install 'THE_WHEEL_OF_LSKD.whl[timm]'"


def test_nobody_is_sent_to_an_index():
    """Every extra that a message names is one, and none comes from where there is no lskd."""
    sources = [
        path
        for part in ("common", "plugins", "studies", "docs", "recipes")
        for path in (ROOT / part).rglob("*")
    ]
    for path in (*sources, ROOT / "README.md"):
        if path.suffix in {".py", ".md", ".yaml"}:
            assert not re.search(r"pip install [^\n]*lskd\[", path.read_text(encoding="utf-8")), path


def test_the_lock_has_what_the_constraints_have():
    """With the hash of each file, for the platform that is tested."""
    locked = dict(
        re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups()
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    )
    locked = {canonicalize_name(name): version for name, version in locked.items()}
    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    lines = (line.partition(" #")[0] for line in (ROOT / "constraints.txt").read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in wanted:
        if pin.marker is None or pin.marker.evaluate(linux):
            assert pin.specifier.contains(locked[canonicalize_name(pin.name)]), pin
