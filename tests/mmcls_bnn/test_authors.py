"""Random weights in the layout of ReActNet's authors, against the network that the layout is of."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmcls_bnn import authors, export
from mmcls_bnn.binary.packed import build_student, load_packed

pytestmark = pytest.mark.unit


def norm(name, channels):
    return {
        f"{name}.weight": torch.rand(channels) + 0.5,
        f"{name}.bias": torch.randn(channels) / 4,
        f"{name}.running_mean": torch.randn(channels) / 4,
        f"{name}.running_var": torch.rand(channels) + 0.5,
    }


def around(*names, channels):
    """Shifts and slopes of a block."""
    before, slope, after = names
    return {
        f"{before}.bias": torch.randn(1, channels, 1, 1) / 4,
        f"{slope}.weight": torch.rand(channels),
        f"{after}.bias": torch.randn(1, channels, 1, 1) / 4,
    }


def resnet18():
    weights = {"conv1.weight": torch.randn(64, 3, 7, 7) / 12, **norm("bn1", 64)}
    before = 64
    for stage, channels in enumerate((64, 128, 256, 512), 1):
        for index in range(4):
            at = f"layer{stage}.{index}"
            weights[f"{at}.move0.bias"] = torch.randn(1, before, 1, 1) / 4
            weights[f"{at}.binary_conv.weight"] = torch.randn(channels, before, 3, 3) / 100
            weights |= norm(f"{at}.bn1", channels)
            weights |= around(f"{at}.move1", f"{at}.prelu", f"{at}.move2", channels=channels)
            if before != channels:
                weights[f"{at}.downsample.1.weight"] = torch.randn(channels, before, 1, 1) / 8
                weights |= norm(f"{at}.downsample.2", channels)
            before = channels
    return weights | {"fc.weight": torch.randn(1000, 512) / 22, "fc.bias": torch.randn(1000)}


def mobilenet():
    widths = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    weights = {"feature.0.conv1.weight": torch.randn(32, 3, 3, 3) / 5, **norm("feature.0.bn1", 32)}
    for index, (before, out) in enumerate(pairwise(widths), 1):
        at = f"feature.{index}"
        weights[f"{at}.move11.bias"] = torch.randn(1, before, 1, 1) / 4
        weights[f"{at}.binary_3x3.weights"] = torch.randn(before * before * 9, 1) / 100
        weights |= norm(f"{at}.bn1", before)
        weights |= around(f"{at}.move12", f"{at}.prelu1", f"{at}.move13", channels=before)
        weights[f"{at}.move21.bias"] = torch.randn(1, before, 1, 1) / 4
        for conv, bn in [("pw", "bn2")] if before == out else [("pw_down1", "bn2_1"), ("pw_down2", "bn2_2")]:
            weights[f"{at}.binary_{conv}.weights"] = torch.randn(before * before, 1) / 100
            weights |= norm(f"{at}.{bn}", before)
        weights |= around(f"{at}.move22", f"{at}.prelu2", f"{at}.move23", channels=out)
    return weights | {"fc.weight": torch.randn(1000, 1024) / 32, "fc.bias": torch.randn(1000)}


def normalised(w, name, x):
    names = ("running_mean", "running_var", "weight", "bias")
    return functional.batch_norm(x, *(w[f"{name}.{each}"] for each in names))


def binary(w, x, bias, conv, shape, stride=1):
    weight = w[conv].reshape(shape)
    signs = torch.sign(x + w[f"{bias}.bias"])
    out = functional.conv2d(signs, weight.sign(), stride=stride, padding=shape[2] // 2)
    return out * weight.abs().mean((1, 2, 3))[:, None, None]


def shifted(w, at, names, x):
    before, slope, after = (f"{at}.{each}" for each in names)
    x = functional.prelu(x + w[f"{before}.bias"], w[f"{slope}.weight"])
    return x + w[f"{after}.bias"]


def run_resnet(w, x):
    x = normalised(w, "bn1", functional.conv2d(x, w["conv1.weight"], stride=2, padding=3))
    x = functional.max_pool2d(x, 3, 2, 1)
    for at in dict.fromkeys(name[:8] for name in w if name.startswith("layer")):
        shape, shortcut, stride = w[f"{at}.binary_conv.weight"].shape, x, 1
        if f"{at}.downsample.1.weight" in w:
            stride = 2
            shortcut = functional.conv2d(functional.avg_pool2d(x, 2), w[f"{at}.downsample.1.weight"])
            shortcut = normalised(w, f"{at}.downsample.2", shortcut)
        out = binary(w, x, f"{at}.move0", f"{at}.binary_conv.weight", shape, stride)
        out = normalised(w, f"{at}.bn1", out) + shortcut
        x = shifted(w, at, ("move1", "prelu", "move2"), out)
    return functional.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])


def run_mobilenet(w, x):
    x = normalised(w, "feature.0.bn1", functional.conv2d(x, w["feature.0.conv1.weight"], stride=2, padding=1))
    for index in range(1, 14):
        at, c = f"feature.{index}", x.shape[1]
        doubled = f"{at}.binary_pw_down1.weights" in w
        stride = 2 if doubled and c != 32 else 1
        out = binary(w, x, f"{at}.move11", f"{at}.binary_3x3.weights", (c, c, 3, 3), stride)
        x = normalised(w, f"{at}.bn1", out) + (functional.avg_pool2d(x, 2) if stride == 2 else x)
        x = shifted(w, at, ("move12", "prelu1", "move13"), x)
        pairs = [("pw_down1", "bn2_1"), ("pw_down2", "bn2_2")] if doubled else [("pw", "bn2")]
        parts = [
            normalised(
                w, f"{at}.{bn}", binary(w, x, f"{at}.move21", f"{at}.binary_{conv}.weights", (c, c, 1, 1))
            )
            for conv, bn in pairs
        ]
        x = shifted(w, at, ("move22", "prelu2", "move23"), torch.cat([part + x for part in parts], 1))
    return functional.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])


@pytest.mark.parametrize(("draw", "reference"), [(resnet18, run_resnet), (mobilenet, run_mobilenet)])
def test_a_converted_network_is_theirs(draw, reference, tmp_path):
    weights = draw()
    path, output = tmp_path / "theirs.pth.tar", tmp_path / "ours.pth"
    torch.save({"epoch": 255, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    assert authors.main([str(path), str(output)]) == 0
    saved = torch.load(output, weights_only=True)
    student = build_student(json.loads(saved["meta"]["mmcls_bnn"]["model"]))
    student.load_state_dict(saved["state_dict"])
    # In float64, whose rounding is far from turning the sign of any activation.
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = reference({name: value.double() for name, value in weights.items()}, images)
        torch.testing.assert_close(student.double()(images, mode="tensor"), expected, rtol=1e-9, atol=1e-9)
    packed = tmp_path / "packed.safetensors"
    assert export.main([str(output), str(packed)]) == 0
    assert isinstance(load_packed(packed), nn.Module)


def test_other_weights_are_refused_in_one_line(tmp_path, capsys):
    weights, slope = resnet18(), "layer4.3.prelu.weight"
    for changed, words in (
        ({"fc.weight": torch.zeros(10, 4)}, "no weights of a ReActNet of its authors"),
        ({**weights, "fc.weight": torch.zeros(1000)}, "no weights of a ReActNet of its authors"),
        ({**weights, "layer1.0.conv2.weight": torch.zeros(1)}, "'layer1.0.conv2.weight' does not fit"),
        ({**weights, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "'conv1.weight' does not fit"),
        (
            {k: v for k, v in weights.items() if k != slope},
            "no 'backbone.blocks.15.activation",
        ),
    ):
        torch.save(changed, tmp_path / "theirs.pth")
        assert authors.main([str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert not (tmp_path / "ours.pth").exists()
