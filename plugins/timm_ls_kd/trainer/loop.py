"""One epoch of training, and validation."""

import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.utils import accuracy, dispatch_clip_grad
from torch import nn

from lskd.base.tensors import accumulator_dtype, require_finite, summed_over_processes
from lskd.teachers.outputs import logits_of
from lskd.teachers.preflight import at_chance
from timm_ls_kd.loader import Loader


def train_one_epoch(
    epoch: int,
    task: Any,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    args: Namespace,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    scaler: Any = None,
    scheduler: Any = None,
) -> dict[str, float]:
    """Train for one epoch and return the mean loss over all samples and processes, as {'loss': ...}.

    Raises:
        DivergedError: the loss is no longer a finite number.
    """
    task.get_trainable_module().train()
    batches, accumulate = len(loader), args.grad_accum_steps
    updates = -(-batches // accumulate)
    full = batches - batches % accumulate  # batches from here on are the last, smaller step
    optimizer.zero_grad()
    total = torch.zeros(2, dtype=accumulator_dtype(loader.device), device=loader.device)
    started, seen = time.perf_counter(), 0
    for index, (images, targets) in enumerate(loader):
        steps = accumulate if index < full else batches - full
        update = index + 1 == batches or (index + 1) % accumulate == 0
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if update else task.no_sync():
            with autocast():
                loss = task(images, targets)["loss"]
            _backward(loss / steps, task, optimizer, args, scaler, update)
        # Summed on the device: a number read here would wait for the device at every step.
        total[0] += loss.detach() * len(images)
        total[1] += len(images)
        seen += len(images) * args.world_size
        if update:
            number = epoch * updates + index // accumulate + 1
            optimizer.zero_grad()
            task.update_ema(step=number)
            if scheduler is not None:
                scheduler.step_update(num_updates=number)
        if args.rank == 0 and (index % args.log_interval == 0 or index + 1 == batches):
            mean = float(total[0] / total[1])
            rate = seen / (time.perf_counter() - started)
            print(
                f"epoch {epoch} [{index + 1:>{len(str(batches))}}/{batches}]  loss {mean:.4f}  "
                f"lr {optimizer.param_groups[0]['lr']:.3e}  {rate:.0f} images/s",
                flush=True,
            )
    mean_loss = summed_over_processes(total)
    value = float(mean_loss[0] / mean_loss[1])
    require_finite("the training loss", value, epoch)
    return {"loss": value}


def _backward(
    loss: torch.Tensor,
    task: Any,
    optimizer: torch.optim.Optimizer,
    args: Namespace,
    scaler: Any,
    update: bool,
) -> None:
    parameters = None
    if args.clip_grad is not None:
        parameters = list(task.get_clip_parameters(exclude_head="agc" in args.clip_mode))
    if scaler is not None:
        scaler(
            loss,
            optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=parameters,
            need_update=update,
        )
        return
    loss.backward()
    if update:
        if parameters is not None:
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()


def validate(
    model: nn.Module,
    loader: Loader,
    args: Namespace,
    autocast: Callable[[], AbstractContextManager[Any]],
    epoch: int | None = None,
) -> tuple[dict[str, float], str]:
    """Return loss, top1 and top5 (in percent) on validation images, and '' or a text that it is at chance.

    Each image counts once whatever the process count.

    Raises:
        DivergedError: a logit, or the loss, is not a finite number; names the epoch.
    """
    model.eval()
    criterion = nn.CrossEntropyLoss(reduction="sum")
    totals = torch.zeros(5, dtype=accumulator_dtype(loader.device), device=loader.device)
    labels = torch.zeros((), device=loader.device)
    with torch.inference_mode():
        for images, targets in loader:
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast():
                output = model(images)
            logits = logits_of(output).float()
            top1, top5 = accuracy(logits, targets, topk=(1, 5))
            row = torch.stack(
                [criterion(logits, targets), top1 * len(images) / 100, top5 * len(images) / 100]
            )
            totals[:3] += row
            totals[3] += len(images)
            totals[4] += logits.to(totals.dtype).sum()
            labels = labels + torch.bincount(targets, minlength=logits.shape[1])
    loss, right1, right5, count, every_logit = summed_over_processes(totals).tolist()
    # After the sum over processes, which then all come to the same end.
    require_finite("the sum of the validation logits", every_logit, epoch)
    require_finite("the validation loss", loss, epoch)
    metrics = {"loss": loss / count, "top1": 100 * right1 / count, "top5": 100 * right5 / count}
    return metrics, at_chance(round(right1), summed_over_processes(labels).int().tolist())


class Interrupted(BaseException):
    """The run was asked to stop by the signal in `args[0]`; no `except Exception` is to catch it."""


# SIGHUP of a terminal that is closed, SIGQUIT of its Ctrl-\; not on Windows.
_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL} | {
    getattr(signal, name): signal.SIG_DFL for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name)
}


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM, SIGQUIT and SIGHUP into `Interrupted`; a second one ends the process as usual.

    A signal that the process was started to ignore stays ignored: Ctrl-C in a shell's background job, SIGHUP
    under `nohup`.
    """

    def stop(number: int, frame: Any) -> None:
        _next_one_as_usual(before)
        raise Interrupted(number)

    with _handled_by(stop) as before:
        yield


@contextmanager
def stop_signals_wait() -> Iterator[None]:
    """Let a first request to end wait for the end of the block; a second one ends the process as usual.

    An exception in the middle of `torch.save` would be lost behind one of its own, about a file that is
    too short; and what an epoch has brought is worth the moment that writing it takes.
    """
    asked: list[int] = []

    def wait(number: int, frame: Any) -> None:
        asked.append(number)
        _next_one_as_usual(before)

    with _handled_by(wait) as before:
        yield
    for number in asked:
        signal.raise_signal(number)


def _next_one_as_usual(requests: Iterable[int]) -> None:
    for number in requests:
        signal.signal(number, _USUAL[number])
    # Loading processes may have got the signal too; torch would raise an error about their end. Not SIG_DFL:
    # of a SIGCHLD that waits already Python would print that it was "ignored due to race condition".
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, lambda number, frame: None)


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """Handle the requests to end that are not ignored; gives how each was handled before, and will be."""
    before = {number: signal.getsignal(number) for number in _USUAL}
    before = {number: handled for number, handled in before.items() if handled is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)
