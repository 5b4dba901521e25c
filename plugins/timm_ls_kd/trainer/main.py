"""The bundled trainer: `timm train.py` on a machine without a clone of timm."""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from timm import utils
from timm.models import safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import get_state_dict

from lskd import LskdError
from lskd.base.tensors import require_finite_weights
from lskd.errors import one_line
from timm_ls_kd import inputs
from timm_ls_kd.arguments import KdConfig, kd_config
from timm_ls_kd.data import seed_all
from timm_ls_kd.datacheck import check_data
from timm_ls_kd.models import check_model_name, load_weights
from timm_ls_kd.trainer import session as parts
from timm_ls_kd.trainer import soft_label_session as soft_label_parts
from timm_ls_kd.trainer.arguments import parse_arguments
from timm_ls_kd.trainer.loop import say, train_one_epoch, validate
from timm_ls_kd.trainer.run_folder import LAST, RunFolder, check_folder, resumed_checkpoint
from timm_ls_kd.trainer.signals import Interrupted, stop_signals

Autocast = Callable[[], AbstractContextManager[Any]]


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says; return the exit status.

    Raises:
        LskdError: whatever the user can mend, before the first training step where that is possible.
        DivergedError: a loss, a weight or a validation logit is no longer finite; the epoch is not saved.
    """
    args = parse_arguments(argv)
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    kd = kd_config(args)
    check_names(args, kd)
    folder = _run_folder(args)
    check_folder(folder, args.resume)
    args.resume, note = resumed_checkpoint(args.resume) if args.resume else ("", "")
    splits = [split for split in (args.train_split, args.val_split) if split]
    check_data(args.dataset, args.data_dir, splits, num_classes=args.num_classes, class_map=args.class_map)
    device = start_device(args)
    if note:
        say(args, note)
    try:
        with stop_signals():
            return _train(args, args_text, kd, folder, device)
    except Interrupted as stop:  # before the first step, or a second signal
        return 128 + int(stop.args[0])
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


def _train(args: Namespace, args_text: str, kd: KdConfig | None, folder: Path, device: torch.device) -> int:
    seed_all(args.seed)
    model = parts.create_student(args)
    if args.num_classes is None:
        args.num_classes = int(model.num_classes)  # type: ignore[arg-type]
        check_data(
            args.dataset,
            args.data_dir,
            [args.train_split],
            num_classes=args.num_classes,
            class_map=args.class_map,
        )
    data = inputs.resolve_data(vars(args), model)
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    parts.try_student(model, data, args, device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        args,
        f"model {args.model}: {parameters:,} parameters, {args.num_classes} classes, input {data.input_size}",
    )
    say(args, f"device {device}, {args.world_size} process(es), normalisation {data.normalisation}")

    smoothing = parts.uniform_smoothing(args, args.num_classes)
    dataset = inputs.open_dataset(
        vars(args), args.train_split, data.input_size[0], args.num_classes, training=True
    )
    soft_labels = None if kd is None else kd.soft_labels
    loader = inputs.train_loader(dataset, data, args, device, smoothing, replay=soft_labels)
    dataset_eval = None
    if args.val_split:
        dataset_eval = inputs.open_dataset(vars(args), args.val_split, data.input_size[0], args.num_classes)
    loader_eval = None
    if dataset_eval is not None:
        loader_eval = inputs.eval_loader(dataset_eval, data, args, device, args.rank, args.world_size)

    autocast, scaler = precision(args, device)
    stored = None
    if kd is not None and kd.soft_labels is not None:
        task = stored = soft_label_parts.create_task(
            args, kd, model, data, loader, dataset_eval, device, autocast
        )
    else:
        task = parts.create_task(args, kd, model, data, smoothing, device)
        if kd is not None:
            parts.run_preflight(kd, task.teacher, dataset_eval, dataset, data, args, device, autocast)
    optimizer = parts.create_optimizer(args, model)
    start_epoch = _resume(args, task, optimizer, scaler)
    eval_model, eval_model_ema = _wrap(args, task, device)
    updates = -(-len(loader) // args.grad_accum_steps)
    # Tried on a stand-in: the run's folder may write the optimiser as resumed, before a schedule moves it.
    create_scheduler(args, torch.optim.SGD([torch.zeros(1)], lr=args.lr), updates)
    run = None
    if args.rank == 0:
        run = RunFolder(
            folder,
            args,
            args_text,
            start_epoch,
            kd is not None,
            args.eval_metric,
            model=task.get_trainable_module(),
            optimizer=optimizer,
            amp_scaler=scaler,
            task=task,
        )
    scheduler, epochs = create_scheduler(args, optimizer, updates)
    if scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates)
        else:
            scheduler.step(start_epoch)
    say(args, f"epochs {start_epoch} to {epochs - 1}, {updates} steps each; results in {folder}")

    best: tuple[float | None, int | None] = (None, None)
    at_chance = ""
    epoch = start_epoch
    try:
        for epoch in range(start_epoch, epochs):
            started = time.perf_counter()
            _seed_epoch(args, epoch)
            loader.sampler.set_epoch(epoch)
            if stored is not None:
                stored.begin_epoch(epoch)
            train = train_one_epoch(
                epoch, task, loader, optimizer, args, autocast=autocast, scaler=scaler, scheduler=scheduler
            )
            if stored is not None:
                stored.end_epoch()
            if kd is not None:
                train |= task.epoch_metrics()
            if args.distributed and args.dist_bn:
                utils.distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == "reduce")
            require_finite_weights(get_state_dict(task.get_trainable_module()).items(), epoch)
            evaluated = None
            if (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs:
                if loader_eval is not None:
                    evaluated, at_chance = validate(eval_model, loader_eval, args, autocast, epoch)
                    if eval_model_ema is not None:
                        if args.distributed and args.dist_bn:
                            utils.distribute_bn(eval_model_ema, args.world_size, args.dist_bn == "reduce")
                        evaluated, at_chance = validate(eval_model_ema, loader_eval, args, autocast, epoch)
                lr = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
                if run is not None:
                    best = run.save(epoch, train, evaluated, lr)
            say(args, _epoch_line(epoch, train, evaluated, time.perf_counter() - started))
            if scheduler is not None:
                scheduler.step(epoch + 1)
    except Interrupted as stop:
        mend = (
            f"go on by --resume {folder / LAST}"
            if run is not None and run.has_checkpoint()
            else "start again"
        )
        say(args, f"stopped in epoch {epoch}; {mend}")
        return 128 + int(stop.args[0])
    finally:
        if stored is not None:
            stored.run.close()
    if at_chance:
        say(args, f"the run ended at chance: right on {at_chance}; it has learned nothing that counts")
    if best[0] is not None:
        say(
            args, f"best {args.eval_metric} {best[0]:.4f} in epoch {best[1]}; {folder / 'model_best.pth.tar'}"
        )
    return 0


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
    if args.torchcompile and args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        raise LskdError(
            f"--torchcompile {args.torchcompile}: torch has no such backend; inductor is the usual one."
        )


def _run_folder(args: Namespace) -> Path:
    name = args.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}"
    return Path(args.output or "output/train") / name


def start_device(args: Namespace) -> torch.device:
    """Choose the device, and join the other processes where there are any."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(args.device)
    if args.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
    device: torch.device = utils.init_distributed_device(args)
    return device


