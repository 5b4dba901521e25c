"""fairseq: the command line of a run, and its logs in the common vocabulary of columns.

A trainer's file is one for fairseq-hydra-train and works with it alone too; what a study decides for each run
comes as overrides behind it.
"""

import contextlib
import copy
import io
import logging
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lskd import LskdError
from lskd.base.files import parse_json
from lskd.errors import one_line
from lskd_study.base.extras import needs_fairseq_extra
from lskd_study.plan.plan import Plan, Run, exact, rest_of

# The best by validation BLEU, never by test: the teacher, and what translates the test set.
CHECKPOINT = "checkpoint_best.pt"
CURVE_COLUMNS = (
    "epoch",
    "train_ce",
    "train_kl",
    "train_teacher_entropy",
    "train_hard_ce",
    "train_agreement",
    "val_loss",
    "val_bleu",
    "val_ppl",
)
LOG = "hydra_train.log"
FILES = (LOG, "checkpoint*.pt", "checkpoint*.pt.tmp")  # as in timm.py
# As in timm.py.
WITHOUT_EFFECT = (
    *("common.log_interval", "common.log_format", "common.log_file", "common.no_progress_bar"),
    *("common.tensorboard_logdir", "common.wandb_project", "dataset.num_workers", "dataset.data_buffer_size"),
    *("checkpoint.keep_*", "hydra.*"),
    # What the study sets itself for each run.
    *("common.user_dir", "common.seed", "checkpoint.save_dir", "checkpoint.no_epoch_checkpoints"),
    *("criterion.kd_teacher", "task.data"),
)
_LATEST = "checkpoint_last.pt"
_SUBSET = "test"
_TERMS = {
    "train_ce": "train_kd_ce",
    "train_kl": "train_kd_kl",
    "train_teacher_entropy": "train_kd_teacher_entropy",
    "train_hard_ce": "train_kd_hard_ce",
}
_LINE = re.compile(r".*\[(train|valid)\]\[INFO\] - (\{.*\})\s*$")
_PLAIN = re.compile(r"[\w./+\-]+", re.ASCII)
# What a study reads or relies on, by section: the only value that works, and why.
_NEEDED: dict[str, dict[str, tuple[Any, str]]] = {
    "task": {
        "_name": ("translation_ls_kd", "whose runs go on along the same curve"),
        "eval_bleu": (True, "the study goes by validation BLEU"),
    },
    "checkpoint": {
        "best_checkpoint_metric": ("bleu", "the best epoch is chosen by validation BLEU"),
        "maximize_best_checkpoint_metric": (True, "more BLEU is better"),
    },
}
_REFUSED = {
    "checkpoint": ("no_save", "no_last_checkpoints", "no_save_optimizer_state", "finetune_from_model"),
    "dataset": ("disable_validation",),
}
_CRITERIA = {"teacher": "label_smoothed_cross_entropy", "student": "ls_kd"}


def check_config(config: dict[str, Any], path: str, role: Literal["teacher", "student"]) -> None:
    """Check a file for fairseq-hydra-train before any run, with fairseq's own settings.

    Raises:
        LskdError: naming the file and the setting that is unknown, of the wrong type or of no use in a study.
    """
    if Path(path).suffix != ".yaml":
        raise LskdError(f"{path}: fairseq-hydra-train reads files that end in .yaml; rename it")
    if "defaults" in config:
        raise LskdError(f"{path}: it has defaults, other files that a study cannot watch; write them out")
    with needs_fairseq_extra(), quietly():
        from fairseq_kd.safe_loading import check_model as check_architecture
        from lskd_study.trainers.fairseq_file import check_settings
    check_settings(config, path)
    model = config.get("model")
    # What no teacher and no student can be is refused here, and not after the teachers have trained.
    settings = copy.deepcopy(dict(model)) if isinstance(model, Mapping) else {"_name": model}
    check_architecture(settings, f"{path}: this model")
    if settings.get("adaptive_softmax_cutoff"):
        raise LskdError(f"{path}: model.adaptive_softmax_cutoff leaves no logits to distil; remove it")
    sections = {name: part for name, part in config.items() if isinstance(part, Mapping)}
    for section, settings in _NEEDED.items():
        for name, (value, reason) in settings.items():
            if sections.get(section, {}).get(name) != value:
                raise LskdError(f"{path}: set {section}.{name}: {str(value).lower()}; {reason}")
    for section, names in _REFUSED.items():
        for name in names:
            if sections.get(section, {}).get(name):
                raise LskdError(f"{path}: {section}.{name} is of no use in a study; remove it")
    if sections.get("dataset", {}).get("valid_subset", "valid") != "valid":
        raise LskdError(f"{path}: dataset.valid_subset must be valid, never test; remove it")
    criterion = sections.get("criterion", {}).get("_name")
    if criterion != _CRITERIA[role]:
        raise LskdError(f"{path}: criterion._name is {criterion}; a {role}'s is {_CRITERIA[role]}")


