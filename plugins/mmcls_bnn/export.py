"""`python -m mmcls_bnn.export CHECKPOINT out.safetensors`: the 1-bit weights of a trained student."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lskd import CheckpointError, LskdError, load_teacher_weights
from lskd.base.files import parse_json, whole_file, write_text
from lskd.checkpoints import load_strictly
from lskd.errors import ShownParser
from mmcls_bnn.binary import bits
from mmcls_bnn.binary.fast import PackedConv2d
from mmcls_bnn.binary.layers import image_channels
from mmcls_bnn.binary.packed import build_student, load_packed, pack, save_packed
from mmcls_bnn.distil.classifier import read_note
from mmcls_bnn.recipe import read_recipe, run


def export(checkpoint: str, output: Path, config: str | None = None) -> str:
    """Pack a checkpoint's student into `output` and return a line about how large it is, and in float32.

    The file is read back and its logits are compared before it gets its name.

    Args:
        config: the recipe, for a checkpoint that does not say what it is (saved without SafeCheckpointHook).

    Raises:
        LskdError: for a checkpoint that cannot be read, has no binary weights, or does not fit.
    """
    if output.suffix != ".safetensors":
        raise LskdError(f"output {output} must end in .safetensors.")
    weights = load_teacher_weights(checkpoint)
    note = read_note(checkpoint)
    if config is not None:
        description = read_recipe(config)
    elif "model" in note:
        try:
            description = parse_json(str(note["model"]))
        except ValueError as error:
            raise CheckpointError(f"{checkpoint} is damaged, its model is no JSON ({error}).") from None
    else:
        raise CheckpointError(f"{checkpoint} does not say which model it is; add --config RECIPE.")
    student = build_student(description)
    load_strictly(student, weights, "its config", checkpoint, "give the recipe that it was trained with")
    packed = pack(student)
    with whole_file(output) as trial:
        save_packed(packed, description, trial)
        apart = _compare(student, trial)
    full = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    signs = sum(math.prod(module.shape) for module in packed.modules() if isinstance(module, PackedConv2d))
    real = sum(parameter.numel() for parameter in packed.parameters())
    size = output.stat().st_size
    return (
        f"{output}: {size:,} bytes, in float32 {full:,} ({full / size:.1f} times as much); "
        f"{signs:,} weights of 1 bit, {real:,} real parameters; logits equal to the bit, "
        f"the fast ones ({bits.build() or 'torch'}) to {apart:.1g}"
    )


def export_run(
    checkpoint: Path, output: Path, class_names: Sequence[str] | None = None
) -> tuple[nn.Module, Tensor]:
    """Write a student's `model.safetensors` and `config.json` into a folder, and read them back.

    Args:
        class_names: of the K classes, in the model's order.

    Returns:
        The packed model, from normalised images `(B, C, H, W)` to logits `(B, K)`, and noise `(4, C, 64, 64)`
        to try it on.
    """
    weights = output / "model.safetensors"
    export(str(checkpoint), weights)
    with safe_open(weights, "pt") as file:
        description = parse_json(file.metadata()["model"])
    if class_names:
        description["label_names"] = list(class_names)
    write_text(output / "config.json", json.dumps(description, indent=2) + "\n")
    packed = load_packed(weights, fast=False)  # to the bit, and what is traced
    return packed, _noise(packed, 4)


def _noise(model: nn.Module, count: int) -> Tensor:
    return torch.randn(count, image_channels(model), 64, 64, generator=torch.Generator().manual_seed(0))


def _compare(student: Any, path: Path) -> float:
    """Compare a file's logits with the student's, and return how far the fast ones are away."""
    images, fast = _noise(student, 2), load_packed(path)
    with torch.inference_mode():
        logits, found = student(images, mode="tensor"), fast(images, mode="tensor")
        same = torch.equal(load_packed(path, fast=False)(images, mode="tensor"), logits)
        with bits.forced(None):
            same &= torch.equal(fast(images, mode="tensor"), found)
    if not same:
        raise LskdError("the packed weights do not give the same logits; nothing was written.")
    return float((found - logits).abs().max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ShownParser(prog="python -m mmcls_bnn.export", description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint of a student with binary weights")
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    parser.add_argument("--config", help="recipe, where the checkpoint does not say what it is")
    given = parser.parse_args(arguments)
    return run(lambda: export(given.checkpoint, given.output, given.config))


if __name__ == "__main__":
    raise SystemExit(main())
