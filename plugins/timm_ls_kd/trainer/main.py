"""The bundled trainer's commands: `timm train.py`, for machines without a clone of timm, and soft-labels."""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import yaml
from timm import utils
from timm.models import safe_model_name
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import get_state_dict
from tqdm import tqdm

from lskd import LskdError
from lskd.base.tensors import require_finite_weights
from lskd.base.trackers import Tracker, TrackerName, check_tracker
from lskd.errors import from_outside, one_line
from lskd.soft_labels.remote import written_folder
from timm_ls_kd.arguments import kd_config
from timm_ls_kd.loader import seed_all
from timm_ls_kd.models import load_weights
from timm_ls_kd.store import OnDemandTeacher, SoftLabelsRun
from timm_ls_kd.trainer.arguments import parse_arguments
from timm_ls_kd.trainer.loop import Interrupted, stop_signals, stop_signals_wait, train_one_epoch, validate
from timm_ls_kd.trainer.run_folder import LAST, RunFolder, automatic_resume, check_folder, resumed_checkpoint
from timm_ls_kd.trainer.session import Session, check_names, create_scheduler

_BATCHES = 128  # of each process, stored from one commit to the next


def train(argv: Sequence[str]) -> int:
    """Train as `argv` says; return the exit status.

    Raises:
        LskdError: whatever the user can fix, before the first training step where that is possible.
        DivergedError: a loss, a weight or a validation logit is no longer finite; the epoch is not saved.
    """
    args = parse_arguments(argv)
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    args.resume = automatic_resume(args)
    check_names(args, kd_config(args))
    for tracker in _trackers(args):
        check_tracker(tracker)
    name = args.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}"
    folder = Path(args.output or "output/train") / name
    check_folder(folder, args.resume)
    args.resume, note = resumed_checkpoint(args.resume) if args.resume else ("", "")
    return _until_stopped(args, "", lambda: _train(args, args_text, folder, note))


def store(argv: Sequence[str]) -> int:
    """Store what is missing for the training that `argv` describes; return the exit status."""
    args = parse_arguments(argv)
    # The student's weights do not matter, the size and normalisation of its input do.
    args.pretrained, args.initial_checkpoint, args.resume = False, "", ""
    args.kd_soft_labels_together = 1  # the order of training, which reads what is stored here
    kd = kd_config(args)
    if kd is None or kd.soft_labels is None:
        raise LskdError("timm soft-labels needs --kd-teacher MODEL and --kd-soft-labels DIR; add them.")
    check_names(args, kd)
    written_folder(kd.soft_labels.path)
    return _until_stopped(args, "stopped; the same command goes on from what is stored", lambda: _store(args))


def _until_stopped(args: Namespace, note: str, work: Callable[[], int]) -> int:
    try:
        with stop_signals():
            return work()
    except Interrupted as stop:  # in training: before the first step, or a second signal
        if note and getattr(args, "rank", 0) == 0:
            print(note, flush=True)
        return 128 + int(stop.args[0])
    except RuntimeError as error:
        # Here, and not in the command: a group that is left no longer tells which rank this is.
        if (outside := from_outside(error)) is not None:
            raise outside from error
        raise
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _store(args: Namespace) -> int:
    """Ask about all keys in order, a window at a time: what a window brought is committed."""
    session = Session.open(args)
    run = SoftLabelsRun(session.student_run)
    total, window = run.layout.stop, _BATCHES * args.batch_size * args.world_size
    try:
        teacher = OnDemandTeacher(run)
        run.prepare(teacher.to(session.device))
        quiet = args.rank != 0 or run.keys >= total or None
        ask = partial(run.answers, teacher)
        first = run.layout.first
        shown = partial(tqdm, unit=" images", mininterval=1, disable=quiet)
        with shown(total=total - first, initial=run.keys - first) as bar:
            while run.keys < total:
                stop = min(run.keys + window, total)
                run.complete(stop, ask, lambda count: bar.update(count * args.world_size))
                if run.failed:
                    raise LskdError(f"{run.path} cannot be written; what is stored there stays.")
        session.say(run.describe())
    finally:
        run.close()
    return 0


