"""fairseq: the command line of a run, and its logs in the common vocabulary of columns.

A trainer's file is one for fairseq-hydra-train and works with it alone too; what a study decides for each run
comes as overrides behind it.
"""

import contextlib
import copy
import math
import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import parse_json
from lskd.errors import one_line
from lskd_study.base.extras import not_installed
from lskd_study.plan.plan import Plan, Role, Run, Store, exact, rest_of
from lskd_study.plan.records import Size
from lskd_study.plan.schema import read_trainer_config
from lskd_study.trainers.trainer import (
    CannotStoreError,
    Exported,
    TryOut,
    Views,
    no_epochs,
    quiet,
)

# The best by validation BLEU, never by test: the teacher, and what translates the test set.
CHECKPOINT = "checkpoint_best.pt"
LOG = "hydra_train.log"
_LATEST = "checkpoint_last.pt"
_TERMS = {
    "train_ce": "train_kd_ce",
    "train_kl": "train_kd_kl",
    "train_teacher_entropy": "train_kd_teacher_entropy",
    "train_hard_ce": "train_kd_hard_ce",
}
_LINE = re.compile(r".*\[(train|valid)\]\[INFO\] - (\{.*\})\s*$")
_PLAIN = re.compile(r"[\w./+\-]+", re.ASCII)
# What a study reads or relies on: section, setting, the only value that works, and why.
_NEEDED: tuple[tuple[str, str, Any, str], ...] = (
    ("task", "_name", "translation_ls_kd", "whose runs go on along the same curve"),
    ("task", "eval_bleu", True, "the study goes by validation BLEU"),
    ("checkpoint", "best_checkpoint_metric", "bleu", "the best epoch is chosen by validation BLEU"),
    ("checkpoint", "maximize_best_checkpoint_metric", True, "more BLEU is better"),
)
_USELESS = (
    *("checkpoint.no_save", "checkpoint.no_last_checkpoints", "checkpoint.no_save_optimizer_state"),
    *("checkpoint.finetune_from_model", "dataset.disable_validation"),
)
_CRITERIA = {"teacher": "label_smoothed_cross_entropy", "student": "ls_kd", "control": "ls_kd"}


