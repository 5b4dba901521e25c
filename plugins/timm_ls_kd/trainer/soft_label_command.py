"""`timm soft-labels ...`: store what a teacher says about every image of every epoch, ahead of training."""

from argparse import Namespace
from collections.abc import Sequence

import torch
from tqdm import tqdm

from lskd import LskdError
from timm_ls_kd.arguments import KdConfig, kd_config
from timm_ls_kd.data import check_data, open_dataset, resolve_data
from timm_ls_kd.loader import eval_loader, train_loader
from timm_ls_kd.store import SoftLabelsRun, replayed_parts
from timm_ls_kd.task import is_half, planned_epochs, prepare
from timm_ls_kd.teacher import Teacher
from timm_ls_kd.trainer import session as parts
from timm_ls_kd.trainer import soft_label_session as soft_label_parts
from timm_ls_kd.trainer.arguments import parse_arguments
from timm_ls_kd.trainer.loop import Interrupted, say, stop_signals
from timm_ls_kd.trainer.main import check_names, precision, start_device

_BATCHES = 128  # of each process, from one commit to the next


def main(argv: Sequence[str]) -> int:
    """Store what is missing for the training that `argv` describes; return the exit status.

    Raises:
        LskdError: whatever the user can mend.
    """
    args = parse_arguments(argv)
    # The student's weights do not matter, the size and normalisation of its input do.
    args.pretrained, args.initial_checkpoint, args.resume = False, "", ""
    kd = kd_config(args)
    if kd is None or kd.soft_labels is None:
        raise LskdError("timm soft-labels needs --kd-teacher MODEL and --kd-soft-labels DIR; add them.")
    check_names(args, kd)
    splits = [split for split in (args.train_split, args.val_split) if split]
    check_data(args.dataset, args.data_dir, splits, num_classes=args.num_classes, class_map=args.class_map)
    device = start_device(args)
    try:
        with stop_signals():
            return _store(args, kd, device)
    except Interrupted as stop:
        say(args, "stopped; the same command goes on from what is stored")
        return 128 + int(stop.args[0])
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


def _store(args: Namespace, kd: KdConfig, device: torch.device) -> int:
    model = parts.create_student(args)
    if args.num_classes is None:
        args.num_classes = int(model.num_classes)  # type: ignore[arg-type]
    data = resolve_data(vars(args), model)
    channels = data.input_size[0]
    dataset = open_dataset(vars(args), args.train_split, channels, args.num_classes, training=True)
    loader = train_loader(
        dataset, data, args, device, 0.0, replayed_parts(dataset, kd.soft_labels, not args.no_prefetcher)
    )
    dataset_eval = None
    if args.val_split:
        dataset_eval = open_dataset(vars(args), args.val_split, channels, args.num_classes)
        eval_loader(dataset_eval, data, args, device)  # which gives it its transform
    autocast, _ = precision(args, device)
    run, teacher = soft_label_parts.open_store(args, kd, data, loader, dataset_eval, device, autocast)
    try:
        epochs = planned_epochs(args)
        teacher.to(device)
        for line in prepare(run, teacher, epochs, is_half(kd, args)):
            say(args, line)
        if run.epochs < epochs:
            _ask(run, teacher, epochs, args)
        say(args, run.describe())
    finally:
        run.close()
    return 0


def _ask(run: SoftLabelsRun, teacher: Teacher, epochs: int, args: Namespace) -> None:
    """Ask about all keys in order, a window at a time: what a window brought is committed."""
    total = epochs * run.layout.samples
    window = _BATCHES * args.batch_size * args.world_size
    with tqdm(
        total=total, initial=run.keys, unit=" images", mininterval=1, disable=args.rank != 0 or None
    ) as bar:
        while run.keys < total:
            run.complete_by(
                teacher, min(run.keys + window, total), lambda count: bar.update(count * args.world_size)
            )
            if run.failed:
                raise LskdError(f"{run.config.path} cannot be written; what is stored there stays.")