def _train(args: Namespace, args_text: str, folder: Path, note: str) -> int:
    session = Session.open(args)
    say, kd, loader, autocast = session.say, session.kd, session.loader, session.autocast
    if note:
        say(note)
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    size = session.data.input_size
    say(f"model {args.model}: {parameters:,} parameters, {args.num_classes} classes, input {size}")
    normalisation = session.data.normalisation
    say(f"device {session.device}, {args.world_size} process(es), normalisation {normalisation}")
    task, optimizer = session.task, session.optimizer
    stored = task.run if kd is not None and kd.soft_labels is not None else None
    start_epoch = _resume(args, task, optimizer, session.scaler)
    eval_models = _wrap(args, task, session.device)
    updates = session.updates
    # Tried on a stand-in: the run's folder may write the optimiser as resumed, before a schedule moves it.
    create_scheduler(args, torch.optim.SGD([torch.zeros(1)], lr=args.lr), updates)
    run, trackers = None, []
    if args.rank == 0:
        run = RunFolder(
            folder,
            args,
            args_text,
            start_epoch,
            kd is not None,
            model=task.get_trainable_module(),
            optimizer=optimizer,
            amp_scaler=session.scaler,
            task=task,
        )
        trackers = _open_trackers(args, yaml.safe_load(args_text), folder, start_epoch)
    scheduler, epochs = session.schedule
    if scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates)
        else:
            scheduler.step(start_epoch)
    say(f"epochs {start_epoch} to {epochs - 1}, {updates} steps each; results in {folder}")

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
                epoch,
                task,
                loader,
                optimizer,
                args,
                autocast=autocast,
                scaler=session.scaler,
                scheduler=scheduler,
            )
            if stored is not None:
                stored.end_epoch(task.teacher)
            if kd is not None:
                train |= task.epoch_metrics()
            _distribute_bn(args, task.get_trainable_module())
            require_finite_weights(get_state_dict(task.get_trainable_module()).items(), epoch)
            evaluated = None
            if (epoch + 1) % args.val_interval == 0 or epoch + 1 in (epochs, *(args.save_epochs or ())):
                if session.loader_eval is not None:
                    for model in eval_models:
                        if model is not eval_models[0]:  # an average: the model's own statistics are together
                            _distribute_bn(args, model)
                        evaluated, at_chance = validate(model, session.loader_eval, args, autocast, epoch)
                lr = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
                if run is not None:
                    with stop_signals_wait():
                        best = run.save(epoch, train, evaluated, lr)
                    for tracker in trackers:
                        tracker.log(run.row, epoch)
            parts = [f"train {name} {value:.4f}" for name, value in train.items()]
            parts += [f"val {name} {value:.4f}" for name, value in (evaluated or {}).items()]
            say(f"epoch {epoch} done in {time.perf_counter() - started:.1f} s: " + ", ".join(parts))
            if scheduler is not None:
                scheduler.step(epoch + 1)
    except Interrupted as stop:
        goes_on = run is not None and (folder / LAST).exists()
        say(f"stopped in epoch {epoch}; {f'go on by --resume {folder / LAST}' if goes_on else 'start again'}")
        return 128 + int(stop.args[0])
    finally:
        if stored is not None:
            stored.close()
        for tracker in trackers:
            tracker.close()
    if at_chance:
        say(f"the run ended at chance: right on {at_chance}; it has learned nothing that counts")
    if best[0] is not None:
        say(f"best {args.eval_metric} {best[0]:.4f} in epoch {best[1]}; {folder / 'model_best.pth.tar'}")
    return 0


def _trackers(args: Namespace) -> list[TrackerName]:
    names: tuple[TrackerName, ...] = get_args(TrackerName)
    return [name for name in names if getattr(args, f"log_{name}")]


def _open_trackers(args: Namespace, settings: dict[str, Any], folder: Path, start: int) -> list[Tracker]:
    projects = {"wandb": args.wandb_project, "trackio": args.trackio_project}
    goes_on = bool(args.resume) and Path(args.resume).resolve().parent == folder.resolve()
    return [
        Tracker(
            name,
            folder,
            project=projects.get(name),
            run=folder.name,
            config=settings,
            start=start if goes_on else None,
            tags=args.wandb_tags,
            resume_id=args.wandb_resume_id,
        )
        for name in _trackers(args)
    ]


def _distribute_bn(args: Namespace, model: Any) -> None:
    if args.distributed and args.dist_bn:
        utils.distribute_bn(model, args.world_size, args.dist_bn == "reduce")


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


def _wrap(args: Namespace, task: Any, device: torch.device) -> list[Any]:
    """Compile and distribute the task; return the models to validate, a moving average last.

    They are taken before distributed wrapping: validation shares are of unequal size, and a wrapped model
    would synchronise its buffers at every forward.
    """
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    models = [task.get_eval_model()]
    if not args.model_ema_force_cpu:
        models.append(task.get_eval_model(ema=True))
    if args.distributed:
        task.prepare_distributed(device_ids=[device], broadcast_buffers=not args.no_ddp_bb)
    return [model for model in models if model is not None]


def _seed_epoch(args: Namespace, epoch: int) -> None:
    """Seed dropout, drop path and erasing from (seed, epoch, rank), so that a resumed epoch repeats them."""
    key = (args.seed, epoch, args.rank)
    seed_all(*key)
    if args.device.startswith("cuda"):
        torch.cuda.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
