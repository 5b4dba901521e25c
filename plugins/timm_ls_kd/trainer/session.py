"""What a run trains with, built from its arguments: one set-up for training, storing soft labels and trials
without images or weights, and for whoever measures a run."""

import difflib
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import NativeScaler, init_distributed_device
from timm.utils.model import freeze
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lskd import LskdError, convert_alpha
from lskd.errors import one_line
from lskd.teachers.outputs import Autocast, logits_of
from timm_ls_kd.arguments import KdConfig, kd_config
from timm_ls_kd.data import DataConfig, check_data, open_dataset, resolve_data
from timm_ls_kd.loader import Loader, SeededDataset, eval_loader, seed_all, train_loader
from timm_ls_kd.models import (
    check_model_name,
    check_pretrained,
    create,
    input_arguments,
    input_channels,
    load_weights,
)
from timm_ls_kd.store import augmentation_of, planned_epochs, replayed_images
from timm_ls_kd.task import AnyDeviceTask, create_kd_task, describe_labels
from timm_ls_kd.teacher import StudentRun
from timm_ls_kd.trainer.arguments import SCHEDULES_OF_1_0_31

Datasets = Callable[[Namespace, int], tuple[Any, Any]]
"""Opens a run's training and validation images (None: it has none) of so many channels."""


class PlainTask(AnyDeviceTask, ClassificationTask):
    """timm's classification task, of the first output where there are several."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return 'loss' and 'output'."""
        output = logits_of(self.trainable_module(input))
        return {"loss": self.criterion(output, target), "output": output}


