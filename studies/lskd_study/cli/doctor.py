"""``lskd doctor``: what is usable here, which versions, and how to get what is missing."""

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Literal

from lskd.base.install import how_to_install
from lskd_study.base import provenance
from lskd_study.base.extras import STUDY_MODULES, missing_modules

State = Literal["usable", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One part of lskd: its state, what was found, and what to do if that is not enough."""

    part: str
    state: State
    found: str
    fix: str = ""


# The first patch release without CVE-2025-4517, -8194 (tarfile) and -8291 (zipfile).
_SAFE_PATCH = {(3, 11): 14, (3, 12): 12}

# Each framework's name, the distributions that provide it, and our package for it.
MMPRETRAIN = ("onedl-mmpretrain", "mmpretrain")
ADAPTERS = (
    ("timm", ("timm",), "timm_ls_kd"),
    ("fairseq", ("ve-fairseq", "fairseq-fixed", "fairseq"), "fairseq_kd"),
    ("mmcls", ("mmcls", *MMPRETRAIN), "mmcls_bnn"),
)


def diagnose() -> list[Finding]:
    """Return what is here of each part; imports the frameworks that are here, which takes some seconds."""
    adapters = [check_adapter(*adapter) for adapter in ADAPTERS]
    here = [_core(), *adapters, _binary_layers(), _study(), _machine()]
    return [check_python(*sys.version_info[:3]), *here]


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing is broken; a part that is not installed is no defect."""
    return all(finding.state != "broken" for finding in findings)


def render(findings: Sequence[Finding], *, as_json: bool) -> str:
    """Return the findings as a table, or as JSON."""
    if as_json:
        content = {"healthy": is_healthy(findings), "parts": [asdict(finding) for finding in findings]}
        return json.dumps(content, indent=2)
    width = max(len(finding.part) for finding in findings)
    lines = []
    for finding in findings:
        fix = f"; {finding.fix}" if finding.fix else ""
        lines.append(f"{finding.part:{width}}  {finding.state:8}  {finding.found}{fix}")
    return "\n".join(lines)


def check_adapter(framework: str, distributions: Sequence[str], package: str) -> Finding:
    """Return whether an adapter's framework is here, by one of its distributions, and whether both load."""
    part = f"{framework} adapter"
    found = {name: version for name in distributions if (version := _version(name))}
    if not found:
        return Finding(part, "missing", f"{framework} is not installed", how_to_install(framework))
    name, version = next(iter(found.items()))
    logging.disable()  # of what a framework advises at import, this is not about
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module(framework if name not in MMPRETRAIN else "mmpretrain")
            adapter = importlib.import_module(package)
            for one in getattr(adapter, "__all__", ()):  # a package imports its modules when asked for them
                getattr(adapter, one)
    except Exception as error:  # whatever a framework raises at import is the finding
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(part, "broken", reason, how_to_install(framework, "--force-reinstall"))
    finally:
        logging.disable(logging.NOTSET)
    return Finding(part, "usable", f"{name if name in MMPRETRAIN else framework} {version}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_python(major: int, minor: int, patch: int) -> Finding:
    """Return whether this Python reads archives safely."""
    version, safe = f"{major}.{minor}.{patch}", _SAFE_PATCH.get((major, minor), 0)
    if patch >= safe:
        return Finding("python", "usable", version)
    found = f"{version}, whose tarfile and zipfile have known holes"
    return Finding(
        "python", "usable", found, f"before reading strangers' archives install {major}.{minor}.{safe}"
    )


def _core() -> Finding:
    import torch

    from lskd.kernel.native import has_compiled_loss

    found = f"lskd {_version('lskd') or 'not installed'}, torch {torch.__version__}"
    if has_compiled_loss():
        return Finding("core", "usable", f"{found}, compiled loss")
    fix = "on a CPU the loss is three times slower; for more install a C compiler (cc), then lskd again"
    return Finding("core", "usable", f"{found}, without the compiled loss", fix)


def _binary_layers() -> Finding:
    from mmcls_bnn.binary import bits

    with warnings.catch_warnings(action="ignore"):  # the finding says it
        build, builds = bits.build(), bits.builds()
    if build is not None:
        return Finding("binary layers", "usable", f"compiled xnor, {build} of {', '.join(builds)}")
    fix = "for faster binary students install a C compiler (cc), then lskd again"
    return Finding("binary layers", "usable", "by torch, without the compiled xnor", fix)


def _study() -> Finding:
    missing = missing_modules(STUDY_MODULES)
    if missing:
        return Finding("study", "missing", f"without {', '.join(missing)}", how_to_install("study"))
    return Finding(
        "study", "usable", f"snakemake {_version('snakemake')}, matplotlib {_version('matplotlib')}"
    )


def _machine() -> Finding:
    import torch

    machine = provenance.hardware()
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    threads = f"{torch.get_num_threads()} torch threads"
    return Finding("machine", "usable", f"{machine['cpu']}, {machine['cores']} cores, {threads}, {gpus}")
