"""Running timm's own, unmodified train.py with our arguments, task and columns."""

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import timm
import torch
import yaml
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import TrainingTask
from torch import nn

from lskd import CheckpointError, LskdError, load_teacher_weights
from lskd.base.tensors import require_finite, require_finite_weights
from lskd.checkpoints import is_safetensors
from lskd.errors import one_line
from lskd.teachers.outputs import logits_of
from timm_ls_kd.arguments import (
    KdConfig,
    add_kd_arguments,
    apply_kd_defaults,
    given_arguments,
    kd_config,
    require_teacher,
)
from timm_ls_kd.data import guard, loading_error
from timm_ls_kd.datacheck import check_data
from timm_ls_kd.fast_teacher import Augmented, speed_up
from timm_ls_kd.models import check_model_name, first_channels
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.preflight import answer, check_teacher_accuracy, spread_batches, spread_indices
from timm_ls_kd.run_settings import converted, read_config
from timm_ls_kd.task import LsKdTask, describe_targets
from timm_ls_kd.teacher import Teacher, announce_teacher, create_teacher, describe_teacher
from timm_ls_kd.trainer.run_folder import (
    AtomicCheckpointSaver,
    check_folder,
    check_writable,
    resumed_checkpoint,
)
from timm_ls_kd.trainer.session import uniform_smoothing
from timm_ls_kd.upstream_replay import ReplaySeams

# Upstream's arguments that mean something to us too.
_SHARED = ("kd_temperature", "smoothing")
OLDEST_TIMM = (1, 0, 27)
MODULE_NAME = "train"  # what the script is imported as, by timm's own tests too
# Everything that is used of the script; all of it is there from timm 1.0.27 on.
_SEAMS = (
    "parser",
    "config_parser",
    "_parse_args",
    "main",
    "train_one_epoch",
    "validate",
    "create_model",
    "create_dataset",
    "create_loader",
    "create_optimizer_v2",
    "resolve_data_config",
    "ClassificationTask",
    "LogitDistillationTask",
    "resume_task_checkpoint",
    "Mixup",
    "FastCollateMixup",
)


@dataclass
class _Run:
    """What is seen of a run of the script, from the outside."""

    args: Namespace = field(default_factory=Namespace)
    kd: KdConfig | None = None
    student: Any = None
    dataset_train: Any = None
    dataset_eval: Any = None
    eval_loader: dict[str, Any] = field(default_factory=dict)
    task: LsKdTask | None = None
    replay: ReplaySeams | None = None
    epoch: int | None = None
    distilled: bool = False  # whether our task took a step


