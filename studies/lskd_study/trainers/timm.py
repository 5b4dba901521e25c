"""timm: the command line of a run, and its logs in the common vocabulary of columns."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lskd import LskdError, load_teacher_weights
from lskd_study.base.text import did_you_mean
from lskd_study.plan.plan import CHECKPOINT, Plan, Role, Run, Store, exact
from lskd_study.plan.records import Size
from lskd_study.plan.schema import RESERVED, read_trainer_config
from lskd_study.trainers.trainer import (
    MIXED,
    CannotStoreError,
    Exported,
    TryOut,
    Views,
    check_classes,
    quiet,
    read_epochs,
)

SUMMARY = "summary.csv"
_VALIDATION = {"val_loss": "eval_loss", "val_top1": "eval_top1", "val_top5": "eval_top5"}


class Timm:
    """timm's own training script, or the trainer of `timm_ls_kd` where there is none."""

    checkpoint = CHECKPOINT
    curve_columns: tuple[str, ...] = (
        *("epoch", "train_ce", "train_kl", "train_teacher_entropy", "train_hard_ce", "train_agreement"),
        *("val_loss", "val_top1", "val_top5"),
    )
    files: tuple[str, ...] = (
        *("args.yaml", "args.yaml.tmp", SUMMARY, f"{SUMMARY}.tmp", CHECKPOINT, "model_best.pth.tar"),
        *("checkpoint-*.pth.tar", "recovery-*.pth.tar", "tmp.pth.tar", "*.pth.tar.tmp"),
    )
    without_effect: tuple[str, ...] = (
        *("workers", "pin_mem", "checkpoint_hist", "log_interval", "log_tensorboard", "log_trackio"),
        *("log_wandb", "wandb_*", "trackio_project"),
    )
    modules: tuple[str, ...] = ("timm_ls_kd.trainer.main", "timm_ls_kd.evaluation", "torch._dynamo")
    stores_while_training = True

    def read_config(self, path: Path) -> dict[str, Any]:
        """Return a YAML file's content; a key that the study sets itself is an error."""
        return read_trainer_config(path)

    def check_config(self, config: dict[str, Any], path: str, role: Role, model: str) -> None:
        """Check a file with the trainer's own parser: keys, types and ranges."""
        from timm_ls_kd.arguments import kd_config
        from timm_ls_kd.run_settings import apply_config
        from timm_ls_kd.trainer.arguments import check_together, create_parser

        parser = create_parser()
        valid = vars(parser.parse_args([])).keys() - RESERVED - {"config", "data"}
        for key, value in config.items():
            if apply_config(parser, {key: value}, path):
                hint = did_you_mean(key, valid, "timm train.py --help lists them")
                raise LskdError(f"{path}: unknown key {key!r}; {hint}")
        args = parser.parse_args([])
        # What the study itself sets for every run; the file is not to blame for it.
        args.smoothing = 0.0
        args.kd_teacher = "teacher" if role == "student" else None
        if role == "student" and args.kd_rest != "spread" and args.kd_soft_labels is None:
            raise LskdError(f"{path}: remove kd_rest, and set soft_labels.rest of the study")
        try:
            check_together(args)
            kd_config(args)
        except LskdError as error:
            if role == "control":  # the student's file, which is checked before, passed
                asked = str(error).partition(" need")[0]
                raise LskdError(
                    f"{path} says {asked} of a teacher, and a control has none; remove it there, or controls"
                ) from error
            raise LskdError(f"{path}, as a {role}'s file: {error}") from error

    def check_run(self, plan: Plan, run: Run) -> None:
        """Check that timm knows the model, and the classes of weights to start from."""
        from timm.models import get_pretrained_cfg

        from timm_ls_kd.models import check_model_name

        check_model_name(run.model, "model")
        config = plan.configs[run.config]
        arguments = config.get("model_kwargs") or {}
        if isinstance(arguments, Mapping) and "num_classes" in arguments:
            raise LskdError(
                f"{run.config}: model_kwargs sets num_classes, which the study sets; remove it there"
            )
        name = str(config.get("initial_checkpoint") or "")
        if not name:
            return
        path = Path(plan.cwd, name)
        if not path.is_file():
            raise LskdError(
                f"{run.config}: initial_checkpoint {name} is not there; make it first, or remove the key"
            )
        known = None if ":" in run.model else get_pretrained_cfg(run.model)
        classifiers = getattr(known, "classifier", None) or ()
        content = load_teacher_weights(path)
        for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
            weight = content.get(f"{classifier}.weight")
            if weight is not None:
                what = f"the number of classes in initial_checkpoint {name}"
                check_classes(plan, run, what, len(weight))

    def rehearsal(self, plan: Plan) -> TryOut:
        """Return what builds a run by the bundled trainer's own parts."""
        from timm_ls_kd.models import input_channels
        from timm_ls_kd.trainer.session import Rehearsal

        parts = Rehearsal(data_there=plan.data_dir.exists())

        def try_out(run: Run) -> None:
            args = self.arguments(plan, run)
            if run.teacher:
                teacher = plan.run(run.teacher)
                theirs, ours = (input_channels(vars(a)) for a in (self.arguments(plan, teacher), args))
                if theirs != ours:
                    raise LskdError(
                        f"its images have {ours} channels, those of its teachers {theirs} "
                        f"({teacher.config}); set in_chans alike"
                    )
            parts.try_out(args)

        return try_out

    def epochs(self, plan: Plan, run: Run) -> int:
        """Return how many epochs a run trains: timm's own number where its file names none."""
        from timm_ls_kd.run_settings import apply_config
        from timm_ls_kd.store import planned_epochs
        from timm_ls_kd.trainer.arguments import create_parser

        parser = create_parser()
        apply_config(parser, plan.configs[run.config], run.config)
        return planned_epochs(parser.parse_args([]))

    def decays(self, plan: Plan, run: Run) -> list[int]:
        """Return after how many epochs the rate of timm's own schedule steps down."""
        from timm_ls_kd.trainer.session import rates

        found = rates(self.arguments(plan, run))
        falls = [at for at in range(1, len(found)) if found[at] < found[at - 1]]
        highest = found.index(max(found))  # before it the rate warms up
        return falls if 2 * len(falls) < len(found) - highest else []

    def command(self, plan: Plan, run: Run, output: str | None = None) -> list[str]:
        """Return ``timm train.py ...``."""
        folder = Path(plan.output, run.folder)
        arguments = ["timm", "train.py", plan.data, "--config", run.config, "--model", run.model]
        arguments += ["--num-classes", str(plan.num_classes), "--seed", str(run.seed)]
        # Named for every run: timm's own default smooths by 0.1 unasked.
        alpha = 0.0 if run.role == "student" else run.smoothing
        arguments += ["--smoothing", exact(alpha), "--smoothing-convention", plan.convention]
        if run.role == "student":
            teacher = plan.run(run.teacher)
            arguments += ["--kd-teacher", teacher.model, "--kd-teacher-checkpoint"]
            arguments += [str(Path(plan.output, teacher.folder, CHECKPOINT))]
            arguments += ["--kd-temperature", exact(run.temperature)]
            arguments += ["--kd-hard-weight", exact(run.hard_weight)]
            arguments += ["--kd-temperature-squared"] * plan.temperature_squared
            if store := plan.store_of(run):
                arguments += ["--kd-soft-labels", str(plan.labels(store, output))]
                flag = "--kd-soft-labels-sampled" if store.sampled else "--kd-soft-labels-top-k"
                arguments += [flag, str(store.top_k), "--kd-soft-labels-values", store.values]
                arguments += ["--kd-rest", plan.rest] if plan.rest else []
                arguments += ["--kd-soft-labels-seed", str(store.seed)]
                arguments += ["--kd-soft-labels-views", str(store.epochs)] * store.views
        return [*arguments, "--output", output or str(folder.parent), "--experiment", folder.name]

    def arguments(self, plan: Plan, run: Run, *more: str) -> Namespace:
        """Return a run's command as the trainer parses it.

        Raises:
            LskdError: as the run would.
        """
        from timm_ls_kd.trainer.arguments import parse_arguments

        return parse_arguments([*self.command(plan, run)[2:], *more])

    def train(self, arguments: list[str]) -> None:
        """Run ``timm`` with these arguments, ``train.py`` first."""
        from timm_ls_kd.cli import main

        if status := main(arguments):
            raise SystemExit(status)

    def resume(self, folder: Path) -> list[str] | None:
        """Return ``--resume`` with the newest checkpoint that is whole."""
        from timm_ls_kd.trainer.run_folder import whole_checkpoint

        checkpoint = whole_checkpoint(folder / CHECKPOINT)
        return None if checkpoint is None else ["--resume", str(checkpoint)]

    def read_curves(self, folder: Path, role: Role) -> list[dict[str, str]]:
        """Return a run's epochs in the common columns.

        The training loss of a run without a teacher is cross-entropy with the (smoothed) labels:
        ``train_hard_ce``.
        """
        # A run killed after an epoch's row and before its checkpoint repeats that epoch.
        by_epoch = {int(row["epoch"]): row for row in read_epochs(folder / SUMMARY)}
        curves = []
        for epoch, row in sorted(by_epoch.items()):
            common = {name: row.get(_VALIDATION.get(name, name)) or "" for name in self.curve_columns}
            if role != "student":
                common["train_hard_ce"] = row.get("train_loss") or ""
            curves.append({**common, "epoch": str(epoch)})
        return curves

    def collect(self, folder: Path, data_dir: Path) -> Any:
        """Return logits, labels and keys of the validation images (`lskd.teachers.outputs.Evaluation`)."""
        from timm_ls_kd.evaluation import collect_logits

        return collect_logits(folder, checkpoint=CHECKPOINT, data_dir=data_dir)

    def export(
        self, folder: Path, output: Path, class_names: list[str] | None, data_dir: Path | None
    ) -> Exported:
        """Write what timm itself loads."""
        from timm_ls_kd.export import export_run

        with quiet():
            model, images, answers = export_run(folder, output, class_names, data_dir, CHECKPOINT)
        mode = "RGB" if images.shape[1] == 3 else "L"
        usage = (
            "import timm\nfrom PIL import Image\n\n"
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
            f'logits = model(transform(Image.open("image.png").convert("{mode}")).unsqueeze(0))'
        )
        return Exported(model, images, answers, "timm", usage)

    def views(self, plan: Plan, run: Run) -> Views:
        """Return what a student's training images follow from, as the trainer itself says it."""
        from timm_ls_kd.trainer.session import views_of

        if any(key.replace("-", "_").startswith("kd_soft_labels") for key in plan.configs[run.config]):
            raise CannotStoreError(f"{run.config} has a store of its own")
        try:
            args = self.arguments(plan, run, "--kd-soft-labels", "labels", "--kd-soft-labels-top-k", "0")
            settings, epochs, mixed = views_of(args)
        except LskdError as error:
            raise CannotStoreError(str(error).rstrip(".")) from error
        key = json.dumps(settings, sort_keys=True)
        return Views(key, epochs, epochs, MIXED if mixed else "")

    def size(self, plan: Plan, run: Run) -> Size:
        """Return parameters and operations of the model as the trainer builds it."""
        from timm_ls_kd.trainer.session import network_size

        parameters, operations = network_size(self.arguments(plan, run))
        return Size(parameters=parameters, operations=operations)

    def store_command(self, plan: Plan, store: Store, output: str | None = None) -> list[str]:
        """Return ``timm soft-labels ...``."""
        arguments = self.command(plan, plan.run(store.writer), output)
        return ["timm", "soft-labels", *arguments[2 : arguments.index("--output")]]

    def store(self, command: list[str]) -> None:
        """Run such a command."""
        self.train(command[1:])
