"""A trained run as a folder that timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from lskd import LskdError
from lskd.base.hub import offline
from lskd.errors import one_line
from lskd.teachers.outputs import Answers
from timm_ls_kd.data import resolve_data
from timm_ls_kd.evaluation import ask_run, open_run

_PUBLISHED = (
    *("tag", "license", "origin_url", "paper_ids", "paper_name", "notes"),
    *("label_names", "label_descriptions"),
)
_IMAGES = ("input_size", "interpolation", "crop_pct", "crop_mode")
_DATA = ("model", "class_map", "val_split")  # a `dataset` may be one to download


def export_run(
    run_dir: Path,
    output: Path,
    class_names: Sequence[str] | None = None,
    data_dir: Path | None = None,
    checkpoint: str = "last.pth.tar",
) -> tuple[nn.Module, Tensor, Answers | None]:
    """Write a run's `model.safetensors` and `config.json` into a folder, and read them back by timm.

    Args:
        class_names: of the K classes, in the model's order.
        data_dir: data folder; None: there are no data.

    Returns:
        The model as timm reads it back, in evaluation mode on the CPU; images `(4, C, H, W)` of noise on
        which its logits are the checkpoint's to the bit; and what it says of the validation images through
        the transform that config.json describes, while they are taken, where there are data.

    Raises:
        LskdError: a folder that is no run, a checkpoint that does not fit, a model that timm cannot write or
            reads back as another.
    """
    with offline():
        model, settings = open_run(run_dir, checkpoint)
        model.eval()
        name, data = settings["model"], resolve_data(settings, model)
        how = {field: getattr(data, field) for field in _IMAGES}
        how |= {"mean": data.normalisation.mean, "std": data.normalisation.std}
        about: Any = model
        # Of the weights that timm has of this name, which these are not.
        about.pretrained_cfg = {k: v for k, v in about.pretrained_cfg.items() if k not in _PUBLISHED}
        try:
            described: dict[str, Any] = {"label_names": list(class_names)} if class_names else {}
            save_for_hf(model, str(output), described, safe_serialization=True, data_config=how)
            loaded: nn.Module = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
            images = torch.randn(4, *data.input_size, generator=torch.Generator().manual_seed(0))
            with torch.inference_mode():
                same = torch.equal(model(images), loaded(images))
        except Exception as error:  # timm and the models raise whatever they like
            why = one_line(error)
            raise LskdError(f"model '{name}' cannot be written as timm reads it ({why})") from None
    if not same:
        raise LskdError(f"model '{name}' as timm reads it back gives other logits; it cannot be exported")
    if data_dir is None:
        return loaded, images, None
    # Nothing of the run's transform: what config.json says of images is what is tried.
    kept = {key: settings[key] for key in _DATA if key in settings} | {"batch_size": 64, "workers": 0}
    return loaded, images, ask_run(loaded, kept, data_dir, device="cpu")