def main(script: Path, argv: Sequence[str]) -> int:
    """Run `script` with `argv`.

    Raises:
        LskdError: timm or the script is too old, an argument is wrong, or a check before training fails.
        DivergedError: a loss, a weight or a validation logit is no longer finite.
    """
    check_version(timm.__version__)
    module = load_script(script)
    run = _Run()
    _extend_parser(module, run)
    _watch(module, run)
    before = sys.argv
    sys.argv = [str(script), *argv]
    try:
        module.main()
        _require_distilled(run, run.distilled)
    except LskdError as error:
        raise (loading_error(error) if "\n" in str(error) else error) from None  # a worker's comes wrapped
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
        if run.replay is not None:
            run.replay.close()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def check_version(version: str) -> None:
    """Refuse a timm whose tasks are not yet what is built on here."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST_TIMM:
        wanted = ".".join(str(number) for number in OLDEST_TIMM)
        raise LskdError(f"timm {version} is too old, {wanted} or later is needed: pip install -U timm.")


def load_script(script: Path) -> ModuleType:
    """Import the script as module `train`, without running its main.

    Raises:
        LskdError: a file that cannot be imported, or that is not a train.py of timm 1.0.27 or later.
    """
    spec = importlib.util.spec_from_file_location(MODULE_NAME, script)
    if spec is None or spec.loader is None:
        raise LskdError(f"{script} is no Python file; give the path of timm's train.py.")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(MODULE_NAME)
    sys.modules[MODULE_NAME] = module
    try:
        spec.loader.exec_module(module)
        lacking = [name for name in _SEAMS if not hasattr(module, name)]
    except (Exception, SystemExit) as error:  # any file may have been named
        _forget(before)
        raise LskdError(
            f"{script} cannot be imported with timm {timm.__version__} ({one_line(error)}); "
            "use the train.py of the installed timm's version."
        ) from None
    if lacking:
        _forget(before)
        raise LskdError(
            f"{script} is no train.py of timm 1.0.27 or later (it has no {', '.join(lacking[:3])}); "
            "use a newer one, or, from another folder, the bundled trainer: timm train.py."
        )
    return module


def _forget(before: ModuleType | None) -> None:
    if before is None:
        sys.modules.pop(MODULE_NAME, None)
    else:
        sys.modules[MODULE_NAME] = before


def _extend_parser(module: Any, run: _Run) -> None:
    """Add our arguments, and make the script's `_parse_args` check them and record them in args.yaml."""
    parser = module.parser
    upstreams = {action.dest for action in parser._actions}
    add_kd_arguments(parser)
    own = {action.dest: action for action in parser._actions if action.dest not in upstreams}
    own |= {action.dest: action for action in parser._actions if action.dest in _SHARED}
    defaults = {name: action.default for name, action in own.items()}

    def error(message: str) -> NoReturn:
        raise LskdError(f"{message}; see timm {sys.argv[0]} --help.")

    parser.error = error
    parse = module._parse_args

    def parse_args() -> tuple[Namespace, str]:
        path = module.config_parser.parse_known_args()[0].config
        config = read_config(path) if path else {}
        typed = given_arguments(parser, sys.argv[1:], {}, tuple(own))
        given = given_arguments(parser, sys.argv[1:], config, _SHARED)
        values = {
            name: defaults[name] if config[name] is None else converted(action, config[name], path)
            for name, action in own.items()
            if name in config and name not in typed
        }
        args, _ = parse()
        vars(args).update(values)
        require_teacher(args, typed)
        apply_kd_defaults(args, given)
        run.args, run.kd = args, kd_config(args)
        _check(args, run.kd)
        # Written anew: the defaults above depend on whether there is a teacher.
        return args, yaml.safe_dump(vars(args), default_flow_style=False)

    module._parse_args = parse_args


def _check(args: Namespace, kd: KdConfig | None) -> None:
    """Check what would otherwise end in a traceback, or in nothing at all, inside the script."""
    check_model_name(args.model, "model")
    if kd is not None:
        check_model_name(kd.teacher, "teacher")
        if kd.checkpoint is not None and not Path(kd.checkpoint).is_file():
            raise LskdError(
                f"--kd-teacher-checkpoint {kd.checkpoint}: there is no such file; check the path."
            )
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise LskdError(f"--device {args.device}: there is no CUDA device here; pass --device cpu.")
    _check_checkpoints(args)
    output = Path(args.output or "output/train")
    if args.experiment:
        check_folder(output / args.experiment, args.resume)
    else:
        check_writable(output)
    if not getattr(args, "input_key", None):
        splits = [split for split in (args.train_split, args.val_split) if split]
        check_data(
            args.dataset,
            args.data_dir or args.data,
            splits,
            num_classes=args.num_classes,
            class_map=args.class_map,
        )


def _check_checkpoints(args: Namespace) -> None:
    """Refuse files of weights that are missing, damaged or would run code, before the script opens them."""
    for flag, name in (("--resume", args.resume), ("--initial-checkpoint", args.initial_checkpoint)):
        if not name:
            continue
        if not Path(name).is_file():
            raise LskdError(f"{flag} {name}: there is no such file; check the path.")
        if Path(name).suffix in (".npz", ".npy"):  # arrays, which timm reads without unpickling
            continue
        if flag == "--resume":
            args.resume, note = resumed_checkpoint(name)
            name = args.resume
            if note:
                print(note, flush=True)
        try:
            load_teacher_weights(name, use_ema=False)
            by_name = Path(name).suffix == ".safetensors"  # as the script goes, which asks the name
            if is_safetensors(name) != by_name:
                what = "is no safetensors file" if by_name else "is a safetensors file"
                raise CheckpointError(f"{name} {what}, whatever its name says; rename it")
        except CheckpointError as error:
            raise CheckpointError(f"{flag}: {error}") from None


