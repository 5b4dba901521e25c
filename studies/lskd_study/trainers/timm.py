"""timm: the command line of a run, and its logs in the common vocabulary of columns."""

import difflib
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

from lskd import LskdError
from lskd.base.files import read_csv
from lskd_study.plan.plan import CHECKPOINT, Plan, Run, exact
from lskd_study.plan.schema import RESERVED

SUMMARY = "summary.csv"
# What a run writes into its folder, as patterns: what goes before half a run is begun anew.
FILES = (
    *("args.yaml", "args.yaml.tmp", SUMMARY, f"{SUMMARY}.tmp", CHECKPOINT, "model_best.pth.tar"),
    *("checkpoint-*.pth.tar", "recovery-*.pth.tar", "tmp.pth.tar", "*.pth.tar.tmp"),
)
CURVE_COLUMNS = (
    "epoch",
    "train_ce",
    "train_kl",
    "train_teacher_entropy",
    "train_hard_ce",
    "train_agreement",
    "val_loss",
    "val_top1",
    "val_top5",
)
# Of its options, as patterns: what changes how fast a run is, and what it keeps or says. Loading processes
# draw the augmentation, so another number of them is another draw of the same experiment.
WITHOUT_EFFECT = ("workers", "pin_mem", "log_interval", "checkpoint_hist")
_VALIDATION = {"val_loss": "eval_loss", "val_top1": "eval_top1", "val_top5": "eval_top5"}


def check_config(config: dict[str, Any], path: str, role: Literal["teacher", "student"]) -> None:
    """Check a trainer's file with the trainer's own parser, before any run.

    Raises:
        LskdError: naming the file and the key that is unknown, of the wrong type or out of range.
    """
    from timm_ls_kd.arguments import kd_config
    from timm_ls_kd.run_settings import apply_config
    from timm_ls_kd.trainer.arguments import check_together, create_parser

    parser = create_parser()
    valid = vars(parser.parse_args([])).keys() - RESERVED - {"config", "data"}
    for key, value in config.items():
        if apply_config(parser, {key: value}, path):
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]!r}?" if near else "timm train.py --help lists them"
            raise LskdError(f"{path}: unknown key {key!r}; {mend}")
    args = parser.parse_args([])
    # What the study itself sets for every run; the file is not to blame for it.
    args.smoothing = 0.0
    args.kd_teacher = "teacher" if role == "student" else None
    try:
        check_together(args)
        kd_config(args)
    except LskdError as error:
        raise LskdError(f"{path}, as a {role}'s file: {error}") from error


def command(plan: Plan, run: Run, output: str | None = None) -> list[str]:
    """Return the shell command of a run from scratch, paths relative to ``plan.cwd``.

    ``output``: folder to make the run's folder in, instead of the study's own.
    """
    folder = Path(plan.output, run.folder)
    words = ["timm", "train.py", plan.data, "--config", run.config, "--model", run.model]
    words += ["--num-classes", str(plan.num_classes), "--seed", str(run.seed)]
    # Named for every run: timm's own default smooths by 0.1 unasked.
    alpha = run.smoothing if run.role == "teacher" else 0.0
    words += ["--smoothing", f"{exact(alpha)}", "--smoothing-convention", plan.convention]
    if run.role == "student":
        teacher = plan.run(run.teacher)
        checkpoint = Path(plan.output, teacher.folder, CHECKPOINT)
        words += ["--kd-teacher", teacher.model, "--kd-teacher-checkpoint", str(checkpoint)]
        words += [
            "--kd-temperature",
            f"{exact(run.temperature)}",
            "--kd-hard-weight",
            f"{exact(run.hard_weight)}",
        ]
        words += ["--kd-temperature-squared"] * plan.temperature_squared
        if store := plan.store_of(run):
            words += ["--kd-soft-labels", str(plan.labels(store, output))]
            words += ["--kd-soft-labels-top-k", str(store.top_k), "--kd-soft-labels-values", store.values]
            words += ["--kd-soft-labels-seed", str(store.seed)]
    return [*words, "--output", output or str(folder.parent), "--experiment", folder.name]


class Rehearsal:
    """Builds runs by the bundled trainer's own parts; see `lskd_study.trainers`."""

    def __init__(self, plan: Plan) -> None:
        """Keep what several runs read."""
        from timm_ls_kd.trainer.session import Rehearsal

        self.plan = plan
        self._parts = Rehearsal(data_there=plan.data_dir.exists())

    def try_out(self, run: Run) -> None:
        """Build a run's model, loaders, optimiser and schedule, and load its first image.

        Raises:
            LskdError: as the run would.
        """
        from timm_ls_kd.models import input_channels

        args = self._arguments(run)
        if run.teacher:
            teacher = self.plan.run(run.teacher)
            theirs, ours = (input_channels(vars(a)) for a in (self._arguments(teacher), args))
            if theirs != ours:
                raise LskdError(
                    f"its images have {ours} channels, those of its teachers {theirs} ({teacher.config}); "
                    "set in_chans alike"
                )
        self._parts.try_out(args)

    def _arguments(self, run: Run) -> Namespace:
        from timm_ls_kd.trainer.arguments import parse_arguments

        return parse_arguments(command(self.plan, run)[2:])


def resume(folder: Path) -> list[str] | None:
    """Return the arguments that let a run go on, None where it has no whole checkpoint yet."""
    from timm_ls_kd.trainer.run_folder import whole_checkpoint

    checkpoint = whole_checkpoint(folder / CHECKPOINT)
    return None if checkpoint is None else ["--resume", str(checkpoint)]


def collect_logits(folder: Path, checkpoint: str, data_dir: Path) -> Any:
    """Return logits, labels and keys of the validation images (`timm_ls_kd.Evaluation`).

    Raises:
        LskdError: for a run that cannot be evaluated.
    """
    from timm_ls_kd.evaluation import collect_logits as collect

    return collect(folder, checkpoint=checkpoint, data_dir=data_dir)


def train(arguments: list[str]) -> None:
    """Run ``timm`` with these arguments (``arguments[0]`` is ``train.py``) in this process.

    In this process, because importing torch and timm takes longer than a small training.

    Raises:
        SystemExit: as the command would exit.
    """
    from timm_ls_kd.cli import main

    code = main(arguments)
    if code:
        raise SystemExit(code)


def read_curves(folder: Path, role: str) -> list[dict[str, str]]:
    """Return a run's epochs in the common columns; what a trainer did not log is empty.

    A teacher's training loss is plain cross-entropy with the (smoothed) labels: ``train_hard_ce``.

    Raises:
        LskdError: when the trainer left no usable log.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise LskdError(f"the trainer left no {path}; see {folder / 'train.log'}")
    rows = read_csv(path, ("epoch",))
    # A run killed after an epoch's row and before its checkpoint repeats that epoch.
    by_epoch = {int(row["epoch"]): row for row in rows if row["epoch"].isdecimal()}
    if not by_epoch:
        raise LskdError(f"{path} has no epochs; see {folder / 'train.log'}")
    curves = []
    for epoch, row in sorted(by_epoch.items()):
        common = {name: row.get(_VALIDATION.get(name, name)) or "" for name in CURVE_COLUMNS}
        if role == "teacher":
            common["train_hard_ce"] = row.get("train_loss") or ""
        curves.append({**common, "epoch": str(epoch)})
    return curves
