"""timm's recipes: real loaders, models, teacher, optimiser and schedule, two steps and one evaluation."""

import contextlib
import io
import itertools
import json
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lskd_study.base.extras import needs_study_extra
from lskd_study.plan.plan import CHECKPOINT, Plan, Run, exact
from lskd_study.plan.recipes import Recipe
from lskd_study.recipe_check import cost
from lskd_study.recipe_check.miniature import DataSet, data_set, write_miniature
from lskd_study.recipe_check.report import CheckedRecipe, CheckedRun
from lskd_study.study.checks import check_data_folder
from lskd_study.study.engine import make_plan
from lskd_study.trainers import TIMM
from lskd_study.trainers.size import Network, network_size, tensor_size

with needs_study_extra():
    import timm
    import torch
    import yaml
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs

    from timm_ls_kd import inputs
    from timm_ls_kd.arguments import kd_config
    from timm_ls_kd.models import check_model_name, check_pretrained, input_arguments
    from timm_ls_kd.trainer import session as parts
    from timm_ls_kd.trainer.arguments import parse_arguments
    from timm_ls_kd.trainer.loop import train_one_epoch, validate
    from timm_ls_kd.trainer.rehearsal import Rehearsal

STEPS = 2
BATCH = 2
# A file's first network takes its steps on images of the real size, the others on these: a twelfth.
_SMALL = 64
_LARGEST_AT_REAL_SIZE = 9e9  # operations: a ResNet-50 of 224 pixels
# What a step does not depend on: files that differ in nothing else are one to a large network.
_SCHEDULE = {
    *(
        "epochs",
        "lr",
        "sched",
        "decay_milestones",
        "decay_epochs",
        "decay_rate",
        "warmup_epochs",
        "warmup_lr",
    ),
    *(
        "batch_size",
        "validation_batch_size",
        "workers",
        "pretrained",
        "initial_checkpoint",
        "checkpoint_hist",
    ),
    *("log_interval", "pin_mem", "amp"),
}


@dataclass(frozen=True)
class _Kind:
    """Runs that differ in seed and smoothing alone; ``run`` is the one with the most smoothing."""

    run: Run
    teacher: Run | None
    count: int