def check_device(name: str) -> None:
    """Refuse a device that torch does not have here."""
    try:
        kind = torch.device(name).type
        if kind == "cuda" and not torch.cuda.is_available():
            raise LskdError(f"--device {name}: there is no CUDA device here; pass --device cpu.")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LskdError(f"--device {name} cannot be used ({one_line(error)}); pass --device cpu.") from None


def precision(args: Namespace, device: torch.device) -> tuple[Autocast, Any]:
    """Return the context of forward passes, and the scaler of float16 gradients."""
    if not args.amp:
        return nullcontext, None
    autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    needs_scaler = device.type == "cuda" and args.amp_dtype == "float16"
    return autocast, utils.NativeScaler(device=device.type) if needs_scaler else None


def create_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, updates: int) -> tuple[Any, int]:
    """Create the schedule of the learning rate; return it and the number of epochs it lasts.

    Raises:
        LskdError: timm cannot make it.
    """
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=args.eval_metric == "loss"),
            updates_per_epoch=updates,
        )
    except Exception as error:  # assertions of many kinds
        raise LskdError(
            f"--sched {args.sched} cannot be created ({one_line(error)}); check the epochs and rates given."
        ) from None
    return scheduler, epochs


def _resume(args: Namespace, task: Any, optimizer: torch.optim.Optimizer, scaler: Any) -> int:
    """Load --resume and set up the moving average; return the first epoch to train."""
    epoch = None
    if args.resume:
        load_weights(task.get_trainable_module(), f"model '{args.model}'", args.resume, use_ema=False)
        try:
            epoch = resume_task_checkpoint(
                task,
                args.resume,
                optimizer=None if args.no_resume_opt else optimizer,
                loss_scaler=None if args.no_resume_opt else scaler,
                log_info=False,
            )
        except Exception as error:  # of torch's loader, or of an optimiser with other state
            raise LskdError(f"--resume {args.resume} cannot be used: {one_line(error)}") from None
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device="cpu" if args.model_ema_force_cpu else None,
        )
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.start_epoch is not None:
        return int(args.start_epoch)
    return epoch or 0


def _wrap(args: Namespace, task: Any, device: torch.device) -> tuple[Any, Any]:
    """Compile and distribute the task; return the models to validate (plain, moving average or None).

    They are taken before distributed wrapping: validation shares are of unequal size, and a wrapped model
    would synchronise its buffers at every forward.
    """
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    eval_model = task.get_eval_model()
    eval_model_ema = None if args.model_ema_force_cpu else task.get_eval_model(ema=True)
    if args.distributed:
        task.prepare_distributed(device_ids=[device], broadcast_buffers=not args.no_ddp_bb)
    return eval_model, eval_model_ema


def _seed_epoch(args: Namespace, epoch: int) -> None:
    """Seed dropout, drop path and erasing from (seed, epoch, rank), so that a resumed epoch repeats them."""
    key = (args.seed, epoch, args.rank)
    seed_all(*key)
    if args.device.startswith("cuda"):
        torch.cuda.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _epoch_line(
    epoch: int, train: dict[str, float], evaluated: dict[str, float] | None, seconds: float
) -> str:
    parts = [f"train {name} {value:.4f}" for name, value in train.items()]
    parts += [f"val {name} {value:.4f}" for name, value in (evaluated or {}).items()]
    return f"epoch {epoch} done in {seconds:.1f} s: " + ", ".join(parts)
