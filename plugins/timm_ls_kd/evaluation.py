"""What a trained run says about its validation images."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lskd import LskdError
from timm_ls_kd import inputs
from timm_ls_kd.config_file import read_config
from timm_ls_kd.models import create, input_arguments, load_weights


@dataclass(frozen=True)
class Evaluation:
    """Logits of a run on a split.

    Attributes:
        logits: `(N, K)` float32, on the CPU.
        labels: `(N,)` int64.
        keys: names of the N images, relative to the data folder (or `split/index` where there are no files).
    """

    logits: Tensor
    labels: Tensor
    keys: list[str]


def collect_logits(
    run_dir: Path,
    checkpoint: str = "last.pth.tar",
    data_dir: Path | None = None,
    split: str | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Run a trained model over a split through its run's own validation transform.

    Args:
        run_dir: folder of a run, with args.yaml.
        checkpoint: file in it; where it has averaged weights these are used, as in the run's summary.csv.
        data_dir: data folder; None: the run's.
        split: split of the data; None: the run's validation split.
        device: where to compute; None: CUDA where there is one.

    Raises:
        LskdError: a folder that is no run, a checkpoint that does not fit, data that cannot be read.
    """
    run_dir = Path(run_dir)
    settings = read_config(run_dir / "args.yaml")
    if "model" not in settings:
        raise LskdError(f"{run_dir / 'args.yaml'} names no model; give the folder of a timm run.")
    settings = {"batch_size": 128, "workers": 0, **settings}
    # Upstream's positional argument stays under its own name in args.yaml.
    settings["data_dir"] = str(data_dir) if data_dir else settings.get("data_dir") or settings.get("data")
    if settings["data_dir"] is None or not Path(settings["data_dir"]).exists():
        raise LskdError(f"data folder {settings['data_dir']} does not exist; give data_dir.")
    split = split or settings.get("val_split") or "validation"
    model = create(
        settings["model"],
        "model",
        pretrained=False,
        num_classes=settings.get("num_classes"),
        in_chans=inputs.input_channels(settings),
        global_pool=settings.get("gp"),
        extra=input_arguments(settings["model"], settings),
    )
    load_weights(model, f"model '{settings['model']}'", str(run_dir / checkpoint))
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(where).eval()
    data = inputs.resolve_data(settings, model)
    dataset = inputs.open_dataset(settings, split, data.input_size[0], int(cast(Any, model).num_classes))
    names = _keys(dataset, Path(settings["data_dir"]), split)
    options = Namespace(
        batch_size=settings.get("validation_batch_size") or settings["batch_size"],
        workers=settings["workers"],
        pin_mem=False,
        no_prefetcher=False,
    )
    logits, labels = [], []
    with torch.inference_mode():
        for images, targets in inputs.eval_loader(dataset, data, options, where):
            output = model(images)
            logits.append((output[0] if isinstance(output, tuple | list) else output).float().cpu())
            labels.append(targets.cpu())
    return Evaluation(torch.cat(logits).clone(), torch.cat(labels).long().clone(), names)


def _keys(dataset: object, data_dir: Path, split: str) -> list[str]:
    filenames = getattr(dataset, "filenames", None)
    if filenames is None:
        return [f"{split}/{index}" for index in range(len(dataset))]  # type: ignore[arg-type]
    paths = [Path(name) for name in filenames(absolute=True)]
    return [
        path.relative_to(data_dir).as_posix() if path.is_relative_to(data_dir) else path.as_posix()
        for path in paths
    ]