def check_model(config: dict[str, Any], path: str, model: str) -> None:
    """Check that the study file calls a network what its own file calls it.

    Raises:
        LskdError: naming both.
    """
    section = config.get("model")
    own = section.get("_name") if isinstance(section, Mapping) else section
    if own != model:
        raise LskdError(f"{path}: model._name is {own}, the study file says {model}; make them equal")


def command(plan: Plan, run: Run, output: str | None = None) -> list[str]:
    """Return the shell command of a run from scratch, paths relative to ``plan.cwd``.

    ``output``: folder to make the run's folder in, instead of the study's own.
    """
    folder = Path(output, run.id) if output else Path(plan.output, run.folder)
    config = Path(run.config)
    words = ["fairseq-hydra-train", "--config-dir", str(config.parent), "--config-name", config.stem]
    options: dict[str, Any] = {
        "common.user_dir": _plugin(Path(plan.cwd)),
        "common.seed": run.seed,
        "common.log_format": "json",
        "task.data": plan.data,
        # With the default of 8 fairseq leaves a last batch of 9, say, out of training and validation unasked.
        "dataset.required_batch_size_multiple": 1,
        "checkpoint.save_dir": folder,
        "checkpoint.no_epoch_checkpoints": "true",
        "hydra.run.dir": folder,
        "hydra.job.chdir": "false",
        "hydra.output_subdir": "null",
    }
    if store := plan.store_of(run):
        options["++task.kd_soft_labels"] = plan.labels(store, output)
    words += [_override(key, value) for key, value in options.items()]
    return words + [_override(f"++criterion.{key}", value) for key, value in _criterion(plan, run).items()]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Import fairseq without what its parts say, and without their settings of everybody's logging."""
    root = logging.getLogger()
    before = root.level, list(root.handlers), root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        logging.disable(before[2])


def _criterion(plan: Plan, run: Run) -> dict[str, Any]:
    if run.role == "student":
        teacher = Path(plan.output, plan.run(run.teacher).folder, CHECKPOINT)
        weight = exact(rest_of(run.hard_weight))
        settings = {"kd_teacher": teacher, "kd_weight": weight, "kd_temperature": f"{exact(run.temperature)}"}
        return {**settings, "kd_temperature_squared": "true"} if plan.temperature_squared else settings
    smoothing = {"label_smoothing": f"{exact(run.smoothing)}"}
    if plan.convention == "paper":
        return smoothing  # fairseq's own convention
    return {"_name": "ls_kd", "kd_weight": 0, "smoothing_convention": plan.convention, **smoothing}


def _plugin(cwd: Path) -> str:
    """Return the folder that fairseq loads the plugin from; relative to where the command runs if within."""
    spec = find_spec("fairseq_kd")  # not imported: that takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise LskdError("the plugin fairseq_kd is not installed; install lskd again")
    folder = Path(spec.submodule_search_locations[0]).resolve()
    here = cwd.resolve()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _override(key: str, value: object) -> str:
    """Return a word in hydra's grammar."""
    text = str(value)
    if not _PLAIN.fullmatch(text):
        text = "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{key}={text}"


def resume(folder: Path) -> list[str] | None:
    """Return the arguments that let a run go on, None where it has no whole checkpoint yet.

    fairseq goes on from ``checkpoint_last.pt`` unasked. It writes the best checkpoint in one piece and copies
    it, so a run that was ended while it copied goes on from the best.
    """
    if zipfile.is_zipfile(folder / _LATEST):
        return []
    if zipfile.is_zipfile(folder / CHECKPOINT):
        return [_override("checkpoint.restore_file", folder / CHECKPOINT)]
    return None