class Fairseq:
    """``fairseq-hydra-train``, for teachers and students."""

    checkpoint = CHECKPOINT
    curve_columns: tuple[str, ...] = (
        *("epoch", "train_ce", "train_kl", "train_teacher_entropy", "train_hard_ce", "train_agreement"),
        *("val_loss", "val_bleu", "val_ppl"),
    )
    files: tuple[str, ...] = (LOG, "checkpoint*.pt", "checkpoint*.pt.tmp")
    without_effect: tuple[str, ...] = (
        *("common.log_interval", "common.log_format", "common.log_file", "common.no_progress_bar"),
        *("common.tensorboard_logdir", "common.wandb_project", "dataset.num_workers"),
        *("dataset.data_buffer_size", "checkpoint.keep_*", "hydra.*"),
        # What the study sets itself for each run.
        *("common.user_dir", "common.seed", "checkpoint.save_dir", "checkpoint.no_epoch_checkpoints"),
        *("criterion.kd_teacher", "task.data"),
    )
    modules: tuple[str, ...] = ("fairseq_cli.hydra_train", "fairseq_kd.translations", "torch._dynamo")
    stores_while_training = False

    def read_config(self, path: Path) -> dict[str, Any]:
        """Return a file's content; it works without a study too, which overrides what it says."""
        return read_trainer_config(path, reserved=frozenset())

    def check_config(self, config: dict[str, Any], path: str, role: Role, model: str) -> None:
        """Check a file for fairseq-hydra-train with fairseq's own settings, and for what a study needs."""
        if Path(path).suffix != ".yaml":
            raise LskdError(f"{path}: fairseq-hydra-train reads files that end in .yaml; rename it")
        if "defaults" in config:
            raise LskdError(f"{path}: it has defaults, other files that a study cannot watch; write them out")
        with quiet():
            from fairseq_kd.safe_loading import check_model
            from lskd_study.trainers.fairseq_file import check_settings
        check_settings(config, path)
        # What no teacher and no student can be is refused here, and not after the teachers have trained.
        chosen = copy.deepcopy(config.get("model"))
        settings = dict(chosen) if isinstance(chosen, Mapping) else {"_name": chosen}
        own = settings.get("_name")
        check_model(settings, f"{path}: this model")
        if settings.get("adaptive_softmax_cutoff"):
            raise LskdError(f"{path}: model.adaptive_softmax_cutoff leaves no logits to distil; remove it")
        for section, name, value, reason in _NEEDED:
            if _section(config, section).get(name) != value:
                raise LskdError(f"{path}: set {section}.{name}: {str(value).lower()}; {reason}")
        for key in _USELESS:
            section, _, name = key.partition(".")
            if _section(config, section).get(name):
                raise LskdError(f"{path}: {key} is of no use in a study; remove it")
        if _section(config, "dataset").get("valid_subset", "valid") != "valid":
            raise LskdError(f"{path}: dataset.valid_subset must be valid, never test; remove it")
        criterion = _section(config, "criterion").get("_name")
        if criterion != _CRITERIA[role]:
            raise LskdError(f"{path}: criterion._name is {criterion}; a {role}'s is {_CRITERIA[role]}")
        if own != model:
            raise LskdError(f"{path}: model._name is {own}, the study file says {model}; make them equal")

    def check_run(self, plan: Plan, run: Run) -> None:
        """Check nothing: the file names the model, and there are no classes."""

    def rehearsal(self, plan: Plan) -> TryOut:
        """Return what builds a run by fairseq's registries, without criterion and teacher."""

        def try_out(run: Run) -> None:
            overrides = [word for word in self.command(plan, run)[5:] if not word.startswith("hydra.")]
            if plan.store_of(run):  # which is written after this
                overrides.append("++task.kd_soft_labels=null")
            try:
                import fairseq_kd

                assert fairseq_kd
                _build(compose_file(Path(run.config), overrides), plan.data_dir)
            except LskdError as error:
                raise LskdError(" ".join(str(error).split())) from None
            except (Exception, SystemExit) as error:  # a framework of many kinds of errors
                missing = not_installed(error) if isinstance(error, ModuleNotFoundError) else None
                raise missing or LskdError(f"{type(error).__name__}: {one_line(error)}") from None

        return try_out

    def epochs(self, plan: Plan, run: Run) -> int:
        """Return how many epochs a run trains at most; 0 where it ends by updates."""
        return int(_section(plan.configs[run.config], "optimization").get("max_epoch") or 0)

    def decays(self, plan: Plan, run: Run) -> list[int]:
        """Return nothing: no mean over epochs is taken of translations."""
        return []

    def command(self, plan: Plan, run: Run, output: str | None = None) -> list[str]:
        """Return ``fairseq-hydra-train ...``."""
        folder = Path(output, run.id) if output else Path(plan.output, run.folder)
        config = Path(run.config)
        arguments = ["fairseq-hydra-train", "--config-dir", str(config.parent), "--config-name", config.stem]
        options: dict[str, Any] = {
            "common.user_dir": _plugin(Path(plan.cwd)),
            "common.seed": run.seed,
            "common.log_format": "json",
            "task.data": plan.data,
            # With the default of 8 fairseq leaves out a last batch of 9, say, of training and validation too.
            "dataset.required_batch_size_multiple": 1,
            "checkpoint.save_dir": folder,
            "checkpoint.no_epoch_checkpoints": "true",
            "hydra.run.dir": folder,
            "hydra.job.chdir": "false",
            "hydra.output_subdir": "null",
        }
        if store := plan.store_of(run):
            options["++task.kd_soft_labels"] = plan.labels(store, output)
            options |= {"++criterion.kd_rest": plan.rest} if plan.rest else {}
        if run.role == "control":
            options["++task.kd_soft_labels"] = "null"
        options |= {f"++criterion.{key}": value for key, value in _criterion(plan, run).items()}
        return arguments + [_override(key, value) for key, value in options.items()]

    def train(self, arguments: list[str]) -> None:
        """Run ``fairseq-hydra-train`` with these arguments."""
        os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions as they are
        from fairseq_cli.hydra_train import cli_main

        before, sys.argv = sys.argv, ["fairseq-hydra-train", *arguments]
        try:
            cli_main()
        finally:
            sys.argv = before

    def resume(self, folder: Path) -> list[str] | None:
        """Return nothing more where fairseq goes on from ``checkpoint_last.pt`` unasked.

        It writes the best checkpoint in one piece and copies it, so a run that was ended while it copied goes
        on from the best.
        """
        from lskd.checkpoints import has_end

        if has_end(folder / _LATEST):
            return []
        if has_end(folder / CHECKPOINT):
            return [_override("checkpoint.restore_file", folder / CHECKPOINT)]
        return None

    def read_curves(self, folder: Path, role: Role) -> list[dict[str, str]]:
        """Return a run's epochs in the common columns, losses in nats a target token.

        fairseq logs bits. ``val_loss`` is without smoothing, and ``val_ppl`` its exponential.
        ``train_hard_ce`` of a run without a teacher is its training loss, with the (smoothed) labels.
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
            if found := _LINE.match(line):
                # A line cut short, or settings.
                with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                    row = parse_json(found[2])
                    if (epoch := int(row["epoch"])) > 0:
                        epochs.setdefault(epoch, {}).update(row)
        if not epochs:
            raise no_epochs(path)
        try:
            return [self._common(row, epoch) for epoch, row in sorted(epochs.items())]
        except (TypeError, ValueError, OverflowError) as error:
            raise LskdError(
                f"{path} has a value that is no number ({one_line(error)}); remove the run's folder, it is "
                "trained again"
            ) from None

    def _common(self, row: Mapping[str, Any], epoch: int) -> dict[str, str]:
        # A teacher that a schedule has silenced was not measured.
        row = {key: value for key, value in row.items() if not (key[:9] == "train_kd_" and value == "nan")}
        terms = {name: _nats(row.get(own)) for name, own in _TERMS.items()}
        if not terms["train_ce"]:
            terms["train_hard_ce"] = _nats(row.get("train_loss"))
        bits = row.get("valid_nll_loss")
        return dict.fromkeys(self.curve_columns, "") | {
            "epoch": str(epoch - 1),
            **terms,
            "train_agreement": _number(row.get("train_kd_agreement")),
            "val_loss": _nats(bits),
            "val_bleu": _number(row.get("valid_bleu")),
            "val_ppl": "" if bits is None else f"{2.0 ** min(float(bits), 1000):.8g}",
        }

    def collect(self, folder: Path, data_dir: Path) -> list[dict[str, Any]]:
        """Return what the best epoch translates the test set to, a mapping a sentence, ordered by id."""
        from fairseq_kd.translations import translate

        return translate(folder / CHECKPOINT, data_dir)

    def export(
        self, folder: Path, output: Path, class_names: list[str] | None, data_dir: Path | None
    ) -> Exported:
        """Refuse: no reader of translation models takes fewer files than fairseq wrote itself."""
        raise LskdError(
            f"{folder} is of a translation model, which is not exported; take its {self.checkpoint} and the "
            "data-bin's dictionaries, which fairseq-generate reads"
        )

    def size(self, plan: Plan, run: Run) -> Size:
        """Return the parameters that fairseq counted, the teacher's not among them."""
        log = (plan.folder(run) / LOG).read_text(encoding="utf-8", errors="replace")
        if (found := re.search(r"num\. shared model params: ([\d,]+)", log)) is None:
            raise LskdError(f"{plan.folder(run) / LOG} does not say how large the model is")
        return Size(parameters=int(found[1].replace(",", "")))

    def views(self, plan: Plan, run: Run) -> Views:
        """Return what a student learns from: the training sentences, which are the same in every epoch."""
        from fairseq_kd.settings import PRESETS, default_rest

        config = plan.configs[run.config]
        task, criterion = _section(config, "task"), _section(config, "criterion")
        if task.get("kd_soft_labels"):
            raise CannotStoreError(f"{run.config} has a store of its own")
        if task.get("truncate_source"):
            raise CannotStoreError(
                f"{run.config} sets task.truncate_source, the teacher read whole sentences"
            )
        if _section(config, "dataset").get("train_subset", "train") != "train":
            raise CannotStoreError(f"{run.config} trains on something else than train")
        if criterion.get("kd_on_policy") or criterion.get("kd_divergence") not in (None, "forward"):
            raise CannotStoreError(
                f"{run.config} sets kd_on_policy or kd_divergence, which need all words of an online teacher"
            )
        asked, sampled = plan.soft_labels, plan.soft_labels.get("sampled") or 0
        preset = named if (named := str(criterion.get("kd_preset"))) in PRESETS else "shen2021"
        told = {key: value for key, value in criterion.items() if value is not None}
        wanted = told.get("kd_top_k", PRESETS[preset]["kd_top_k"])
        rest = told.get("kd_rest") or default_rest(preset, sampled)
        if sampled and (wanted or rest != "renormalise"):
            raise CannotStoreError(
                f"{run.config} asks for the top {wanted} with kd_rest {rest}, and what soft_labels.sampled "
                "draws has no rest"
            )
        if told.get("kd_sampled", 0) not in (0, sampled):
            raise CannotStoreError(f"{run.config} sets kd_sampled, which is not what soft_labels keep")
        if not sampled and str(wanted) not in ("0", str(asked["top_k"])):
            raise CannotStoreError(f"{run.config} asks for the top {wanted}, not for soft_labels.top_k or 0")
        return Views("sentences", self.epochs(plan, run), 1, rest=rest)

    def store_command(self, plan: Plan, store: Store, output: str | None = None) -> list[str]:
        """Return ``python -m fairseq_kd.soft_labels ...``."""
        teacher = Path(plan.output, plan.run(store.teacher).folder, CHECKPOINT)
        arguments = ["python", "-m", "fairseq_kd.soft_labels", plan.data, "--path", str(teacher)]
        kept = "--sampled" if store.sampled else "--top-k"
        arguments += [kept, str(store.top_k), "--values", store.values]
        arguments += ["--output", str(plan.labels(store, output))]
        cpu = _section(plan.configs[plan.run(store.writer).config], "common").get("cpu")
        return [*arguments, "--cpu"] if cpu else arguments

    def store(self, command: list[str]) -> None:
        """Run such a command."""
        from fairseq_kd.soft_labels import main

        main(command[3:])


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _criterion(plan: Plan, run: Run) -> dict[str, Any]:
    if run.role == "student":
        teacher = Path(plan.output, plan.run(run.teacher).folder, CHECKPOINT)
        weight = exact(rest_of(run.hard_weight))
        settings = {"kd_teacher": teacher, "kd_weight": weight, "kd_temperature": f"{exact(run.temperature)}"}
        return {**settings, "kd_temperature_squared": "true"} if plan.temperature_squared else settings
    smoothing = {"label_smoothing": f"{exact(run.smoothing)}"}
    if run.role == "teacher" and plan.convention == "paper":
        return smoothing  # fairseq's own criterion and convention
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


