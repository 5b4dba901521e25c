"""Binary layers and a training step, against the same mathematics in plain tensor operations."""

import runpy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmcls_bnn.binary.layers import binary_activation
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
        bar=0.75,
        rounds=11,
    )