def train(arguments: list[str]) -> None:
    """Run ``fairseq-hydra-train`` with these arguments in this process.

    In this process, because importing torch and fairseq takes longer than a small training, and because a job
    that is killed must not leave a training behind.

    Raises:
        LskdError: the plugin's own errors, in one line; DivergedError for a run that is not finite any more.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions as they are
    with needs_fairseq_extra():
        from fairseq_cli.hydra_train import cli_main
    before, sys.argv = sys.argv, ["fairseq-hydra-train", *arguments]
    try:
        cli_main()
    finally:
        sys.argv = before


def read_curves(folder: Path, role: str) -> list[dict[str, str]]:
    """Return a run's epochs in the common columns, losses in nats a target token; epochs count from 0.

    fairseq logs bits. ``val_loss`` is without smoothing, and ``val_ppl`` its exponential. ``train_hard_ce``
    of a run without a teacher is its training loss, with the (smoothed) labels.

    Raises:
        LskdError: when the trainer left no usable log.
    """
    path = folder / LOG
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LskdError(
            f"the trainer left no {path} ({error.strerror}); see {folder / 'train.log'}"
        ) from error
    # A run ended after an epoch's lines and before its checkpoint repeats that epoch.
    epochs: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        if (found := _LINE.match(line)) and (row := _row(found[2])):
            epochs.setdefault(int(row["epoch"]), {}).update(row)
    if not epochs:
        raise LskdError(f"{path} has no epochs; see {folder / 'train.log'}")
    return [_common(row, epoch) for epoch, row in sorted(epochs.items())]


def _row(text: str) -> dict[str, Any] | None:
    try:
        row = parse_json(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "epoch" in row else None


def _common(row: Mapping[str, Any], epoch: int) -> dict[str, str]:
    common = dict.fromkeys(CURVE_COLUMNS, "") | {"epoch": str(epoch - 1)}
    # A teacher that a schedule has silenced was not measured.
    row = {
        name: value for name, value in row.items() if not (name.startswith("train_kd_") and value == "nan")
    }
    for name, own in _TERMS.items():
        common[name] = _nats(row.get(own))
    if not common["train_ce"]:
        common["train_hard_ce"] = _nats(row.get("train_loss"))
    common["train_agreement"] = str(row.get("train_kd_agreement", ""))
    common["val_loss"] = _nats(row.get("valid_nll_loss"))
    common["val_bleu"] = str(row.get("valid_bleu", ""))
    if common["val_loss"]:
        common["val_ppl"] = f"{2.0 ** min(float(row['valid_nll_loss']), 1000):.8g}"
    return common


def _nats(bits: Any) -> str:
    return "" if bits is None else f"{float(bits) * math.log(2):.8g}"


def collect_translations(folder: Path, checkpoint: str, data_dir: Path) -> list[dict[str, Any]]:
    """Return what the run translates the test set to, a mapping for each sentence, in order of their ids.

    Raises:
        LskdError: for a run that cannot be evaluated.
    """
    from dataclasses import asdict

    from fairseq_kd.translations import translate

    return [asdict(translation) for translation in translate(folder / checkpoint, data_dir, _SUBSET)]


class Rehearsal:
    """Builds runs by fairseq's registries, without criterion and teacher; see `lskd_study.trainers`."""

    def __init__(self, plan: Plan) -> None:
        """Keep the plan."""
        self.plan = plan

    def try_out(self, run: Run) -> None:
        """Parse a run's command, build its task, model, optimiser and schedule, and open its data.

        Raises:
            LskdError: in one line, whatever fairseq and hydra raise.
        """
        words = command(self.plan, run)
        overrides = [word for word in words[5:] if not word.startswith("hydra.")]
        try:
            with needs_fairseq_extra(), compose_quietly(Path(run.config), overrides) as cfg:
                self._build(cfg)
        except LskdError as error:
            raise LskdError(" ".join(str(error).split())) from None
        except (Exception, SystemExit) as error:  # a framework of many kinds of errors
            raise LskdError(f"{type(error).__name__}: {one_line(error)}") from None

    def _build(self, cfg: Any) -> None:
        from fairseq import tasks
        from fairseq.dataclass.initialize import add_defaults
        from fairseq.optim import build_optimizer
        from fairseq.optim.lr_scheduler import build_lr_scheduler
        from torch import nn

        add_defaults(cfg)
        model: nn.Module = nn.Linear(1, 1)
        if self.plan.data_dir.exists():  # with the dictionaries, by which models have their size
            task = tasks.setup_task(cfg.task)
            for split in ("train", "valid"):
                task.load_dataset(split)
            model = task.build_model(cfg.model)
        optimizer = build_optimizer(
            cfg.optimizer, [part for part in model.parameters() if part.requires_grad]
        )
        build_lr_scheduler(cfg.lr_scheduler, optimizer).step_update(0)


@contextlib.contextmanager
def compose_quietly(path: Path, overrides: list[str]) -> Iterator[Any]:
    """Give what fairseq-hydra-train makes of a file and overrides, and keep quiet what is done with it."""
    with quiet():
        import fairseq_kd

        assert fairseq_kd
        yield compose_file(path, overrides)


def compose_file(path: Path, overrides: list[str]) -> Any:
    """Return what fairseq-hydra-train makes of a recipe's file."""
    from fairseq.dataclass.initialize import hydra_init
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    hydra_init(path.stem)
    with initialize_config_dir(config_dir=str(path.parent.resolve()), version_base="1.1"):
        return compose(config_name=path.stem, overrides=overrides)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep what fairseq and hydra say, and give logging and the working folder back as they were."""
    said, root, cwd = io.StringIO(), logging.getLogger(), Path.cwd()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    arguments = list(sys.argv)
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        root.handlers[:], root.level = handlers, level
        logging.disable(disabled)
        sys.argv[:] = arguments
        os.chdir(cwd)