@dataclass
class Session:
    """What a run trains with; `task`, `optimizer` and `schedule` are built when they are first asked for.

        session = Session.open(parse_arguments(["DATA", "--model", "resnet18"]))
        train_one_epoch(0, session.task, session.loader, session.optimizer, session.args, ...)

    Attributes:
        args: the run's arguments; what they left open (device, classes, learning rate) is filled in.
        kd: what it distils; None: it trains on labels.
        device: where the model is.
        model: the model to train.
        data: how images become its input.
        smoothing: of the labels, in timm's convention.
        loader: training batches.
        loader_eval: validation batches, where there are any.
        autocast: makes the context of a forward pass in training.
        scaler: of float16 gradients, where they need one.
    """

    args: Namespace
    kd: KdConfig | None
    device: torch.device
    model: nn.Module
    data: DataConfig
    smoothing: float
    loader: Loader
    loader_eval: Loader | None
    autocast: Autocast
    scaler: Any

    @classmethod
    def open(
        cls, args: Namespace, device: torch.device | None = None, datasets: Datasets | None = None
    ) -> "Session":
        """Build the model and the loaders, and try the model on an empty image.

        Args:
            args: of the bundled trainer; they are filled in.
            device: None: as the arguments say, random generators seeded, together with the run's other
                processes; the meta device: without memory for weights.
            datasets: opens the images; None: those of the run, which are checked before.
        """
        kd = kd_config(args)
        if datasets is None:
            check_images(args)
        if device is None:
            device = start_device(args)
            seed_all(args.seed)
        meta = device.type == "meta"
        with device if meta else nullcontext():
            model = create_student(args)
        if args.num_classes is None:
            args.num_classes = int(cast(Any, model).num_classes)
            if datasets is None:
                check_images(args, open_images=False)
        data = resolve_data(vars(args), model)
        model.to(device=device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        _try_student(model, data, args, device)
        smoothing = uniform_smoothing(args, args.num_classes)
        training, validation = (datasets or open_datasets)(args, data.input_size[0])
        where = torch.device("cpu") if meta else device
        replayed, together = None, 1
        if kd is not None and kd.soft_labels is not None:
            replayed = replayed_images(training, kd.soft_labels, not args.no_prefetcher)
            together = kd.soft_labels.together
        loader = train_loader(training, data, args, where, smoothing, replayed, together)
        loader_eval = None
        if validation is not None:
            loader_eval = eval_loader(validation, data, args, where, args.rank, args.world_size)
        autocast: Autocast = nullcontext
        scaler = None
        if args.amp:
            autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
            if device.type == "cuda" and args.amp_dtype == "float16":
                scaler = NativeScaler(device=device.type)
        return cls(args, kd, device, model, data, smoothing, loader, loader_eval, autocast, scaler)

    def say(self, line: str) -> None:
        """Print a line of progress, on the primary process."""
        if self.args.rank == 0:
            print(line, flush=True)

    @cached_property
    def student_run(self) -> StudentRun:
        """The run as its teacher sees it."""
        assert self.kd is not None
        return StudentRun(
            self.args,
            self.kd,
            self.data.input_size,
            self.data.normalisation,
            self.device,
            self.autocast,
            prefetch=not self.args.no_prefetcher,
            validation=None if self.loader_eval is None else self.loader_eval.dataset,
            training=SeededDataset(self.loader.dataset.dataset, self.args.seed),
            images=(self.loader.dataset, self.loader.collate) if self.kd.soft_labels else None,
        )

    @cached_property
    def task(self) -> Any:
        """timm's task around the model; a teacher is made and tried, a store opened, as is said."""
        if self.kd is not None:
            return create_kd_task(self.model, self.student_run)
        mixing = self.args.mixup > 0 or self.args.cutmix > 0
        self.say(describe_labels(self.args.num_classes, self.smoothing, "uniform", mixing))
        criterion: nn.Module = nn.CrossEntropyLoss()
        if self.args.bce_loss or self.args.loss == "bce":
            criterion = BinaryCrossEntropy(smoothing=0.0 if mixing else self.smoothing)
        elif mixing:
            criterion = SoftTargetCrossEntropy()
        elif self.smoothing:
            criterion = LabelSmoothingCrossEntropy(smoothing=self.smoothing)
        return PlainTask(self.model, criterion=criterion, device=self.device, verbose=False)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the model's trained weights."""
        return create_optimizer(self.args, self.model)

    @property
    def updates(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.loader) // int(self.args.grad_accum_steps))

    @cached_property
    def schedule(self) -> tuple[Any, int]:
        """The schedule of the optimiser's learning rate, and the number of epochs to train by it."""
        return create_scheduler(self.args, self.optimizer, self.updates)


def check_names(args: Namespace, kd: KdConfig | None) -> None:
    """Refuse names of models that timm does not know, and files that are not there."""
    check_model_name(args.model, "model")
    if kd is not None:
        check_model_name(kd.teacher, "teacher")
    files = (
        ("--resume", args.resume),
        ("--initial-checkpoint", args.initial_checkpoint),
        ("--kd-teacher-checkpoint", args.kd_teacher_checkpoint),
    )
    for flag, name in files:
        if name and not Path(name).is_file():
            raise LskdError(f"{flag} {name}: there is no such file; check the path.")
    backend = getattr(args, "torchcompile", None)
    if backend and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise LskdError(f"--torchcompile {backend}: torch has no such backend; inductor is the usual one.")


def check_images(args: Namespace, open_images: bool = True) -> None:
    """Check the data folder of a run, before anything heavy; see `timm_ls_kd.data.check_data`."""
    check_data(
        args.dataset,
        args.data_dir or getattr(args, "data", None),  # a positional argument in timm's script
        [split for split in (args.train_split, args.val_split) if split],
        num_classes=args.num_classes,
        class_map=args.class_map,
        open_images=open_images,
    )


def open_datasets(args: Namespace, channels: int) -> tuple[Any, Any]:
    """Open a run's training images, and its validation images where it has some."""
    training, validation = (
        open_dataset(vars(args), split, channels, args.num_classes, training) if split else None
        for split, training in ((args.train_split, True), (args.val_split, False))
    )
    return training, validation


def start_device(args: Namespace) -> torch.device:
    """Choose the device, and join the other processes where there are any.

    Raises:
        LskdError: torch does not have it here.
    """
    name = args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(name).type == "cuda" and not torch.cuda.is_available():
            raise LskdError(f"--device {name}: there is no CUDA device here; pass --device cpu.")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LskdError(f"--device {name} cannot be used ({one_line(error)}); pass --device cpu.") from None
    if name.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
    device: torch.device = init_distributed_device(args)
    return device


def create_student(args: Namespace) -> nn.Module:
    """Create the model to train.

    Raises:
        LskdError: unknown model, arguments it does not take, weights that do not fit.
    """
    model = create(
        args.model,
        "model",
        pretrained=args.pretrained,
        num_classes=args.num_classes,
        in_chans=input_channels(vars(args)),
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        bn_momentum=args.bn_momentum,
        extra=input_arguments(args.model, vars(args)),
    )
    if args.initial_checkpoint:
        load_weights(model, f"model '{args.model}'", args.initial_checkpoint)
    if args.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise LskdError(f"model '{args.model}' has no gradient checkpointing; drop --grad-checkpointing.")
        cast(Any, model).set_grad_checkpointing(enable=True)
    if args.sync_bn and args.distributed:
        if args.device.startswith("cpu"):
            raise LskdError("--sync-bn needs GPUs; drop it, --dist-bn reduce does without.")
        model = convert_sync_batchnorm(model)
    _freeze_rest(model, args)
    return model


def _freeze_rest(model: nn.Module, args: Namespace) -> None:
    """Freeze all of a model but the modules that --train-only names (FixRes, Touvron et al., 2019).

    Frozen BatchNorm keeps its running statistics, except in the modules that --train-statistics names: there
    they go on moving, without gradients. Dropout, where a model has some, stays on.
    """
    trained, moving = args.train_only or [], args.train_statistics or []
    if not trained:
        if moving:
            raise LskdError("--train-statistics needs --train-only MODULE, what else is trained; add it.")
        return
    modules = dict(model.named_modules())
    for flag, names in (("--train-only", trained), ("--train-statistics", moving)):
        for name in names:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=1, cutoff=0.5)
                fix = f"did you mean {near[0]}?" if near else f"it has {', '.join(list(modules)[1:5])}, ..."
                raise LskdError(f"{flag} {name}: model '{args.model}' has no such module; {fix}")

    def within(name: str, parents: list[str]) -> bool:
        return any(name == parent or name.startswith(f"{parent}.") for parent in parents)

    for name, parameter in model.named_parameters():
        parameter.requires_grad = within(name, trained)
    leaves = [name for name, module in modules.items() if name and not any(module.children())]
    frozen = [name for name in leaves if not within(name, [*trained, *moving])]
    if frozen:  # an empty list would mean everything to timm
        freeze(model, frozen)


