"""The console script `timm`: `timm train.py ...` trains, with the upstream script when the path names one."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lskd import LskdError
from lskd.base.files import full_disk
from lskd.errors import from_outside, report

USAGE = """usage: timm train.py [arguments]           train with the bundled trainer
       timm PATH/train.py [arguments]      train with timm's own script at PATH, unmodified
       timm soft-labels [arguments]        store what a teacher says, for such a training, and train nothing

All take --kd-teacher and the other arguments of lskd. `timm train.py --help` lists all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    After one line on stderr it is 2 for a user's error, and 3 for a run that diverged.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    try:
        return _run(argv[0], argv[1:])
    except LskdError as error:
        return report("timm", error)
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            advice = "lower --batch-size or raise --grad-accum-steps."
            return report("timm", LskdError(f"the GPU ran out of memory; {advice}"))
        if (ours := from_outside(error) or full_disk(error)) is not None:
            return report("timm", ours)
        raise


def _run(script: str, argv: Sequence[str]) -> int:
    if script == "--version":
        import timm

        print(f"timm {timm.__version__}")
        return 0
    if Path(script).is_file():
        from timm_ls_kd import upstream

        return upstream.main(Path(script), argv)
    if script in ("train.py", "soft-labels"):
        from timm_ls_kd.trainer import main as trainer

        return trainer.train(argv) if script == "train.py" else trainer.store(argv)
    if script.endswith(".py"):
        raise LskdError(
            f"script {script} does not exist; give the path of timm's train.py, or plain train.py."
        )
    raise LskdError(f"unknown command '{script}'; this is the launcher of training: timm train.py --help.")
