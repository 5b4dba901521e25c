"""`python -m mmcls_bnn.soft_labels CONFIG`: store what the teacher says before any student is trained."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmengine.config import DictAction
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from tqdm import tqdm

from lskd import LskdError, SoftLabels
from lskd.errors import ShownParser
from lskd.soft_labels.remote import written_folder
from mmcls_bnn.compat import FRAMEWORK, MODELS, use_registry
from mmcls_bnn.distil import classifier  # noqa: F401 - importing it registers students
from mmcls_bnn.distil.store import StoredTeacher
from mmcls_bnn.distil.teacher import speed_up, try_teacher
from mmcls_bnn.recipe import check_count, check_variables, read_config, run


class _Settings(DictAction):
    """mmengine's, which raises where a word is no KEY=VALUE or a bracket lacks its other half."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        """Read the words."""
        try:
            super().__call__(parser, *given, **named)
        except (ValueError, AssertionError, RecursionError):
            words = " ".join(given[1])
            parser.error(
                f"argument --cfg-options: {words} cannot be read as KEY=VALUE; is a = or a bracket missing?"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = ShownParser(
        prog="python -m mmcls_bnn.soft_labels",
        description="Store what the teacher of a recipe says about its training images, as its augmentation "
        "shows them. The same command goes on after an end.",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="recipe of a student with model.distillation.soft_labels"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="epochs to store (default: all of the recipe)"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images at a time (default: the recipe's)"
    )
    parser.add_argument(
        "--shard",
        default="",
        metavar="I/N",
        help="write the I-th of N shards, which as many jobs write at once; `lskd soft-labels merge DIR` "
        "then makes the store of them",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="loading processes (default: the recipe's)")
    parser.add_argument("--cpu", action="store_true", help="not on the GPU even where there is one")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help="changes to the recipe, e.g. model.distillation.soft_labels.path=DIR",
    )
    return run(lambda: _write(parser.parse_args(argv)))


def _write(args: argparse.Namespace) -> str:
    for name, least in (("epochs", 1), ("batch_size", 1), ("workers", 0)):
        if (value := getattr(args, name)) is not None:
            check_count(f"--{name.replace('_', '-')}", value, least)
    cfg = read_config(args.config, args.cfg_options)
    check_variables(cfg)
    use_registry()
    init_default_scope(cfg.get("default_scope") or FRAMEWORK)
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.get("data_preprocessor")))
    if getattr(model, "soft_label_settings", None) is None:
        raise LskdError(
            f"config {args.config} has no model.distillation.soft_labels; add it, or give "
            "--cfg-options model.distillation.soft_labels.path=DIR"
        )
    written_folder(model.soft_label_settings.path)
    # The student is neither trained nor initialised.
    model.to("cuda" if torch.cuda.is_available() and not args.cpu else "cpu").eval()
    epochs = int(cfg.train_cfg.max_epochs) if args.epochs is None else args.epochs
    alone = {"num_workers": 0, "persistent_workers": False}
    loader = Runner.build_dataloader({**cfg.train_dataloader, **alone}, seed=0)
    amp = _mixed_precision(cfg.get("optim_wrapper", {}))
    model.stored = stored = StoredTeacher(model, cfg, loader, epochs, amp, args.shard)
    if not stored.all_there:
        if cfg.get("val_dataloader") is not None:  # before anything is written
            validation = Runner.build_dataloader({**cfg.val_dataloader, **alone})
            print(try_teacher(model, validation.dataset, 512))
        if model.teacher_mode != "none":
            print(speed_up(model, loader.dataset, amp))
        stored.speaks(model.load_teacher().form)
        batch_size = args.batch_size or int(cfg.train_dataloader.get("batch_size", 64))
        workers = int(cfg.train_dataloader.get("num_workers", 0)) if args.workers is None else args.workers
        first, stop = stored.layout.first, stored.layout.stop
        try:
            with tqdm(total=stop - first, initial=stored.keys - first, unit=" images", mininterval=1) as bar:
                ask = partial(stored.answers, batch_size=batch_size, workers=workers)
                stored.write_ahead(stop, ask, bar.update)
        finally:
            stored.close()
    labels = SoftLabels(stored.path, shard=args.shard)
    error = f"; {labels.own_error}" if stored.labels is None and labels.own_error else ""
    return f"{stored.describe()}{error}; {labels.info()['bytes'] / 2**20:.1f} MiB"


def _mixed_precision(wrapper: Any) -> torch.dtype | bool:
    if wrapper.get("type") != "AmpOptimWrapper":
        return False
    dtype = wrapper.get("dtype")
    if isinstance(dtype, str):
        if dtype not in AmpOptimWrapper.valid_dtypes:
            names = " or ".join(AmpOptimWrapper.valid_dtypes)
            raise LskdError(f"optim_wrapper.dtype is {dtype!r}; it must be {names}.")
        dtype = getattr(torch, dtype)
    return dtype or True


if __name__ == "__main__":
    sys.exit(main())
