"""``lskd doctor``: what is usable here, which versions, and how to get what is missing."""

import importlib
import importlib.util
import json
import pkgutil
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal

from lskd.base.install import how_to_install
from lskd_study.base import provenance
from lskd_study.base.extras import missing_study_modules

State = Literal["usable", "missing", "planned", "broken"]


@dataclass(frozen=True)
class Finding:
    """One part of lskd: its state, what was found, and what to do if that is not enough."""

    part: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Report:
    """All findings."""

    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether nothing is broken; a part that is not installed is no defect."""
        return all(finding.state != "broken" for finding in self.findings)


@dataclass(frozen=True)
class Adapter:
    """A framework's name, the distributions that provide it, and our package for it."""

    framework: str
    distributions: tuple[str, ...]
    package: str


ADAPTERS = (
    Adapter("timm", ("timm",), "timm_ls_kd"),
    Adapter("fairseq", ("ve-fairseq", "fairseq-fixed", "fairseq"), "fairseq_kd"),
    Adapter("mmcls", ("mmcls",), "mmcls_bnn"),
)


def diagnose() -> Report:
    """Look at this environment; imports the frameworks whose adapters are here, which takes some seconds."""
    checks: list[Callable[[], Finding]] = [_python, _core]
    checks += [partial(check_adapter, adapter) for adapter in ADAPTERS]
    checks += [_study, _chromium, _machine]
    return Report([check() for check in checks])


def render(report: Report, *, as_json: bool) -> str:
    """Return the report as a table, or as JSON."""
    if as_json:
        content: dict[str, Any] = {"healthy": report.healthy}
        content["parts"] = [asdict(finding) for finding in report.findings]
        return json.dumps(content, indent=2)
    width = max(len(finding.part) for finding in report.findings)
    lines = []
    for finding in report.findings:
        mend = f"; {finding.mend}" if finding.mend else ""
        lines.append(f"{finding.part:{width}}  {finding.state:8}  {finding.found}{mend}")
    return "\n".join(lines)


def check_adapter(adapter: Adapter) -> Finding:
    """Say whether an adapter and its framework are here, and whether they load."""
    part = f"{adapter.framework} adapter"
    version = next(filter(None, map(_version, adapter.distributions)), None)
    if not _has_modules(adapter.package):
        return Finding(part, "planned", _here(adapter, version), "the adapter is not in this release yet")
    if version is None:
        return Finding(part, "missing", _here(adapter, version), how_to_install(adapter.framework))
    try:
        importlib.import_module(adapter.framework)
        package = importlib.import_module(adapter.package)
        for name in getattr(package, "__all__", ()):  # a package imports its parts when they are asked for
            getattr(package, name)
    except Exception as error:  # whatever a framework raises at import is the finding
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(part, "broken", reason, how_to_install(adapter.framework, "--force-reinstall"))
    return Finding(part, "usable", _here(adapter, version))


def _here(adapter: Adapter, version: str | None) -> str:
    return f"{adapter.framework} {version}" if version else f"{adapter.framework} is not installed"


def _has_modules(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return bool(locations) and any(pkgutil.iter_modules(locations))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    return Finding("python", "usable", platform.python_version())


def _core() -> Finding:
    import torch

    from lskd.kernel.native import has_compiled_loss

    found = f"lskd {_version('lskd') or 'not installed'}, torch {torch.__version__}"
    if has_compiled_loss():
        return Finding("core", "usable", f"{found}, compiled loss")
    mend = "on a CPU the loss is three times slower; for more install a C compiler (cc), then lskd again"
    return Finding("core", "usable", f"{found}, without the compiled loss", mend)


def _study() -> Finding:
    missing = missing_study_modules()
    if missing:
        return Finding("study", "missing", f"without {', '.join(missing)}", how_to_install("study"))
    return Finding(
        "study", "usable", f"snakemake {_version('snakemake')}, matplotlib {_version('matplotlib')}"
    )


def find_chromium() -> str | None:
    """Return the path of a Chromium with its driver, which the test of the page needs."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    return browser if browser and shutil.which("chromedriver") else None


def _chromium() -> Finding:
    browser = find_chromium()
    if browser is None:
        return Finding(
            "chromium", "missing", "only the test of the page needs it", "apt install chromium-driver"
        )
    return Finding("chromium", "usable", browser)


def _machine() -> Finding:
    import torch

    machine = provenance.hardware()
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    threads = f"{torch.get_num_threads()} torch threads"
    return Finding("machine", "usable", f"{machine['cpu']}, {machine['cores']} cores, {threads}, {gpus}")
