"""Snakemake's command line for a study: profiles by name, the executor, cores, GPUs and progress."""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lskd import LskdError
from lskd.base.files import read_yaml, write_text
from lskd.base.install import how_to_install
from lskd_study.base import gpus, progress
from lskd_study.base.files import check_writable
from lskd_study.base.text import nearest
from lskd_study.plan.plan import Plan
from lskd_study.plan.recipes import recipes_folder
from lskd_study.runs.clusters import kubernetes_options, slurm_options

SNAKEFILE = Path(__file__).with_name("Snakefile")
LOCAL = frozenset({"local", "dryrun", "touch"})
_PROFILE_FILE = "config.yaml"


@dataclass(frozen=True)
class Schedule:
    """How Snakemake is called.

    Attributes:
        executor: who runs the jobs; ``local`` for this machine.
        options: what goes to Snakemake after lskd's own options.
        cores: for ``--cores``; None where the cluster's scheduler counts them.
        environment: variables to set for Snakemake and, on this machine, its jobs.
        speaks: whether Snakemake's own words were asked for; else they are in its log alone.
        copied: whether jobs share no files as Snakemake sees it, so that it sends them its Snakefile.
        inherited: file descriptors that it has to inherit.
    """

    executor: str
    options: list[str]
    cores: int | None
    environment: dict[str, str] = field(default_factory=dict)
    speaks: bool = False
    copied: bool = False
    inherited: tuple[int, ...] = ()

    def command(self, plan: Plan) -> list[str]:
        """Return the command that runs what is unfinished."""
        snakefile = plan.root / SNAKEFILE.name if self.copied else SNAKEFILE
        arguments = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)]
        arguments += ["--directory", str(plan.root), "--keep-going", "--rerun-triggers", "mtime"]
        if self.cores is not None:
            arguments += ["--cores", str(self.cores)]
        arguments += ["--quiet", "rules", "reason", "host"]
        # --nolock: Snakemake's lock is a file that outlives a kill. Ours is the kernel's, and the scheduler
        # inherits it, so a second study on this folder is refused exactly as long as a first one is alive.
        # --ignore-incomplete: a run's only declared output appears in one piece, so it cannot be incomplete.
        return [*arguments, "--nolock", "--ignore-incomplete", *self.options]

    def prepare(self, plan: Plan) -> None:
        """Write into the output folder what the jobs need there."""
        if self.copied:
            write_text(plan.root / SNAKEFILE.name, SNAKEFILE.read_text(encoding="utf-8"))

    def process_environment(self) -> dict[str, str]:
        """Return the environment of Snakemake's process."""
        # A study within a job of another one must not choose among that one's devices.
        inherited = {name: value for name, value in os.environ.items() if name != gpus.CANDIDATES}
        return {**inherited, "PYTHONUNBUFFERED": "1", **self.environment}


def make_schedule(plan: Plan, cores: int | None, options: Sequence[str]) -> Schedule:
    """Check the options meant for Snakemake and complete them.

    Raises:
        LskdError: for an option, a profile or an executor that is unknown or not installed, and for GPUs that
            are not there.
    """
    if cores is not None and cores < 1:
        raise LskdError(f"cores must be 1 or more, got {cores}")
    arguments, profiles = _with_profiles(options)
    _check_executor(arguments, profiles)
    check_snakemake_options(arguments)
    args = _parse(arguments, profiles)
    executor = args.executor or "local"
    speaks = bool(args.logger or args.verbose or args.printshellcmds)
    environment = {progress.VARIABLE: str(plan.root / progress.FILE), **_caches(plan.root)}
    if executor not in LOCAL:
        if args.jobs is None:
            raise LskdError(f"--executor {executor} needs --jobs N too, the number of jobs at a time")
        if executor == "slurm":
            arguments += slurm_options(args, plan.root)
        if executor == "kubernetes":
            arguments += kubernetes_options(args, plan)
        return Schedule(executor, arguments, cores, environment, speaks, executor == "kubernetes")
    given = {name: resource.value for name, resource in dict(args.resources).items()}
    # A finished study's page is made again on any machine.
    total, names = gpus.gpus_for_all(plan.resources if plan.unfinished() else {}, given.get("gpu"))
    if names:
        environment[gpus.CANDIDATES] = ",".join(names)
        if "gpu" not in given:
            others = [f"{name}={value}" for name, value in given.items()]
            arguments += ["--resources", *others, f"gpu={total}"]
    return Schedule(executor, arguments, cores or 1, environment, speaks)


