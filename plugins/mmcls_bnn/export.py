"""`python -m mmcls_bnn.export CHECKPOINT out.safetensors`: the 1-bit weights of a trained student."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lskd import CheckpointError, LskdError, load_teacher_weights
from lskd.base.files import parse_json, whole_file
from mmcls_bnn.binary.packed import PackedConv2d, build_student, load_packed, pack, save_packed
from mmcls_bnn.distil.classifier import differing_key, read_note
from mmcls_bnn.recipe import read_recipe, run


def export(checkpoint: str, output: Path, config: str | None = None) -> str:
    """Pack a checkpoint's student into `output` and return a line about how large it is, and in float32.

    The file is read back and its logits are compared before it gets its name.

    Args:
        checkpoint: what `mim train` wrote.
        output: the `.safetensors` file to write.
        config: the recipe, for a checkpoint that does not say what it is (saved without SafeCheckpointHook).

    Raises:
        LskdError: for a checkpoint that cannot be read, has no binary weights, or does not fit.
    """
    if output.suffix != ".safetensors":
        raise LskdError(f"output {output} must end in .safetensors.")
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
    student, weights = build_student(description), load_teacher_weights(checkpoint)
    if key := differing_key(student, weights):
        raise CheckpointError(f"{checkpoint} is of another network than its config: '{key}' differs.")
    student.load_state_dict(weights)
    packed = pack(student)
    with whole_file(output) as trial:
        save_packed(packed, description, trial)
        _compare(student, load_packed(trial))
    full = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    bits = sum(math.prod(module.shape) for module in packed.modules() if isinstance(module, PackedConv2d))
    real = sum(parameter.numel() for parameter in packed.parameters())
    size = output.stat().st_size
    return (
        f"{output}: {size:,} bytes, in float32 {full:,} ({full / size:.1f} times as much); "
        f"{bits:,} weights of 1 bit, {real:,} real parameters; logits equal to the bit"
    )


def _compare(student: Any, loaded: Any) -> None:
    channels = getattr(student.backbone, "in_channels", 3)
    images = torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = torch.equal(student(images, mode="tensor"), loaded(images, mode="tensor"))
    if not same:
        raise LskdError("the packed weights do not give the same logits; nothing was written.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mmcls_bnn.export", description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint of a student with binary weights")
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    parser.add_argument("--config", help="recipe, where the checkpoint does not say what it is")
    given = parser.parse_args(arguments)
    return run(lambda: export(given.checkpoint, given.output, given.config))


if __name__ == "__main__":
    raise SystemExit(main())
