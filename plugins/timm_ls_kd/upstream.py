"""Running timm's own, unmodified train.py with our arguments, task and columns."""

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import timm
import torch
import yaml
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import TrainingTask
from torch import nn

from lskd import CheckpointError, LskdError, load_teacher_weights
from lskd.base.tensors import require_finite, require_finite_weights
from lskd.base.trackers import check_tracker
from lskd.checkpoints import is_safetensors
from lskd.errors import loading_error, one_line
from lskd.teachers.frozen import Normalisation
from lskd.teachers.outputs import logits_of
from timm_ls_kd.arguments import (
    ABOUT_TIMMS_TEACHER,
    KdConfig,
    add_kd_arguments,
    apply_kd_defaults,
    given_arguments,
    kd_config,
    multi_label,
    parser_error,
    require_teacher,
)
from timm_ls_kd.data import guard
from timm_ls_kd.loader import SeededDataset
from timm_ls_kd.models import first_channels
from timm_ls_kd.run_settings import read_config, values_of
from timm_ls_kd.store import KeySampler, replayed_images
from timm_ls_kd.task import LsKdTask, SoftLabelsTask, create_kd_task
from timm_ls_kd.teacher import StudentRun
from timm_ls_kd.trainer.run_folder import (
    AtomicCheckpointSaver,
    automatic_resume,
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
_REPLACED = (
    *("_parse_args", "create_model", "create_dataset", "create_loader", "create_optimizer_v2"),
    *("resume_task_checkpoint", "train_one_epoch", "validate"),
)
_TASKS = ("ClassificationTask", "MultiLabelClassificationTask")  # the second from timm 1.0.31 on
_SEAMS = (
    *("parser", "config_parser", *_REPLACED, "ClassificationTask", "Mixup", "FastCollateMixup", "main"),
    *("resolve_data_config", "LogitDistillationTask"),
)


def main(script: Path, argv: Sequence[str]) -> int:
    """Run `script` with `argv`.

    Raises:
        LskdError: timm or the script is too old, an argument is wrong, or a check before training fails.
        DivergedError: a loss, a weight or a validation logit is no longer finite.
    """
    check_version(timm.__version__)
    module = load_script(script)
    run = _WatchedRun(module)
    before = sys.argv
    sys.argv = [str(script), *argv]
    try:
        module.main()
        run.require_distilled(run.distilled or run.was_done)
    except LskdError as error:
        raise loading_error(error) from None
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
        if lacking := [name for name in _SEAMS if not hasattr(module, name)]:
            raise LskdError(
                f"{script} is no train.py of timm 1.0.27 or later (it has no {', '.join(lacking[:3])}); "
                "use a newer one, or, from another folder, the bundled trainer: timm train.py."
            )
    except (Exception, SystemExit) as error:  # any file may have been named
        if before is None:
            sys.modules.pop(MODULE_NAME)
        else:
            sys.modules[MODULE_NAME] = before
        if isinstance(error, LskdError):
            raise
        raise LskdError(
            f"{script} cannot be imported with timm {timm.__version__} ({one_line(error)}); "
            "use the train.py of the installed timm's version."
        ) from None
    return module


def keep_abbreviations(parser: ArgumentParser, upstreams: Collection[str]) -> None:
    """Let an abbreviated flag mean what it means without ours: `--smooth` and `--kd-temp` stay unambiguous.

    Args:
        upstreams: destinations of the arguments that are the script's own.
    """
    found = parser._get_option_tuples

    def look(option_string: str) -> list[Any]:
        options = found(option_string)
        return [each for each in options if each[0].dest in upstreams] or options

    parser._get_option_tuples = look  # type: ignore[method-assign]


def _check(args: Namespace, kd: KdConfig | None) -> None:
    """Check what would otherwise end in a traceback, or in nothing at all, inside the script."""
    check_names(args, kd)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise LskdError(f"--device {args.device}: there is no CUDA device here; pass --device cpu.")
    if getattr(args, "log_wandb", False):  # of which the script would only warn
        check_tracker("wandb")
    _check_checkpoints(args)
    output = Path(args.output or "output/train")
    if args.experiment:
        check_folder(output / args.experiment, args.resume)
    else:
        check_writable(output)
    if multi_label(args) and not args.dataset:
        raise LskdError(
            "--task multilabel needs a data set with lists of labels (--dataset hfds/..., wds/...); "
            "a folder has one label for each image."
        )
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


class _WatchedRun:
    """A run of the script: what stands in place of its own functions, and what is seen of it there.

    Args:
        module: the script; our arguments are added to its parser, our functions take its functions' names.
    """

    def __init__(self, module: Any) -> None:
        self.script = SimpleNamespace(**vars(module))  # as it was
        self.args = Namespace()
        self.kd: KdConfig | None = None
        self.student: Any = None
        self.datasets: dict[bool, Any] = {}  # by whether it is trained on
        self.eval_loader: dict[str, Any] = {}
        self.task: LsKdTask | None = None
        self.images: tuple[Any, Any] | None = None  # of stored soft labels: by key, and what makes batches
        self.sampler: KeySampler | None = None
        self.epoch: int | None = None
        self.distilled = False  # whether our task took a step
        self.was_done = False  # a run that was killed after its last epoch has none left
        parser = module.parser
        upstreams = {action.dest for action in parser._actions}
        add_kd_arguments(parser)
        own = [each for each in parser._actions if each.dest not in upstreams or each.dest in _SHARED]
        self.defaults = {action.dest: action.default for action in own}
        keep_abbreviations(parser, upstreams)

        def error(message: str) -> NoReturn:
            raise parser_error(message, f"timm {sys.argv[0]}")

        parser.error = error
        for name in _REPLACED:
            setattr(module, name, getattr(self, name))
        for name in _TASKS:
            if hasattr(module, name):
                setattr(module, name, partial(self.create_task, name))
        # With stored soft labels the images come mixed.
        module.Mixup = self._unless_stored(module.Mixup, NoMixing())
        module.FastCollateMixup = self._unless_stored(module.FastCollateMixup, None)
        if hasattr(module, "utils"):
            module.utils = SimpleNamespace(**{**vars(module.utils), "CheckpointSaver": AtomicCheckpointSaver})

    def _unless_stored(self, original: Any, instead: Any) -> Any:
        def create(*args: Any, **kwargs: Any) -> Any:
            return instead if self.kd is not None and self.kd.soft_labels else original(*args, **kwargs)

        return create

    def require_distilled(self, distilled: bool) -> None:
        """Refuse to go on without the teacher that was asked for."""
        if self.kd is not None and not distilled:
            raise LskdError(
                f"--kd-teacher {self.kd.teacher} is asked for and nothing is distilled: the script trains "
                "another task than classification, or nothing at all; drop the flag that chooses it, or "
                "--kd-teacher."
            )

    def _parse_args(self) -> tuple[Namespace, str]:
        """Return the arguments, with ours checked, and what is written into args.yaml."""
        parser, defaults = self.script.parser, self.defaults
        path = self.script.config_parser.parse_known_args()[0].config
        config = read_config(path) if path else {}
        typed = given_arguments(parser, sys.argv[1:], (*defaults, *ABOUT_TIMMS_TEACHER))
        named = {name: config[name] for name in defaults if name in config and name not in typed}
        values = values_of(parser, named, path)
        args, _ = self.script._parse_args()
        # A script may make a number of what is None by default, as of --smoothing.
        unset = {name: defaults[name] for name in named if defaults[name] is not None}
        vars(args).update(unset | values)
        require_teacher(args, typed)
        apply_kd_defaults(args, typed.keys() | values.keys())
        self.args, self.kd = args, kd_config(args)
        # Written anew: the defaults above depend on whether there is a teacher.
        text = yaml.safe_dump(vars(args), default_flow_style=False)
        args.resume = automatic_resume(args)
        _check(args, self.kd)
        return args, text

    def create_model(self, *args: Any, **kwargs: Any) -> Any:
        self.student = self.script.create_model(*args, **kwargs)
        if self.args.smoothing_convention == "paper":
            # From here on the script hands its smoothing to timm's losses and to mixup.
            classes = 2 if multi_label(self.args) else int(self.student.num_classes)
            self.args.smoothing = uniform_smoothing(self.args, classes)
        return self.student

    def create_dataset(self, *args: Any, **kwargs: Any) -> Any:
        dataset = self.script.create_dataset(*args, **kwargs)
        guard(dataset, self.args.class_map)
        self.datasets[bool(kwargs.get("is_training"))] = dataset
        return dataset

    def create_loader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self.eval_loader = kwargs  # the last one that is made
        stored = self.kd.soft_labels if self.kd is not None and kwargs.get("is_training") else None
        if stored is None:
            return self.script.create_loader(dataset, *args, **kwargs)
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise LskdError(
                "--kd-soft-labels needs images that can be asked for one by one, this data set can only "
                "be streamed; use a folder of images or a tar file."
            )
        if stored.together > 1:
            raise LskdError(
                "--kd-soft-labels-together orders the images itself, which the bundled trainer alone can do; "
                "drop it, or train by `timm train.py`."
            )
        self.images = images, collate = replayed_images(dataset, stored, kwargs["use_prefetcher"])
        loader = self.script.create_loader(images, *args, **(kwargs | {"collate_fn": collate}))
        batches = getattr(loader, "loader", loader).batch_sampler
        self.sampler = batches.sampler = KeySampler(batches.sampler, len(images))
        return loader

    def create_optimizer_v2(self, *args: Any, **kwargs: Any) -> Any:
        # What the script calls next after making its task, and before its output folder: with another task
        # than the one replaced here it would train on without the teacher.
        self.require_distilled(self.task is not None)
        return self.script.create_optimizer_v2(*args, **kwargs)

    def resume_task_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        epoch = self.script.resume_task_checkpoint(*args, **kwargs)
        self.was_done = epoch is not None and epoch >= self.args.epochs
        return epoch

    def create_task(self, name: str, *args: Any, **kwargs: Any) -> TrainingTask:
        quiet = kwargs if self.kd is None else {**kwargs, "verbose": False}
        task: TrainingTask = getattr(self.script, name)(*args, **quiet)
        if self.kd is None:
            return task
        _check_criterion(task)
        self.task = self._create_kd_task(self.kd, args[0] if args else kwargs["model"], kwargs)
        return self.task

    def _create_kd_task(self, kd: KdConfig, model: Any, kwargs: dict[str, Any]) -> LsKdTask:
        """Build our task where the script builds timm's, its loaders being made already."""
        args, loader = self.args, self.eval_loader
        device = kwargs.get("device") or torch.device(args.device)
        channels = first_channels(self.student)
        training, validation = self.datasets.get(True), self.datasets.get(False)
        if args.aug_splits:  # AugMix takes the training images' transform apart
            training = validation
        elif training is not None:
            training = SeededDataset(training, args.seed, once=False)
        amp = getattr(torch, args.amp_dtype)
        student = StudentRun(
            args,
            kd,
            (channels, *loader["input_size"][-2:]),
            # What the loader normalises with, which is what the teacher's input has to be made from.
            Normalisation.of(loader["mean"], loader["std"], channels),
            device,
            partial(torch.autocast, device.type, dtype=amp, enabled=bool(args.amp)),
            prefetch=loader["use_prefetcher"],
            validation=validation,
            training=training,
            images=self.images,
        )
        return create_kd_task(model, student, kwargs.get("dtype"), kwargs.get("threshold", 0.5))

    def train_one_epoch(self, epoch: int, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.task, SoftLabelsTask) and self.sampler is not None:
            self.sampler.epoch = epoch
            self.task.run.begin_epoch(epoch)
        metrics = self.script.train_one_epoch(epoch, *args, **kwargs)
        if isinstance(self.task, SoftLabelsTask):
            self.task.run.end_epoch(self.task.teacher)
        self.epoch = epoch
        require_finite("the training loss", metrics["loss"], epoch)
        require_finite_weights(self.student.state_dict().items(), epoch)
        if self.task is not None:
            self.distilled = self.task.stepped
            metrics.update(self.task.epoch_metrics())
        self.require_distilled(self.distilled)
        return metrics

    def validate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        def look(_: Any, __: Any, output: Any) -> None:
            require_finite("the validation logits", logits_of(output), self.epoch)

        hook = model.register_forward_hook(look)
        try:
            metrics = self.script.validate(model, *args, **kwargs)
        finally:
            hook.remove()
        require_finite("the validation loss", metrics["loss"], self.epoch)
        return metrics


def _check_criterion(task: Any) -> None:
    """Refuse a loss whose place the distillation loss would take in silence."""
    criterion = task.criterion
    known: tuple[type, ...] = (nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy)
    if getattr(task, "multi_label", False):
        known = (BinaryCrossEntropy,)
    changed = [getattr(criterion, name, None) for name in ("weight", "pos_weight", "target_threshold")]
    if type(criterion) not in known or changed != [None] * 3 or getattr(criterion, "sum_classes", False):
        raise LskdError(
            f"the script is told to train on {type(criterion).__name__} in another form than the (smoothed) "
            "cross-entropy of --kd-teacher's hard labels; drop the flags that choose it (--loss, --bce-...)."
        )
