"""Binary layers and a training step, against the same mathematics in plain tensor operations."""

import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from mmcls_bnn.binary import bits
from mmcls_bnn.binary.fast import make_fast
from mmcls_bnn.binary.layers import binary_activation
from mmcls_bnn.binary.packed import build_student, pack, save_packed
from mmcls_bnn.binary.reactnet import ReActNet

_PLAIN = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "mmcls_bnn" / "straightforward.py"))


def test_binary_activation_against_the_polynomial(ratio):
    x = torch.randn(32, 64, 56, 56, requires_grad=True)
    bias = torch.zeros(1, 64, 1, 1, requires_grad=True)
    gradient = torch.randn(32, 64, 56, 56)

    def run(activation: Callable[[], Tensor]) -> None:
        x.grad = bias.grad = None
        activation().backward(gradient)

    ratio(
        "binary activation 32 x 64 x 56 x 56, forward + backward / autograd through the polynomial",
        lambda: run(lambda: binary_activation(x, bias)),
        lambda: run(lambda: _PLAIN["binary_activation"](x + bias)),
        bar=0.30,
    )


def test_training_step_of_reactnet18(ratio):
    torch.manual_seed(0)
    plain = _PLAIN["ReActNet18"]()
    ours = ReActNet(18)
    ours.load_state_dict(plain.state_dict())
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(0, 1000, (32,))

    def step(backbone: nn.Module) -> Callable[[], None]:
        head = nn.Linear(512, 1000)
        optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=2.5e-3)

        def run() -> None:
            optimizer.zero_grad()
            features = backbone(images)
            features = features[0] if isinstance(features, tuple) else features
            nn.functional.cross_entropy(head(features.mean((2, 3))), labels).backward()
            optimizer.step()

        return run

    ratio(
        "ReActNet-18, whole training step, 32 images of 64 x 64 / the straightforward network",
        step(ours),
        step(plain),
        bar=0.60,
        rounds=11,
        least=True,
    )


LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
"""Channels and sides of ReActNet-18's 3 x 3 convolutions on images of 224 x 224."""


def convolutions(channels: int, side: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return a binary convolution of real activations, packed on the way, and torch's in float32."""
    x, weight = torch.randn(1, channels, side, side), torch.randn(channels, channels, 3, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    weights, threshold = bits.weights_of((weight >= 0).numpy()), torch.zeros(channels)
    scale = torch.ones(channels)
    return (
        lambda: bits.convolve(last, threshold, weights, scale, 1, 1),
        lambda: functional.conv2d(x, weight, padding=1),
    )


@pytest.mark.parametrize(("build", "together", "each"), [("avx512", 0.12, 0.20), ("avx2", 0.35, None)])
def test_binary_convolutions(ratio, build, together, each):
    if build not in bits.builds():
        pytest.skip(f"this processor cannot run {build}")
    work = {f"{c} channels at {side} x {side}": convolutions(c, side) for c, side in LAYERS}
    with bits.forced(build), torch.inference_mode():
        for name, (ours, peer) in work.items():
            ratio(f"binary 3 x 3, {name}, {build} / torch float32", ours, peer, each, rounds=50, least=True)
        ratio(
            f"the four binary convolutions together, {build} / torch float32",
            lambda: [ours() for ours, _ in work.values()],
            lambda: [peer() for _, peer in work.values()],
            together,
            rounds=50,
            least=True,
        )


def student(kind: str, channels: int) -> tuple[nn.Module, dict[str, object]]:
    """Return a classifier of 1000 classes for large images, and its description."""
    description: dict[str, object] = {
        "type": "ImageClassifier",
        "backbone": {"type": kind},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 1000, "in_channels": channels},
        "data_preprocessor": {"type": "ClsDataPreprocessor"},
    }
    torch.manual_seed(0)
    return build_student(description), description


@pytest.mark.parametrize(("kind", "channels"), [("ReActNet", 512), ("ReActNetA", 1024)])
def test_a_student_on_one_image(ratio, kind, channels):
    """Against itself with weights unpacked for each pass, and a real network; by each build."""
    unpacked = pack(student(kind, channels)[0])
    fast = make_fast(pack(student(kind, channels)[0]))
    real = torchvision.models.resnet18().eval()
    image = torch.randn(1, 3, 224, 224)
    for build in reversed(bits.builds()):
        best = build == bits.build()
        with bits.forced(build), torch.inference_mode():
            name = f"{kind}, one image of 224 x 224, {build}"
            against = lambda network: lambda: network(image)  # noqa: E731
            bar = 0.20 if best else None
            ratio(f"{name} / unpacked", against(fast), against(unpacked), bar, rounds=7, least=True)
            bar = 0.35 if best and kind == "ReActNet" else None
            ratio(f"{name} / ResNet-18 in float32", against(fast), against(real), bar, rounds=7, least=True)


def test_how_near_the_layers_come_to_the_processor():
    """Prints how many binary products a second are counted, and how many lie in the cache at most."""
    for build in bits.builds():
        with bits.forced(build), torch.inference_mode():
            bound = max(_rate(bits.rate) for _ in range(100))
            print(
                f"\n{build}: {bound / 1e9:.0f} billion binary products a second in the first-level cache",
                end="",
            )
            for channels, side in LAYERS:
                ours, count = convolutions(channels, side)[0], 9 * (channels * side) ** 2
                found = max(_rate(lambda ours=ours, count=count: (ours(), count)[1]) for _ in range(30))
                print(f"; {channels} channels: {found / bound:.2f} of it", end="")
    print()


def _rate(work: Callable[[], int]) -> float:
    start = time.process_time()
    count = work()
    return count / (time.process_time() - start)


_MEMORY = """
import sys, torch
from mmcls_bnn.binary.packed import load_packed
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
def run(model, image):
    with torch.inference_mode():
        for _ in range(3):
            model(image, mode="tensor")
_, which, path, small = sys.argv
run(load_packed(small), torch.zeros(1, 3, 64, 64))  # what torch and mmcls need once
image = torch.randn(1, 3, 224, 224)
before = memory("VmRSS")
# Of what the test itself has just written.
model = load_packed(path) if which == "packed" else torch.load(path, weights_only=False).eval()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
run(model, image)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("kind", "channels"), [("ReActNet", 512), ("ReActNetA", 1024)])
def test_memory_while_a_student_runs(quantity, tmp_path, kind, channels):
    """The network and what it needs for one image, each in a process of its own."""
    network, description = student(kind, channels)
    files = {name: str(tmp_path / name) for name in ("packed", "float32", "small")}
    save_packed(pack(network), description, Path(files["packed"]))
    torch.save(network, files["float32"])
    description |= {"backbone": {"type": kind, "width": 0.125}}
    description["head"] = {"type": "LinearClsHead", "num_classes": 10, "in_channels": channels // 8}
    save_packed(pack(build_student(description)), description, Path(files["small"]))

    def peak(which: str) -> float:
        command = [sys.executable, "-c", _MEMORY, which, files[which], files["small"]]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    ratios = [peak("packed") / peak("float32") for _ in range(3)]
    quantity(f"memory of {kind} and one image of 224 x 224, packed / float32", ratios, bar=0.25)