def _caches(root: Path) -> dict[str, str]:
    """Return where Snakemake keeps its cache if it may not be the user's: a service has no home to write to.

    What others have stored there is still found.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    try:
        check_writable(cache / "snakemake" / "source-cache", folder=True)
    except LskdError:
        others = {"HF_HOME": cache / "huggingface", "TORCH_HOME": cache / "torch"}
        kept = {name: str(place) for name, place in others.items() if name not in os.environ}
        return {**kept, "XDG_CACHE_HOME": str(root.resolve() / ".snakemake")}
    return {}


def shipped_profiles() -> list[str]:
    """Return the names of the profiles that come with lskd."""
    return sorted(path.parent.name for path in (recipes_folder() / "profiles").glob(f"*/{_PROFILE_FILE}"))


def _with_profiles(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options, with a folder in place of the name of a profile of lskd's; and the profiles.

    A profile of the user's by that name, where Snakemake looks for one, comes first.
    """
    arguments = list(options)
    profiles = []
    for index, name, form in _values(arguments, "--profile"):
        folder = _profile(name)
        arguments[index] = form.format(folder)
        profiles.append(folder)
    return arguments, profiles


def _values(arguments: Sequence[str], option: str) -> Iterator[tuple[int, str, str]]:
    """Yield an option's values: where each stands, what it is, and how to write another one in its place."""
    for index, word in enumerate(arguments):
        if word.startswith(f"{option}="):
            yield index, word.partition("=")[2], f"{option}={{}}"
        elif word == option and index + 1 < len(arguments):
            yield index + 1, arguments[index + 1], "{}"


def _profile(name: str) -> str:
    from snakemake.cli import get_profile_dir

    if name == "none" or get_profile_dir(name) is not None:
        return name
    folder = recipes_folder() / "profiles" / name
    if name not in shipped_profiles():
        known = ", ".join(shipped_profiles())
        raise LskdError(f"no profile {name}: no such folder with a {_PROFILE_FILE}; with lskd come {known}")
    return str(folder)


def _check_executor(arguments: Sequence[str], profiles: Sequence[str]) -> None:
    """Check that it is installed; Snakemake would only call the executor, and its options, unknown."""
    from snakemake.cli import get_profile_dir

    wanted = [name for option in ("--executor", "-e") for _, name, _ in _values(arguments, option)]
    for profile in profiles if not wanted else ():
        found = get_profile_dir(profile)
        content: Any = read_yaml(found[1], f"profile {profile}") if found else None
        wanted += [str(content["executor"])] if isinstance(content, dict) and "executor" in content else []
    for name in wanted:
        module = f"snakemake_executor_plugin_{name.replace('-', '_')}"
        if name in LOCAL or importlib.util.find_spec(module) is not None:
            continue
        plugin = f"pip install {module.replace('_', '-')}"
        fix = how_to_install(name) if name in shipped_profiles() else plugin
        raise LskdError(f"the executor {name} is not installed here; {fix}")
    if "slurm" in wanted and shutil.which("sbatch") is None:
        raise LskdError("no sbatch here; start the study on a machine of the cluster that can submit jobs")


# lskd sets these itself; a second value would break resuming or point the workflow elsewhere.
OWN_OPTIONS = ("--snakefile", "--directory", "--cores", "--dry-run", "--rerun-triggers", "--config")


def check_snakemake_options(options: Sequence[str]) -> None:
    """Check options meant for Snakemake with its own parser, before anything runs.

    Raises:
        LskdError: for an option that Snakemake does not know or that lskd sets itself.
    """
    for option in options:
        if option.partition("=")[0] in OWN_OPTIONS:
            raise LskdError(f"{option.partition('=')[0]} is set by lskd study itself; leave it out")
    _parse(options)


def _parse(arguments: Sequence[str], profiles: Sequence[str] = ()) -> argparse.Namespace:
    from snakemake.cli import get_argument_parser

    if not arguments:  # making the parser imports every plugin, some of which ask the machine things
        return argparse.Namespace(
            executor=None, jobs=None, logger=[], resources={}, verbose=False, printshellcmds=False
        )

    def complain(message: str) -> NoReturn:
        line = message.splitlines()[0]
        if profiles:
            raise LskdError(f"{line}; fix the profile {', '.join(profiles)}")
        unknown = next((word for word in line.split() if word.startswith("--")), "").partition("=")[0]
        known = {*parser._option_string_actions, *OWN_OPTIONS, "--hours", "--output", "--own", "--yes"}
        near = nearest(unknown, known, 0.7)
        hint = f"; did you mean {near}?" if near and near != unknown else ""
        raise LskdError(f"{line}; an option of neither lskd study nor snakemake{hint}")

    parser: argparse.ArgumentParser = get_argument_parser(profiles=list(profiles) or None)
    parser.error = complain  # type: ignore[method-assign]
    return parser.parse_args(list(arguments))
