"""timm's students: stored by `timm soft-labels`, read with ``--kd-soft-labels``."""

import json

from lskd import LskdError
from lskd_study.plan.plan import Plan, Run, Store
from lskd_study.trainers import timm
from lskd_study.trainers.views import MIXED, CannotStoreError, Views


def views(plan: Plan, run: Run) -> Views:
    """Return what a student's training images follow from.

    Raises:
        CannotStoreError: its file stores by itself, or asks for what no seed repeats.
    """
    from timm_ls_kd.trainer.arguments import parse_arguments
    from timm_ls_kd.trainer.session import views_of

    if any(key.replace("-", "_").startswith("kd_soft_labels") for key in plan.configs[run.config]):
        raise CannotStoreError(f"{run.config} has a store of its own")
    words = timm.command(plan, run)[2:]
    try:
        args = parse_arguments([*words, "--kd-soft-labels", "labels", "--kd-soft-labels-top-k", "0"])
        found = views_of(args)
    except LskdError as error:
        raise CannotStoreError(str(error).rstrip(".")) from error
    caution = MIXED if found.mixed else ""
    return Views(json.dumps(found.settings, sort_keys=True), found.epochs, found.epochs, caution)


def work(plan: Plan, teacher: Run) -> int:
    """Return the floating-point operations in which a teacher answers one image."""
    from timm_ls_kd.trainer.arguments import parse_arguments
    from timm_ls_kd.trainer.session import forward_flops

    return forward_flops(parse_arguments(timm.command(plan, teacher)[2:]))


def command(plan: Plan, store: Store, output: str | None = None) -> list[str]:
    """Return the shell command that stores, paths relative to ``plan.cwd``."""
    words = timm.command(plan, plan.run(store.writer), output)
    return ["timm", "soft-labels", *words[2 : words.index("--output")]]


def write(words: list[str]) -> None:
    """Run such a command in this process.

    Raises:
        SystemExit: as the command would exit.
    """
    timm.train(words[1:])