def _nats(bits: Any) -> str:
    return "" if bits is None else f"{float(bits) * math.log(2):.8g}"


def _number(value: Any) -> str:
    """Return what is a number as it stands.

    Raises:
        TypeError, ValueError: it is none.
    """
    if value is not None:
        float(value)
    return "" if value is None else str(value)


def _build(cfg: Any, data_dir: Path) -> None:
    from fairseq import tasks
    from fairseq.dataclass.initialize import add_defaults
    from fairseq.optim import build_optimizer
    from fairseq.optim.lr_scheduler import build_lr_scheduler
    from torch import nn

    add_defaults(cfg)
    model: nn.Module = nn.Linear(1, 1)
    if data_dir.exists():  # with the dictionaries, by which models have their size
        task = tasks.setup_task(cfg.task)
        for split in ("train", "valid"):
            task.load_dataset(split)
        model = task.build_model(cfg.model)
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = build_optimizer(cfg.optimizer, trained)
    build_lr_scheduler(cfg.lr_scheduler, optimizer).step_update(0)


def compose_file(path: Path, overrides: list[str]) -> Any:
    """Return what fairseq-hydra-train makes of a recipe's file."""
    from fairseq.dataclass.initialize import hydra_init
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    hydra_init(path.stem)
    with initialize_config_dir(config_dir=str(path.parent.resolve()), version_base="1.1"):
        return compose(config_name=path.stem, overrides=overrides)
