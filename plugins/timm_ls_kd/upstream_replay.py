"""Stored soft labels in timm's own script: its images, its mixing and its epochs, seen from the outside."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lskd import LskdError
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.data import loading_error
from timm_ls_kd.normalisation import Normalisation
from timm_ls_kd.replay import ImageSource, KeySampler, replayed_parts
from timm_ls_kd.soft_label_task import (
    OnDemandTeacher,
    SoftLabelsTask,
    is_half,
    open_run,
    planned_epochs,
    prepare,
)
from timm_ls_kd.store import SoftLabelsRun
from timm_ls_kd.teacher import Teacher


class NoMixing:
    """Stands for timm's `Mixup`, in a run whose images come mixed."""

    mixup_enabled = False

    def __call__(self, images: Any, targets: Any) -> tuple[Any, Any]:
        """Return both as they are."""
        return images, targets


@dataclass
class ReplaySeams:
    """What is seen of a run of the script that uses stored soft labels.

    Attributes:
        kd: says what the run distils, once the script has parsed its arguments.
    """

    kd: Callable[[], KdConfig | None]
    loader: Any = None
    batch_size: int = 1
    sampler: KeySampler | None = None
    task: SoftLabelsTask | None = None
    run: SoftLabelsRun | None = None

    def watch(self, module: Any) -> None:
        """Put our images, collate function and epochs into the script's names."""
        create_loader, train_one_epoch = module.create_loader, module.train_one_epoch

        def replayed_loader(dataset: Any, *args: Any, **kwargs: Any) -> Any:
            kd = self.kd()
            if kd is None or kd.soft_labels is None or not kwargs.get("is_training"):
                return create_loader(dataset, *args, **kwargs)
            if isinstance(dataset, torch.utils.data.IterableDataset):
                raise LskdError(
                    "--kd-soft-labels needs images that can be asked for one by one, this data set can only "
                    "be streamed; use a folder of images or a tar file."
                )
            images, collate = replayed_parts(dataset, kd.soft_labels, kwargs["use_prefetcher"])
            loader = create_loader(images, *args, **(kwargs | {"collate_fn": collate}))
            inner = getattr(loader, "loader", loader)
            self.sampler = KeySampler(inner.batch_sampler.sampler, len(images))
            inner.batch_sampler.sampler = self.sampler
            self.loader, self.batch_size = inner, kwargs["batch_size"]
            return loader

        def train_epoch(epoch: int, *args: Any, **kwargs: Any) -> Any:
            if self.task is None or self.sampler is None:
                return train_one_epoch(epoch, *args, **kwargs)
            self.sampler.epoch = epoch
            self.task.begin_epoch(epoch)
            try:
                result = train_one_epoch(epoch, *args, **kwargs)
            except LskdError as error:
                raise loading_error(error) from None
            self.task.end_epoch()
            return result

        module.create_loader, module.train_one_epoch = replayed_loader, train_epoch
        self._without_mixing(module)

    def create_task(
        self,
        args: Namespace,
        kd: KdConfig,
        model: Any,
        normalisation: Normalisation,
        build: Callable[[], Teacher],
        autocast: Any,
        say: Callable[[str], None],
        **task: Any,
    ) -> SoftLabelsTask:
        """Create the task, its store opened, and its teacher tried where it will be asked.

        Args:
            args: the script's.
            kd: what the run distils.
            model: the student.
            normalisation: of the batches.
            build: makes the teacher and tries it.
            autocast: context of forward passes.
            say: prints a line, on the first process.
            **task: device and dtype.

        Raises:
            LskdError: whatever is wrong with the store or the teacher.
        """
        source = ImageSource(
            dataset=self.loader.dataset,
            collate=self.loader.collate_fn,
            normalisation=normalisation,
            device=task["device"],
            autocast=autocast,
            batch_size=self.batch_size,
            channels_last=args.channels_last,
            workers=args.workers,
        )
        teacher = OnDemandTeacher(build)
        self.run = open_run(args, kd, args.num_classes, planned_epochs(args), source, say)
        self.task = SoftLabelsTask(model, teacher, self.run, **kd.loss_arguments(), **task)
        for line in prepare(self.run, teacher, planned_epochs(args), is_half(kd, args)):
            say(line)
        return self.task

    def close(self) -> None:
        """Let others write."""
        if self.run is not None:
            self.run.close()

    def _without_mixing(self, module: Any) -> None:
        def unless_replayed(original: Any, instead: Any) -> Any:
            def create(*args: Any, **kwargs: Any) -> Any:
                kd = self.kd()
                return original(*args, **kwargs) if kd is None or kd.soft_labels is None else instead

            return create

        module.Mixup = unless_replayed(module.Mixup, NoMixing())
        module.FastCollateMixup = unless_replayed(module.FastCollateMixup, None)
