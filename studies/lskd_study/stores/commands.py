"""Shell commands that write stores, and those that rerun a student whose store may be gone."""

import os
import shlex
from collections.abc import Mapping

from lskd_study.base.gpus import VISIBLE
from lskd_study.plan.plan import Plan, Run
from lskd_study.trainers import trainer_of

# Where a command that is copied from the page writes: the trainer refuses a folder that holds a run.
RERUN = "rerun"
_SETTINGS = ("OMP_NUM_THREADS", VISIBLE)


def rerun_command(
    plan: Plan, run: Run, output: str = RERUN, environment: Mapping[str, str] = os.environ
) -> str:
    """Return the shell command that makes a run again below ``output``, apart from the study's own runs.

    It reads nothing of the study's stores: timm and mmcls ask the teacher and store what it says while they
    train, for the next rerun too; in translation a command before it does.
    """
    trainer = trainer_of(plan.ecosystem, run.role)
    words = shlex.join(trainer.command(plan, run, output))
    store = plan.store_of(run)
    if store is None or trainer.stores_while_training:
        return words
    # What stands before the whole line on the page holds for its first command alone.
    settings = [f"{name}={shlex.quote(environment[name])} " for name in _SETTINGS if environment.get(name)]
    return f"{shlex.join(trainer.store_command(plan, store, output))} && {''.join(settings)}{words}"
