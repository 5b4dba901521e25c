"""`python -m mmcls_bnn.profile student.safetensors --size 224`: where a packed student's time goes."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lskd import LskdError
from lskd.errors import ShownParser, one_line
from mmcls_bnn.binary import bits
from mmcls_bnn.binary.fast import FastConv2d, FastUnit, make_fast
from mmcls_bnn.binary.layers import binary_layers, image_channels
from mmcls_bnn.binary.packed import load_packed, pack
from mmcls_bnn.recipe import check_count, run

_BINARY = (FastUnit, FastConv2d)  # layers, whatever they consist of


def describe(path: str, size: int, batch: int = 1, rounds: int = 20, build: str | None = None) -> str:
    """Return a table of a packed student's layers, each at its fastest of several passes.

    Args:
        size: height and width of the images, which are noise.
        build: one of `bits.builds()`; by default the fastest.

    Raises:
        LskdError: for a file that cannot be read, or a number out of range.
    """
    for name, value in (("--size", size), ("--batch", batch), ("--rounds", rounds)):
        check_count(name, value)
    model = load_packed(path)
    with bits.forced(build or bits.build()), torch.inference_mode():
        try:
            images = torch.randn(batch, image_channels(model), size, size)
            rows = _layers(model, images, rounds)
        except RuntimeError as error:
            what = f"images of {size} x {size}, {batch} at once"
            raise LskdError(f"the network cannot process {what} ({one_line(error)}).") from None
        lines = [f"{batch} x {size} x {size}, {torch.get_num_threads()} thread(s), {bits.build() or 'torch'}"]
        if bits.build():
            bound = max(_rate() for _ in range(100))
            lines.append(
                f"at most {bound:.0f} billion binary products a second and thread (all from the cache)"
            )
    whole = sum(seconds for seconds, _ in rows.values())
    lines.append(f"{'':40} {'ms':>9} {'share':>7} {'binary products':>16} {'10^9/s':>7}")
    for name, (seconds, products) in [*rows.items(), ("whole network", (whole, 0))]:
        rate = f"{products:16,} {products / seconds / 1e9:7.0f}" if products else ""
        label = name or "between the layers"
        lines.append(f"{label:40} {1000 * seconds:9.3f} {seconds / whole:7.1%} {rate}".rstrip())
    return "\n".join(lines)


def deployed(student: nn.Module, shape: tuple[int, int, int, int]) -> tuple[int, float]:
    """Return the bytes of a student's weights as it is deployed, and least milliseconds of a pass.

    Args:
        student: binary weights are packed and run fast; a real network is taken as it is.
        shape: of the images, `(B, C, H, W)`.
    """
    network: Any = pack(student) if binary_layers(student) else student
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    network, images = make_fast(network) if network is not student else student, torch.randn(shape)

    def once() -> float:
        start = time.perf_counter()
        network(images, mode="tensor")
        return 1000 * (time.perf_counter() - start)

    with torch.inference_mode():
        return size, min(once() for _ in range(10))


def _rate() -> float:
    start = time.perf_counter()
    return bits.rate() / (time.perf_counter() - start) / 1e9


def _layers(model: nn.Module, images: Tensor, rounds: int) -> dict[str, tuple[float, int]]:
    """Return least seconds and binary products of each layer by name, of what lies between them by ""."""
    passes: list[dict[str, float]] = []
    products: dict[str, int] = {}

    def watch(name: str, layer: nn.Module) -> list[Any]:
        started: list[float] = []

        def after(module: Any, _: Any, output: Any) -> None:
            spent = time.perf_counter() - started.pop()
            passes[-1][name] = passes[-1].get(name, 0) + spent  # a layer may run twice in a pass
            if isinstance(module, _BINARY) and len(passes) == 1:
                _, channels, height, width = module.weights.shape
                products[name] = products.get(name, 0) + output.numel() * channels * height * width

        return [
            layer.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
            layer.register_forward_hook(after),
        ]

    # The innermost layers, and of a binary block its units, each of which is one.
    inner = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BINARY) or not (isinstance(layer, nn.Identity) or [*layer.children()])
    }
    units = tuple(f"{name}." for name, layer in inner.items() if isinstance(layer, _BINARY))
    watched = {"": model} | {name: layer for name, layer in inner.items() if not name.startswith(units)}
    handles = [handle for name, layer in watched.items() for handle in watch(name, layer)]
    for _ in range(rounds):
        passes.append({})
        model(images, mode="tensor")
    for handle in handles:
        handle.remove()
    for seconds in passes:
        seconds[""] -= sum(seconds.values()) - seconds[""]
    return {name: (min(each[name] for each in passes), products.get(name, 0)) for name in passes[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ShownParser(prog="python -m mmcls_bnn.profile", description=__doc__)
    parser.add_argument("file", help="what python -m mmcls_bnn.export wrote")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--rounds", type=int, default=20, help="passes, of which each layer's fastest counts")
    parser.add_argument("--build", help=f"one of {', '.join(bits.BUILDS)}; default: the fastest")
    given = parser.parse_args(arguments)
    return run(lambda: describe(given.file, given.size, given.batch, given.rounds, given.build))


if __name__ == "__main__":
    raise SystemExit(main())
