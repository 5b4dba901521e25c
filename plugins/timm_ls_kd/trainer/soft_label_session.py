"""Stored soft labels in the bundled trainer: the task of a run, with its store and its teacher."""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.data import DataConfig
from timm_ls_kd.loader import Loader
from timm_ls_kd.store import ImageSource, SoftLabelsRun
from timm_ls_kd.task import (
    OnDemandTeacher,
    SoftLabelsTask,
    describe_targets,
    is_half,
    open_run,
    planned_epochs,
    prepare,
)
from timm_ls_kd.teacher import Teacher, announce_teacher, create_teacher, describe_teacher
from timm_ls_kd.trainer.loop import say
from timm_ls_kd.trainer.session import run_preflight


def create_task(
    args: Namespace,
    kd: KdConfig,
    model: nn.Module,
    data: DataConfig,
    loader: Loader,
    dataset_eval: Any,
    device: torch.device,
    autocast: Any,
) -> SoftLabelsTask:
    """Create the task, its store opened, and its teacher tried where it will be asked.

    Raises:
        LskdError: whatever is wrong with the store or the teacher.
    """
    run, teacher = open_store(args, kd, data, loader, dataset_eval, device, autocast)
    try:
        task = SoftLabelsTask(model, teacher, run, **kd.loss_arguments(), device=device)
        say(args, describe_targets(task.loss, args.num_classes, args.mixup > 0 or args.cutmix > 0))
        for line in prepare(run, teacher, planned_epochs(args), is_half(kd, args)):
            say(args, line)
    except BaseException:
        run.close()
        raise
    return task


def open_store(
    args: Namespace,
    kd: KdConfig,
    data: DataConfig,
    loader: Loader,
    dataset_eval: Any,
    device: torch.device,
    autocast: Any,
) -> tuple[SoftLabelsRun, OnDemandTeacher]:
    """Open the store; the teacher is not built yet.

    Raises:
        LskdError: a store of something else, and whatever is wrong with it.
    """
    source = ImageSource(
        dataset=loader.dataset,
        collate=loader.collate,
        normalisation=data.normalisation,
        device=device,
        autocast=autocast,
        batch_size=args.batch_size,
        channels_last=args.channels_last,
        workers=args.workers,
    )
    run = open_run(args, kd, args.num_classes, planned_epochs(args), source, partial(say, args))

    def build() -> Teacher:
        say(args, announce_teacher(kd))
        teacher = create_teacher(
            kd, args.num_classes, data.input_size[0], data.normalisation, channels_last=args.channels_last
        ).to(device)
        for line in describe_teacher(kd, teacher, data.normalisation, args.num_classes):
            say(args, line)
        made = replace(kd, teacher_fast=run.teacher_mode)
        run_preflight(made, teacher, dataset_eval, loader.dataset.dataset, data, args, device, autocast)
        run.speaks(teacher.form)
        return teacher

    return run, OnDemandTeacher(build)
