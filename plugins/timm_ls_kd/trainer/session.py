"""Building the parts of a bundled run: model, criterion, task, the teacher's trial, optimiser."""

from argparse import Namespace
from typing import Any, cast

import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import ClassificationTask
from torch import Tensor, nn

from lskd import LskdError, convert_alpha, target_values
from lskd.errors import one_line
from lskd.teachers.outputs import logits_of
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.data import DataConfig, input_channels
from timm_ls_kd.loader import SeededDataset
from timm_ls_kd.models import create, input_arguments, load_weights
from timm_ls_kd.task import LsKdTask, describe_targets, prepare_distributed
from timm_ls_kd.teacher import (
    Teacher,
    announce_teacher,
    answer,
    check_teacher_accuracy,
    create_teacher,
    describe_teacher,
    speed_up,
    spread_batches,
    spread_indices,
)
from timm_ls_kd.trainer.loop import say
from timm_ls_kd.trainer.partial_training import freeze_rest


class PlainTask(ClassificationTask):
    """timm's classification task, distributed on the CPU too, of the first output where there are several."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return 'loss' and 'output'."""
        output = logits_of(self.trainable_module(input))
        return {"loss": self.criterion(output, target), "output": output}

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> "PlainTask":
        """Wrap the model in DistributedDataParallel."""
        prepare_distributed(self, device_ids, **ddp_kwargs)
        return self


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
    freeze_rest(model, args)
    return model


def uniform_smoothing(args: Namespace, num_classes: int) -> float:
    """Return --smoothing in timm's convention, for timm's losses and mixup."""
    try:
        return convert_alpha(args.smoothing, num_classes, args.smoothing_convention, "uniform")
    except ValueError as error:
        raise LskdError(
            f"--smoothing {args.smoothing} cannot be used in the {args.smoothing_convention} convention "
            f"with {num_classes} classes: {one_line(error)}"
        ) from None


def create_task(
    args: Namespace,
    kd: KdConfig | None,
    model: nn.Module,
    data: DataConfig,
    smoothing: float,
    device: torch.device,
) -> Any:
    """Create the task, and say what it trains on. The teacher is loaded but not yet tried on images."""
    mixing = args.mixup > 0 or args.cutmix > 0
    if kd is not None:
        say(args, announce_teacher(kd))
        teacher = create_teacher(
            kd, args.num_classes, data.input_size[0], data.normalisation, channels_last=args.channels_last
        )
        task = LsKdTask(
            model,
            teacher,
            **kd.loss_arguments(),
            device=device,
        )
        say(args, describe_targets(task.loss, args.num_classes, mixing))
        for line in describe_teacher(kd, teacher, data.normalisation, args.num_classes):
            say(args, line)
        return task
    on, off = target_values(args.num_classes, smoothing, "uniform")
    say(args, f"target {on:.4f} on the label and {off:.4f} on each other class" + " before mixing" * mixing)
    return PlainTask(model, criterion=_criterion(args, mixing, smoothing), device=device, verbose=False)


def _criterion(args: Namespace, mixing: bool, smoothing: float) -> nn.Module:
    loss: nn.Module
    if args.bce_loss:
        loss = BinaryCrossEntropy(smoothing=0.0 if mixing else smoothing)
    elif mixing:
        loss = SoftTargetCrossEntropy()
    elif smoothing:
        loss = LabelSmoothingCrossEntropy(smoothing=smoothing)
    else:
        loss = nn.CrossEntropyLoss()
    return loss


def run_preflight(
    kd: KdConfig,
    teacher: Teacher,
    dataset: Any,
    train: Any,
    data: DataConfig,
    args: Namespace,
    device: torch.device,
    autocast: Any,
) -> None:
    """Try the teacher on validation images, or an empty image without; make it fast on training images."""
    if dataset is None or kd.preflight_samples == 0:
        with autocast():
            answer(teacher, torch.zeros(2, *data.input_size, device=device), kd.teacher)
        say(args, f"teacher '{kd.teacher}': accuracy not checked")
        _speed_up(kd, teacher, train, data, args, device, autocast)
        return
    indices = spread_indices(len(dataset), kd.preflight_samples)[args.rank :: args.world_size]
    batches = spread_batches(
        SeededDataset(dataset, args.seed),
        indices,
        data.normalisation,
        device,
        prefetch=not args.no_prefetcher,
    )
    line = check_teacher_accuracy(
        teacher,
        batches,
        args.num_classes,
        name=kd.teacher,
        device=device,
        autocast=autocast,
        channels_last=args.channels_last,
    )
    say(args, line)
    _speed_up(kd, teacher, train, data, args, device, autocast)


def _speed_up(
    kd: KdConfig,
    teacher: Teacher,
    train: Any,
    data: DataConfig,
    args: Namespace,
    device: torch.device,
    autocast: Any,
) -> None:
    if kd.teacher_fast != "none":
        line = speed_up(
            kd,
            teacher,
            SeededDataset(train, args.seed),
            data.normalisation,
            device,
            prefetch=not args.no_prefetcher,
            batch_size=args.batch_size,
            autocast=autocast,
        )
        say(args, line)


def try_student(model: nn.Module, data: DataConfig, args: Namespace, device: torch.device) -> None:
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