class TimmChecks:
    """Checks recipes one after the other; what one has tried is not tried again in the next."""

    def __init__(self, scratch: Path) -> None:
        """Keep a folder for miniatures and teachers."""
        self.scratch = scratch
        self._sizes: dict[tuple[Any, ...], Network] = {}
        self._stepped: set[tuple[Any, ...]] = set()
        self._at_real_size: set[tuple[Any, ...]] = set()

    def check(self, recipe: Recipe) -> CheckedRecipe:
        """Check a study's runs of timm.

        Raises:
            LskdError: one line with what is wrong.
        """
        plan = make_plan(str(recipe.path), None)
        data = data_set(plan.data, plan.num_classes)
        return CheckedRecipe(recipe.name, self.check_plan(plan, data))

    def check_plan(
        self, plan: Plan, data: DataSet, roles: tuple[str, ...] = ("teacher", "student")
    ) -> list[CheckedRun]:
        """Check those of a plan's runs that have one of these roles.

        Raises:
            LskdError: one line with what is wrong.
        """
        runs = [run for run in plan.runs if run.role in roles]
        for run in runs:
            check_model_name(run.model, "model")
        folder = self.miniature(plan.data, data)
        check_data_folder(folder, plan.data, plan.num_classes)
        mini = replace(plan, data=str(folder), cwd=str(Path.cwd()), output=str(self.scratch / "runs"))
        found = []
        for kind in self._kinds(replace(mini, runs=runs), mini):
            found.append(self._check_kind(mini, kind, data))
        order = {"teacher": 0, "student": 1}
        return sorted(found, key=lambda run: order[run.name.split()[0]])

    def miniature(self, name: str, data: DataSet) -> Path:
        """Return the miniature of a data folder, written when first asked for."""
        folder = self.scratch / "data" / f"{Path(name).name}-{data.classes}"
        if not folder.exists():
            write_miniature(folder, data)
        return folder

    def _kinds(self, plan: Plan, whole: Plan) -> list[_Kind]:
        """Return a plan's kinds of runs, the smallest networks first."""
        groups: dict[tuple[Any, ...], list[Run]] = {}
        for run in plan.runs:
            teacher = whole.by_id[run.teacher].model if run.teacher else None
            key = (run.role, run.model, run.config, teacher, run.temperature, run.hard_weight)
            groups.setdefault(key, []).append(run)
        kinds = []
        for members in groups.values():
            run = max(members, key=lambda member: member.smoothing)
            teacher_run = whole.by_id[run.teacher] if run.teacher else None
            kinds.append(_Kind(run, teacher_run, len(members)))

        def weight(kind: _Kind) -> tuple[int, float]:
            teacher = self._size(whole, kind.teacher).flops if kind.teacher else 0.0
            return 1 if kind.teacher else 0, self._size(whole, kind.run).flops + teacher

        return sorted(kinds, key=weight)

    def _check_kind(self, plan: Plan, kind: _Kind, data: DataSet) -> CheckedRun:
        run, teacher = kind.run, kind.teacher
        args = self._arguments(plan, run)
        if args.pretrained:
            check_pretrained(run.model, reach=False)
        name = f"{run.role} {run.model}, {Path(run.config).name}"
        if teacher is not None:
            name += f", of {teacher.model}" + f", T {exact(run.temperature)}" * (run.temperature != 1)
            name += f", lambda {exact(run.hard_weight)}" * (run.hard_weight > 0)
        size = self._size(plan, run)
        # One network under one set of options takes its steps once; every file does with every data set.
        own = (self._identity(plan, run), self._identity(plan, teacher) if teacher else None)
        of_file = (plan.data, run.role, json.dumps(plan.configs[run.config], sort_keys=True))
        real = of_file not in self._at_real_size and size.flops <= _LARGEST_AT_REAL_SIZE
        if real or not {own, of_file} <= self._stepped:
            self._take_steps(plan, kind, None if real else _SMALL)
            self._stepped |= {own, of_file}
            self._at_real_size |= {of_file} if real else set()
        rates = _rates(args, data)
        hours = cost.gpu_hours(
            len(rates),
            data.train,
            data.validation if args.val_split else 0,
            size.flops,
            self._size(plan, teacher).flops if teacher else 0.0,
            backward=0.0 if args.train_only else cost.BACKWARD,
        )
        return CheckedRun(name, size, cost.corner_points(rates), len(rates), hours, kind.count)

    def _identity(self, plan: Plan, run: Run) -> tuple[str, str]:
        options = {key: value for key, value in plan.configs[run.config].items() if key not in _SCHEDULE}
        return run.model.partition(".")[0], json.dumps(options, sort_keys=True)

    def _arguments(self, plan: Plan, run: Run, *more: str) -> Namespace:
        """Return what the trainer makes of a run's real command line."""
        words = TIMM.command(plan, run)[2:]
        args = parse_arguments([*words, *more])
        args.rank, args.world_size, args.distributed, args.device = 0, 1, False, "cpu"
        return args

    def _size(self, plan: Plan, run: Run) -> Network:
        args = self._arguments(plan, run)
        key = (
            run.model,
            args.num_classes,
            args.img_size,
            str(args.input_size),
            args.in_chans,
            str(args.model_kwargs),
        )
        if key not in self._sizes:
            extra = input_arguments(args.model, vars(args))
            channels = inputs.input_channels(vars(args))
            sized = dict(vars(args), in_chans=channels)
            resolved = timm.data.resolve_data_config(
                sized, pretrained_cfg=timm.get_pretrained_cfg(run.model).to_dict()
            )
            self._sizes[key] = network_size(
                lambda: timm.create_model(
                    run.model, num_classes=args.num_classes, in_chans=channels, **extra
                ),
                tensor_size(channels, *resolved["input_size"][-2:]),
            )
        return self._sizes[key]

    def _take_steps(self, plan: Plan, kind: _Kind, img_size: int | None) -> None:
        """Train for two steps and validate one batch, with the trainer's own parts."""
        run = kind.run
        words = [
            "--batch-size",
            str(BATCH),
            "--validation-batch-size",
            str(BATCH),
            "--workers",
            "0",
            "--device",
            "cpu",
        ]
        if img_size is not None and not timm.get_pretrained_cfg(run.model).fixed_input_size:
            words += ["--img-size", str(img_size)]
        if kind.teacher is not None:
            words += ["--kd-preflight-samples", "0"]  # it has learnt nothing
            self._write_teacher(plan, kind.teacher)
        args = _offline(self._arguments(plan, run, *words))
        kd = kd_config(args)
        device = torch.device("cpu")
        with _quiet():
            model = parts.create_student(args)
            built = Rehearsal().build(args, model, device)
            task = parts.create_task(args, kd, model, built.data, built.smoothing, device)
            if kd is not None:
                training = built.train.dataset.dataset
                validation = built.validation and built.validation.dataset.dataset
                parts.run_preflight(
                    kd, task.teacher, validation, training, built.data, args, device, contextlib.nullcontext
                )
            train_one_epoch(
                0,
                task,
                _First(built.train, STEPS),  # type: ignore[arg-type]
                built.optimizer,
                args,
                autocast=contextlib.nullcontext,
                scheduler=built.scheduler,
            )
            images = _First(built.validation, 1)
            validate(task.get_eval_model(), images, args, contextlib.nullcontext)  # type: ignore[arg-type]
        if run.role == "teacher":
            _save(plan, run, model, args)

    def _write_teacher(self, plan: Plan, teacher: Run) -> None:
        """Leave a teacher where its student's command looks for it, unless it is there from its own check."""
        if (plan.folder(teacher) / CHECKPOINT).exists():
            return
        args = _offline(self._arguments(plan, teacher))
        with _quiet():
            _save(plan, teacher, parts.create_student(args), args)


class _First:
    """The first batches of a loader."""

    def __init__(self, loader: Any, count: int) -> None:
        self.loader, self.count = loader, count
        self.device = loader.device

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.count)


def _offline(args: Namespace) -> Namespace:
    """Leave out what this machine need not have: weights to start from, a GPU's precision."""
    args.pretrained, args.initial_checkpoint, args.amp = False, "", False
    args.log_interval = 10**9
    return args


def _save(plan: Plan, run: Run, model: Any, args: Namespace) -> None:
    folder = plan.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict()}, folder / CHECKPOINT)
    (folder / "args.yaml").write_text(yaml.safe_dump(vars(args)), encoding="utf-8")


def _rates(args: Namespace, data: DataSet) -> list[float]:
    """Return the real schedule's learning rate in each epoch."""
    updates = max(1, data.train // args.batch_size // args.grad_accum_steps)
    stand_in = torch.nn.Linear(1, 1)
    optimizer = parts.create_optimizer(args, stand_in)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    rates = []
    for epoch in range(epochs):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if scheduler is not None:
            scheduler.step_update((epoch + 1) * updates)
            scheduler.step(epoch + 1)
    return rates


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep a trainer's own progress to itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
