"""What a run's training images follow from, before there are any: runs that agree in it share a store."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.utils.flop_counter import FlopCounterMode

from lskd import LskdError
from lskd.errors import one_line
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.data import resolve_data
from timm_ls_kd.loader import train_loader
from timm_ls_kd.store import ReplayedDataset, augmentation_of, replayed_parts
from timm_ls_kd.task import planned_epochs
from timm_ls_kd.trainer import session as parts


@dataclass(frozen=True)
class Views:
    """What a run's training images and the teacher's words about them follow from, beside teacher and data.

    Attributes:
        settings: equal ones mean equal images, and so one store.
        epochs: how many the run trains.
        mixed: whether images are mixed; stored, each image is by itself, otherwise by batches.
    """

    settings: dict[str, Any]
    epochs: int
    mixed: bool


class _NoImages:
    """Stands in for the training images."""

    transform: Any = None

    def __len__(self) -> int:
        return 1 << 40


def views_of(args: Namespace, kd: KdConfig) -> Views:
    """Return what the training images of a run with stored soft labels follow from.

    Args:
        args: the run's arguments; the model is built, without pretrained weights.
        kd: what it distils; its checkpoint need not be there.

    Raises:
        LskdError: a model, transform or schedule that cannot be made, or a schedule beyond the run's epochs.
    """
    assert kd.soft_labels is not None
    own = Namespace(**vars(args))
    own.pretrained, own.initial_checkpoint, own.resume = False, "", ""
    own.device, own.rank, own.world_size, own.distributed, own.workers = "cpu", 0, 1, False, 0
    data = resolve_data(vars(own), parts.create_student(own))
    device = torch.device("cpu")
    images = _NoImages()
    loader = train_loader(
        images, data, own, device, 0.0, replayed_parts(images, kd.soft_labels, not own.no_prefetcher)
    )
    dataset: ReplayedDataset = loader.dataset
    epochs, scheduled = planned_epochs(own), _scheduled_epochs(own)
    if scheduled != epochs:
        raise LskdError(f"the schedule of the learning rate lasts {scheduled} epochs, not {epochs}.")
    augmentation = augmentation_of(own, kd.soft_labels, dataset, data.normalisation, loader.collate.prefetch)
    augmentation.pop("seed")
    asked = {name: str(value) for name, value in vars(kd).items() if name.startswith("teacher_")}
    precision = kd.teacher_dtype or (str(own.amp_dtype) if own.amp else "float32")
    settings = {"augmentation": augmentation, "teacher": asked, "precision": precision}
    return Views(settings, epochs, own.mixup > 0 or own.cutmix > 0)


def forward_flops(args: Namespace) -> int:
    """Return the floating-point operations in which the model of a run answers one image.

    Raises:
        LskdError: a model that cannot be made.
    """
    own = Namespace(**vars(args))
    own.pretrained, own.initial_checkpoint, own.distributed, own.device = False, "", False, "cpu"
    model = parts.create_student(own).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *resolve_data(vars(own), model).input_size))
    return int(counter.get_total_flops())


def _scheduled_epochs(args: Namespace) -> int:
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr or 1.0)
        settings = scheduler_kwargs(args, decreasing_metric=args.eval_metric == "loss")
        _, epochs = create_scheduler_v2(optimizer, **settings, updates_per_epoch=1)
    except Exception as error:  # assertions of many kinds
        raise LskdError(f"--sched {args.sched} cannot be created ({one_line(error)}).") from None
    return int(epochs)
