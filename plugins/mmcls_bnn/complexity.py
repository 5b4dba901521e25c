"""`python -m mmcls_bnn.complexity RECIPE`: parameters and operations of a network, binary and real apart.

Counted are convolutions and fully connected layers, a multiplication and its addition as one operation, as
the papers on binary networks count: BOPs where weights and activations are binary, FLOPs elsewhere, and
OPs = BOPs / 64 + FLOPs, because a machine word of 64 bits contains 64 binary products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lskd import LskdError
from lskd.errors import ShownParser, one_line
from mmcls_bnn.binary.layers import BinaryConv2d, RSign, binary_layers, image_channels
from mmcls_bnn.binary.packed import build_student
from mmcls_bnn.recipe import check_count, read_recipe, run


@dataclass(frozen=True)
class Complexity:
    """Weights of one bit and all other parameters; binary and real multiply-adds for one image."""

    binary_parameters: int
    real_parameters: int
    bops: int
    flops: int

    @property
    def ops(self) -> float:
        """BOPs / 64 + FLOPs."""
        return self.bops / 64 + self.flops


def count(model: nn.Module, channels: int, size: int) -> Complexity:
    """Count a classifier's parameters, and its operations on one image `(channels, size, size)`.

    Raises:
        LskdError: for an image that the network cannot process.
    """
    operations = {True: 0, False: 0}
    binary = set(binary_layers(model).values())
    signs = any(isinstance(module, RSign) for module in model.modules())

    def add(module: Any, _: Any, output: Tensor) -> None:
        positions = output[0].numel() // output.shape[1]
        operations[signs and module in binary] += positions * module.weight.numel()

    layers = [m for m in model.modules() if isinstance(m, BinaryConv2d | nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, channels, size, size), mode="tensor")
    except RuntimeError as error:
        what = f"images of {size} x {size}"
        raise LskdError(f"the network cannot process {what} ({one_line(error, 120)}).") from None
    finally:
        for handle in handles:
            handle.remove()
    bits = sum(layer.weight.numel() for layer in binary)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(bits, total - bits, operations[True], operations[False])


def describe(config: str, size: int) -> str:
    """Return the table of a recipe's student.

    Raises:
        LskdError: for a recipe that cannot be read or built, or a size that is out of range.
    """
    check_count("--size", size)
    description = read_recipe(config)
    model = build_student(description)
    found = count(model, image_channels(model), size)
    rows = {
        "image": f"{size} x {size}",
        "parameters": f"{found.binary_parameters + found.real_parameters:,}",
        "  of 1 bit": f"{found.binary_parameters:,}",
        "  real": f"{found.real_parameters:,}",
        "BOPs (binary multiply-adds)": f"{found.bops:,}",
        "FLOPs (real multiply-adds)": f"{found.flops:,}",
        "OPs (BOPs / 64 + FLOPs)": f"{found.ops:,.0f}",
    }
    return "\n".join(f"{name:28} {value:>16}" for name, value in rows.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ShownParser(prog="python -m mmcls_bnn.complexity", description=__doc__)
    parser.add_argument("config", help="a recipe, or any config of mmcls")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image")
    given = parser.parse_args(arguments)
    return run(lambda: describe(given.config, given.size))


if __name__ == "__main__":
    raise SystemExit(main())