def _watch(module: Any, run: _Run) -> None:
    """Put our task into the script's names, and note what its own functions are called with."""
    run.replay = ReplaySeams(lambda: run.kd)
    run.replay.watch(module)
    if hasattr(module, "utils"):
        module.utils = SimpleNamespace(**{**vars(module.utils), "CheckpointSaver": AtomicCheckpointSaver})

    def after(name: str, note: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            note(result, args, kwargs)
            return result

        setattr(module, name, wrapped)

    def student_made(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.student = model
        if run.args.smoothing_convention == "paper":
            # From here on the script hands its smoothing to timm's losses and to mixup.
            run.args.smoothing = uniform_smoothing(run.args, int(model.num_classes))

    def dataset_made(dataset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        guard(dataset, run.args.class_map)
        if kwargs.get("is_training"):
            run.dataset_train = dataset
        else:
            run.dataset_eval = dataset

    def loader_made(loader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.eval_loader = kwargs

    def epoch_trained(metrics: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.epoch = args[0]
        require_finite("the training loss", metrics["loss"], run.epoch)
        require_finite_weights(run.student.state_dict().items(), run.epoch)
        if run.task is not None:
            run.distilled = run.task.stepped
            metrics.update(run.task.epoch_metrics())
        _require_distilled(run, run.distilled)

    validate = module.validate

    def validated(model: Any, *args: Any, **kwargs: Any) -> Any:
        def look(_: Any, __: Any, output: Any) -> None:
            require_finite("the validation logits", logits_of(output), run.epoch)

        hook = model.register_forward_hook(look)
        try:
            metrics = validate(model, *args, **kwargs)
        finally:
            hook.remove()
        require_finite("the validation loss", metrics["loss"], run.epoch)
        return metrics

    module.validate = validated

    after("create_model", student_made)
    after("create_dataset", dataset_made)
    after("create_loader", loader_made)
    after("train_one_epoch", epoch_trained)
    # What the script calls next after making its task, and before its output folder: with another task than
    # the one replaced here it would train on without the teacher.
    create_optimizer = module.create_optimizer_v2

    def optimizer_made(*args: Any, **kwargs: Any) -> Any:
        _require_distilled(run, run.task is not None)
        return create_optimizer(*args, **kwargs)

    module.create_optimizer_v2 = optimizer_made
    plain = module.ClassificationTask

    def create_task(*positional: Any, **kwargs: Any) -> TrainingTask:
        task: TrainingTask = plain(
            *positional, **(kwargs if run.kd is None else {**kwargs, "verbose": False})
        )
        if run.kd is None:
            return task
        _check_criterion(task)
        model = positional[0] if positional else kwargs["model"]
        run.task = _create_kd_task(run, run.kd, model, kwargs)
        return run.task

    module.ClassificationTask = create_task


def _require_distilled(run: _Run, distilled: bool) -> None:
    if run.kd is not None and not distilled:
        raise LskdError(
            f"--kd-teacher {run.kd.teacher} is asked for and nothing is distilled: the script trains another "
            "task than ClassificationTask, or nothing at all; drop the flag that chooses it, or --kd-teacher."
        )


def _check_criterion(task: Any) -> None:
    """Refuse a loss whose place the distillation loss would take in silence."""
    criterion = task.criterion
    known = (nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy)
    if type(criterion) not in known or getattr(criterion, "weight", None) is not None:
        raise LskdError(
            f"the script is told to train on {type(criterion).__name__}, which has no meaning with "
            "--kd-teacher; drop the flag that chooses it (--loss, --bce-loss)."
        )


def _create_kd_task(run: _Run, kd: KdConfig, model: Any, kwargs: dict[str, Any]) -> LsKdTask:
    """Build our task where the script builds timm's, its loaders being made already."""
    if kd.soft_labels is not None:
        return _create_soft_labels_task(run, kd, model, kwargs)
    args, loader = run.args, run.eval_loader
    device = kwargs.get("device") or torch.device(args.device)
    channels = first_channels(run.student)
    # What the loader normalises with, which is what the teacher's input has to be made from.
    student_norm = Normalisation.of(loader["mean"], loader["std"], channels)
    _say(args, announce_teacher(kd))
    teacher = create_teacher(kd, args.num_classes, channels, student_norm, channels_last=args.channels_last)
    task = LsKdTask(
        model,
        teacher,
        **kd.loss_arguments(),
        device=device,
        dtype=kwargs.get("dtype"),
    )
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    _say(args, describe_targets(task.loss, args.num_classes, mixing))
    for line in describe_teacher(kd, teacher, student_norm, args.num_classes):
        _say(args, line)
    _say(args, _preflight(run, kd, teacher, student_norm, device))
    _speed_up(run, kd, teacher, student_norm, device)
    return task


def _create_soft_labels_task(run: _Run, kd: KdConfig, model: Any, kwargs: dict[str, Any]) -> LsKdTask:
    """The same with stored soft labels, where the teacher is made only if it will be asked."""
    args, loader = run.args, run.eval_loader
    device = kwargs.get("device") or torch.device(args.device)
    channels = first_channels(run.student)
    student_norm = Normalisation.of(loader["mean"], loader["std"], channels)
    replay = run.replay
    assert replay is not None

    def build() -> Teacher:
        _say(args, announce_teacher(kd))
        teacher = create_teacher(
            kd, args.num_classes, channels, student_norm, channels_last=args.channels_last
        )
        teacher.to(device)
        for line in describe_teacher(kd, teacher, student_norm, args.num_classes):
            _say(args, line)
        _say(args, _preflight(run, kd, teacher, student_norm, device))
        assert replay.run is not None
        _speed_up(run, replace(kd, teacher_fast=replay.run.teacher_mode), teacher, student_norm, device)
        replay.run.speaks(teacher.form)
        return teacher

    task = replay.create_task(
        args,
        kd,
        model,
        student_norm,
        build,
        _autocast(args, device),
        partial(_say, args),
        device=device,
        dtype=kwargs.get("dtype"),
    )
    _say(args, describe_targets(task.loss, args.num_classes, args.mixup > 0 or args.cutmix > 0))
    return task


def _preflight(
    run: _Run, kd: KdConfig, teacher: Teacher, student_norm: Normalisation, device: torch.device
) -> str:
    args = run.args
    autocast = _autocast(args, device)
    dataset = run.dataset_eval
    if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset) or kd.preflight_samples == 0:
        size = run.eval_loader["input_size"]
        with autocast():
            answer(teacher, torch.zeros(2, len(student_norm.mean), *size[-2:], device=device), kd.teacher)
        return f"teacher '{kd.teacher}': accuracy not checked"
    indices = spread_indices(len(dataset), kd.preflight_samples)[args.rank :: args.world_size]
    return check_teacher_accuracy(
        teacher,
        spread_batches(dataset, indices, student_norm, device, prefetch=run.eval_loader["use_prefetcher"]),
        args.num_classes,
        name=kd.teacher,
        device=device,
        autocast=autocast,
        channels_last=args.channels_last,
    )


def _speed_up(
    run: _Run, kd: KdConfig, teacher: Teacher, student_norm: Normalisation, device: torch.device
) -> None:
    if kd.teacher_fast != "none":
        line = speed_up(
            kd,
            teacher,
            # AugMix takes the training images' transform apart.
            run.dataset_eval if run.args.aug_splits else Augmented(run.dataset_train, run.args.seed),
            student_norm,
            device,
            prefetch=run.eval_loader["use_prefetcher"],
            batch_size=run.args.batch_size,
            autocast=_autocast(run.args, device),
        )
        _say(run.args, line)


def _autocast(args: Namespace, device: torch.device) -> Callable[[], Any]:
    dtype = getattr(torch, args.amp_dtype)
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=bool(args.amp))


def _say(args: Namespace, line: str) -> None:
    if args.rank == 0:
        print(line, flush=True)
