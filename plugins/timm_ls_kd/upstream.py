"""Running timm's own, unmodified train.py with our arguments, task and columns."""

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from lskd.teachers.frozen import Normalisation
from lskd.teachers.outputs import logits_of
from timm_ls_kd.arguments import (
    KdConfig,
    add_kd_arguments,
    apply_kd_defaults,
    given_arguments,
    kd_config,
    parser_error,
    require_teacher,
)
from timm_ls_kd.data import guard
from timm_ls_kd.loader import SeededDataset, loading_error
from timm_ls_kd.models import first_channels
from timm_ls_kd.run_settings import read_config, values_of
from timm_ls_kd.store import KeySampler, replayed_images
from timm_ls_kd.task import LsKdTask, SoftLabelsTask, create_kd_task
from timm_ls_kd.teacher import StudentRun
from timm_ls_kd.trainer.run_folder import (
    AtomicCheckpointSaver,
    check_folder,
    check_writable,
    resumed_checkpoint,
)
from timm_ls_kd.trainer.session import check_images, check_names, uniform_smoothing


class NoMixing:
    """Stands for timm's `Mixup`, in a run whose images come mixed."""

    mixup_enabled = False

    def __call__(self, images: Any, targets: Any) -> tuple[Any, Any]:
        """Return both as they are."""
        return images, targets


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
    images: tuple[Any, Any] | None = None  # of stored soft labels: by key, and what makes batches of them
    sampler: KeySampler | None = None
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
        if isinstance(run.task, SoftLabelsTask):
            run.task.run.close()
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
    own = [each for each in parser._actions if each.dest not in upstreams or each.dest in _SHARED]
    defaults = {action.dest: action.default for action in own}

    def error(message: str) -> NoReturn:
        raise parser_error(message, f"timm {sys.argv[0]}")

    parser.error = error
    parse = module._parse_args

    def parse_args() -> tuple[Namespace, str]:
        path = module.config_parser.parse_known_args()[0].config
        config = read_config(path) if path else {}
        typed = given_arguments(parser, sys.argv[1:], tuple(defaults))
        named = {name: config[name] for name in defaults if name in config and name not in typed}
        values = values_of(parser, named, path)
        args, _ = parse()
        vars(args).update({name: defaults[name] for name in named} | values)
        require_teacher(args, typed)
        apply_kd_defaults(args, typed.keys() | values.keys())
        run.args, run.kd = args, kd_config(args)
        _check(args, run.kd)
        # Written anew: the defaults above depend on whether there is a teacher.
        return args, yaml.safe_dump(vars(args), default_flow_style=False)

    module._parse_args = parse_args


def _check(args: Namespace, kd: KdConfig | None) -> None:
    """Check what would otherwise end in a traceback, or in nothing at all, inside the script."""
    check_names(args, kd)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise LskdError(f"--device {args.device}: there is no CUDA device here; pass --device cpu.")
    _check_checkpoints(args)
    output = Path(args.output or "output/train")
    if args.experiment:
        check_folder(output / args.experiment, args.resume)
    else:
        check_writable(output)
    if not getattr(args, "input_key", None):
        check_images(args)


def _check_checkpoints(args: Namespace) -> None:
    """Refuse files of weights that are damaged or would run code, before the script opens them."""
    for flag, name in (("--resume", args.resume), ("--initial-checkpoint", args.initial_checkpoint)):
        if not name or Path(name).suffix in (".npz", ".npy"):  # arrays, which timm reads without unpickling
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
    _watch_images(module, run)
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


def _watch_images(module: Any, run: _Run) -> None:
    """Put our images, collate function and epochs into the script's names, where soft labels are stored."""
    create_loader, train_one_epoch = module.create_loader, module.train_one_epoch

    def stores() -> bool:
        return run.kd is not None and run.kd.soft_labels is not None

    def replayed_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if not stores() or not kwargs.get("is_training"):
            return create_loader(dataset, *args, **kwargs)
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise LskdError(
                "--kd-soft-labels needs images that can be asked for one by one, this data set can only "
                "be streamed; use a folder of images or a tar file."
            )
        assert run.kd is not None
        run.images = replayed_images(dataset, run.kd.soft_labels, kwargs["use_prefetcher"])
        assert run.images is not None
        images, collate = run.images
        loader = create_loader(images, *args, **(kwargs | {"collate_fn": collate}))
        batches = getattr(loader, "loader", loader).batch_sampler
        run.sampler = batches.sampler = KeySampler(batches.sampler, len(images))
        return loader

    def train_epoch(epoch: int, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(run.task, SoftLabelsTask) or run.sampler is None:
            return train_one_epoch(epoch, *args, **kwargs)
        run.sampler.epoch = epoch
        run.task.run.begin_epoch(epoch)
        try:
            result = train_one_epoch(epoch, *args, **kwargs)
        except LskdError as error:
            raise loading_error(error) from None
        run.task.run.end_epoch(run.task.teacher)
        return result

    def unless_stored(original: Any, instead: Any) -> Any:
        return lambda *args, **kwargs: instead if stores() else original(*args, **kwargs)

    module.create_loader, module.train_one_epoch = replayed_loader, train_epoch
    # The images come mixed.
    module.Mixup = unless_stored(module.Mixup, NoMixing())
    module.FastCollateMixup = unless_stored(module.FastCollateMixup, None)


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
    args, loader = run.args, run.eval_loader
    device = kwargs.get("device") or torch.device(args.device)
    channels = first_channels(run.student)
    training: Any = run.dataset_train
    if args.aug_splits:  # AugMix takes the training images' transform apart
        training = run.dataset_eval
    elif training is not None:
        training = SeededDataset(training, args.seed, once=False)
    student = StudentRun(
        args,
        kd,
        (channels, *loader["input_size"][-2:]),
        # What the loader normalises with, which is what the teacher's input has to be made from.
        Normalisation.of(loader["mean"], loader["std"], channels),
        device,
        partial(torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype), enabled=bool(args.amp)),
        prefetch=loader["use_prefetcher"],
        validation=run.dataset_eval,
        training=training,
        images=run.images,
    )
    return create_kd_task(model, student, kwargs.get("dtype"))