def _try_student(model: nn.Module, data: DataConfig, args: Namespace, device: torch.device) -> None:
    """Run the model once on an empty image, so that a size it cannot take is one clear line."""
    model.eval()
    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, *data.input_size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        shape = " x ".join(str(size) for size in data.input_size)
        raise LskdError(f"model '{args.model}' cannot process {shape} images: {one_line(error)}") from None
    if logits_of(output).shape[1] != args.num_classes:
        raise LskdError(
            f"model '{args.model}' gives no {args.num_classes} class scores per image; use a classifier."
        )


def uniform_smoothing(args: Namespace, num_classes: int) -> float:
    """Return --smoothing in timm's convention, for timm's losses and mixup."""
    try:
        return convert_alpha(args.smoothing, num_classes, args.smoothing_convention, "uniform")
    except ValueError as error:
        raise LskdError(
            f"--smoothing {args.smoothing} cannot be used in the {args.smoothing_convention} convention "
            f"with {num_classes} classes: {one_line(error)}"
        ) from None


def create_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimiser; without --lr its rate follows from --lr-base and the global batch size."""
    if args.lr is None:
        ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
        adaptive = any(part in args.opt.lower() for part in ("ada", "lamb"))
        if (args.lr_base_scale or ("sqrt" if adaptive else "linear")) == "sqrt":
            ratio **= 0.5
        args.lr = args.lr_base * ratio
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, **optimizer_kwargs(cfg=args), **args.opt_kwargs
        )
    except Exception as error:  # timm's registry and torch's optimisers raise whatever they like
        raise LskdError(
            f"optimiser '{args.opt}' cannot be created ({one_line(error)}); "
            "timm.optim.list_optimizers() gives the names."
        ) from None
    return optimizer


def create_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, updates: int) -> tuple[Any, int]:
    """Create the schedule of the learning rate; return it and the number of epochs to train by it.

    Raises:
        LskdError: timm cannot make it.
    """
    settings = scheduler_kwargs(args, decreasing_metric=args.eval_metric == "loss")
    if args.decay_epochs is None:
        settings["decay_epochs"] = 0.2 if args.sched in SCHEDULES_OF_1_0_31 else 90.0
    if args.sched in SCHEDULES_OF_1_0_31 and "decay_fn" not in settings:  # it would train at one rate
        raise LskdError(f"--sched {args.sched} needs timm 1.0.31, this is {timm.__version__}.")
    try:
        scheduler, epochs = create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates)
    except Exception as error:  # assertions of many kinds
        raise LskdError(
            f"--sched {args.sched} cannot be created ({one_line(error)}); check the epochs and rates given."
        ) from None
    return scheduler, min(epochs, args.stop_epoch or epochs)


def rates(args: Namespace) -> list[float]:
    """Return the learning rate of each epoch, in a unit of its own."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, epochs = create_scheduler(args, optimizer, 1)
    return [scheduler._get_lr(epoch)[0] if scheduler else 1.0 for epoch in range(epochs)]


