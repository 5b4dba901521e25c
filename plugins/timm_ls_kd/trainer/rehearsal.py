"""What a run trains with, built and not used: mistakes in its arguments come out before anything trains."""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lskd import LskdError
from timm_ls_kd.arguments import kd_config
from timm_ls_kd.data import DataConfig, check_data, open_dataset, resolve_data
from timm_ls_kd.loader import Loader, eval_loader, train_loader
from timm_ls_kd.models import check_pretrained
from timm_ls_kd.store import replayed_parts
from timm_ls_kd.trainer import session as parts
from timm_ls_kd.trainer.main import create_scheduler


@dataclass(frozen=True)
class Built:
    """The parts of a run: its model, input, loaders (validation may be off) and optimiser."""

    model: nn.Module
    data: DataConfig
    smoothing: float
    train: Loader
    validation: Loader | None
    optimizer: torch.optim.Optimizer
    scheduler: Any


class _NoImages:
    """Stands in for images that are not there yet."""

    transform: Any = None

    def __len__(self) -> int:
        return 1 << 40


@dataclass
class Rehearsal:
    """Builds runs one after the other; data sets that several read are opened once.

    Attributes:
        data_there: whether the data are; if not, what does not need them is built.
    """

    data_there: bool = True
    _opened: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def try_out(self, args: Namespace) -> None:
        """Build a run without memory for its weights, and load its first training image.

        Args:
            args: of the bundled trainer; the model is created without pretrained weights, which need only be
                within reach.

        Raises:
            LskdError: as the run would.
        """
        own = Namespace(**vars(args))
        own.rank, own.world_size, own.distributed, own.device, own.workers = 0, 1, False, "cpu", 0
        if own.pretrained:
            check_pretrained(own.model)
        own.pretrained, own.initial_checkpoint, own.resume = False, "", ""
        for device in (torch.device("meta"), torch.device("cpu")):
            try:
                with device:
                    model = parts.create_student(own)
                built = self.build(own, model, device)
            except LskdError:  # a mistake, or what cannot be done without memory
                if device.type == "cpu":
                    raise
            else:
                break
        if self.data_there:
            built.train.dataset[0]

    def build(self, args: Namespace, model: nn.Module, device: torch.device) -> Built:
        """Build the parts around a model.

        Args:
            args: of the bundled trainer, with rank, world_size and distributed.
            model: as `parts.create_student` makes it.
            device: of the model.

        Raises:
            LskdError: as the run would.
        """
        kd = kd_config(args)
        if args.num_classes is None:
            args.num_classes = int(model.num_classes)  # type: ignore[arg-type]
        data = resolve_data(vars(args), model)
        parts.try_student(model, data, args, device)
        smoothing = parts.uniform_smoothing(args, args.num_classes)
        train, validation = self._datasets(args, data.input_size[0])
        replay = None if kd is None else kd.soft_labels
        loader = train_loader(
            train,
            data,
            args,
            torch.device("cpu"),
            smoothing,
            parts=replayed_parts(train, replay, not args.no_prefetcher),
        )
        loader_eval = None if validation is None else eval_loader(validation, data, args, torch.device("cpu"))
        optimizer = parts.create_optimizer(args, model)
        updates = -(-len(loader) // args.grad_accum_steps)
        scheduler, _ = create_scheduler(args, optimizer, updates)
        return Built(model, data, smoothing, loader, loader_eval, optimizer, scheduler)

    def _datasets(self, args: Namespace, channels: int) -> tuple[Any, Any]:
        if not self.data_there:
            return _NoImages(), _NoImages() if args.val_split else None
        read = (args.dataset, args.data_dir, args.train_split, args.val_split, args.class_map)
        key = (*read, args.num_classes, channels)
        if key not in self._opened:
            splits = [split for split in (args.train_split, args.val_split) if split]
            check_data(
                args.dataset,
                args.data_dir,
                splits,
                num_classes=args.num_classes,
                class_map=args.class_map,
                open_images=False,
            )
            opened = [
                open_dataset(vars(args), split, channels, args.num_classes, split == args.train_split)
                for split in splits
            ]
            self._opened[key] = (opened[0], opened[1] if args.val_split else None)
        return self._opened[key]  # type: ignore[no-any-return]