class _NoImages:
    """Stands in for images that are not there yet."""

    transform: Any = None

    def __len__(self) -> int:
        return 1 << 40


def _no_images(args: Namespace, channels: int) -> tuple[Any, Any]:
    return _NoImages(), _NoImages() if args.val_split else None


def _without_weights(
    args: Namespace, datasets: Datasets, devices: tuple[str, ...] = ("meta", "cpu")
) -> Session:
    """Open a session in this process, on the CPU where the first device cannot do it; nothing is trained."""
    own = Namespace(**vars(args))
    own.rank, own.world_size, own.distributed, own.device, own.workers = 0, 1, False, "cpu", 0
    own.pretrained, own.initial_checkpoint, own.resume = False, "", ""
    for device in devices:
        try:
            session = Session.open(own, torch.device(device), datasets)
            _ = session.schedule
            break
        except LskdError:  # a mistake, or what cannot be done without memory
            if device == devices[-1]:
                raise
    return session


@dataclass
class Rehearsal:
    """Builds runs one after the other; data sets that several read are opened once.

    Attributes:
        data_there: whether the data are; if not, what does not need them is built.
    """

    data_there: bool = True
    _opened: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def try_out(self, args: Namespace) -> Session:
        """Build a run without memory for its weights, and load its first training image.

        Args:
            args: of the bundled trainer; the model is created without pretrained weights, which need only be
                within reach.
        """
        if args.pretrained:
            check_pretrained(args.model)
        session = _without_weights(args, self._datasets if self.data_there else _no_images)
        if self.data_there:
            session.loader.dataset[0]
        return session

    def _datasets(self, args: Namespace, channels: int) -> tuple[Any, Any]:
        read = (args.dataset, args.data_dir, args.train_split, args.val_split, args.class_map)
        key = (*read, args.num_classes, channels)
        if key not in self._opened:
            check_images(args, open_images=False)
            self._opened[key] = open_datasets(args, channels)
        opened: tuple[Any, Any] = self._opened[key]
        return opened


def views_of(args: Namespace) -> tuple[dict[str, Any], int, bool]:
    """Return what the training images of a run with stored soft labels follow from, before there are any.

    Args:
        args: the run's arguments; the model is built, without pretrained weights, and its teacher is not.

    Returns:
        What images and answers follow from beside teacher and data: equal settings mean one store; how many
        epochs the run trains; whether images are mixed, each one by itself where they are stored.

    Raises:
        LskdError: a model, transform or schedule that cannot be made, or a schedule beyond the run's epochs.
    """
    session = _without_weights(args, _no_images)
    run, epochs, (_, scheduled) = session.student_run, planned_epochs(args), session.schedule
    if scheduled != epochs:
        raise LskdError(f"the schedule of the learning rate lasts {scheduled} epochs, not {epochs}.")
    augmentation = augmentation_of(run)
    augmentation.pop("seed")
    asked = {name: str(value) for name, value in vars(run.kd).items() if name.startswith("teacher_")}
    precision = run.kd.teacher_dtype or (str(args.amp_dtype) if args.amp else "float32")
    return {"augmentation": augmentation, "teacher": asked, "precision": precision}, epochs, run.mixes


def network_size(args: Namespace) -> tuple[int, int]:
    """Return the parameters of a run's model, and its floating-point operations for one image forward.

    A multiply-add is two operations.

    Raises:
        LskdError: a model that cannot be made.
    """
    session = _without_weights(args, _no_images, devices=("cpu",))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        session.model.eval()(torch.zeros(1, *session.data.input_size))
    return sum(weights.numel() for weights in session.model.parameters()), int(counter.get_total_flops())
