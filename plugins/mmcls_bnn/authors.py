"""`python -m mmcls_bnn.authors THEIRS.pth ours.pth`: weights of ReActNet's authors as a checkpoint of ours.

Their files (https://github.com/liuzechun/ReActNet, step 2) are of ReActNet-18, ReActNet-34 or ReActNet-A.
A weight or a shifted activation that is exactly 0 has no sign there and is +1 here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lskd import CheckpointError, load_teacher_weights
from lskd.base.files import whole_file
from lskd.errors import ShownParser
from mmcls_bnn.binary.packed import build_student
from mmcls_bnn.binary.reactnet import BINARIZED, DEPTHS
from mmcls_bnn.recipe import run

# Their name within a block, and ours.
_RESNET = {
    "move0.bias": "sign.bias",
    "binary_conv.weights?": "conv.weight",
    "bn1": "norm",
    "move1.bias": "activation.bias_before",
    "prelu.weight": "activation.slope",
    "move2.bias": "activation.bias_after",
    "downsample.1": "shortcut.conv",
    "downsample.2": "shortcut.norm",
}
_MOBILENET = {
    "move11.bias": "sign1.bias",
    "binary_3x3.weights?": "conv1.weight",
    "bn1": "norm1",
    "move12.bias": "activation1.bias_before",
    "prelu1.weight": "activation1.slope",
    "move13.bias": "activation1.bias_after",
    "move21.bias": "sign2.bias",
    "binary_pw(_down1)?.weights?": "conv2.0.weight",
    "binary_pw_down2.weights?": "conv2.1.weight",
    "bn2(_1)?": "norm2.0",
    "bn2_2": "norm2.1",
    "move22.bias": "activation2.bias_before",
    "prelu2.weight": "activation2.slope",
    "move23.bias": "activation2.bias_after",
}
_OUTSIDE = {
    r"(feature\.0\.)?conv1": "backbone.stem.conv",
    r"(feature\.0\.)?bn1": "backbone.stem.norm",
    "fc": "head.fc",
}
# Of ImageNet's images, with which they were trained.
_IMAGES = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
_REFUSED = "these are no weights of a ReActNet of its authors"


def convert(theirs: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description of a student and its state dict, from the authors' state dict.

    Raises:
        CheckpointError: for weights of another network.
    """
    mobile = any(name.startswith("feature.") for name in theirs)
    found = (re.fullmatch(r"layer(\d+)\.(\d+)\..*", name) for name in theirs)
    positions = sorted({(int(match[1]), int(match[2])) for match in found if match})
    depths = {sum(counts): depth for depth, counts in DEPTHS.items()}
    last = theirs.get("fc.weight")
    if last is None or last.ndim != 2 or not (mobile or len(positions) in depths):
        raise CheckpointError(f"{_REFUSED}.")
    backbone = {"type": "ReActNetA"} if mobile else {"type": "ReActNet", "depth": depths[len(positions)]}
    classes, channels = last.shape
    description = {
        "type": "ImageClassifier",
        "backbone": backbone | {"binarize": list(BINARIZED)},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": classes, "in_channels": channels},
        "data_preprocessor": _IMAGES,
    }
    ours = build_student(description).state_dict()
    left = set(ours) - {name for name in ours if name.endswith("num_batches_tracked")}
    for name, value in theirs.items():
        own = _own_name(name, mobile, positions)
        if own not in ours or ours[own].numel() != value.numel():
            raise CheckpointError(f"{_REFUSED}: '{name}' does not fit.")
        ours[own] = value.reshape(ours[own].shape).to(ours[own].dtype)
        left.discard(own)
    if left:
        raise CheckpointError(f"{_REFUSED}: no '{min(left)}'.")
    return description, ours


def _own_name(name: str, mobile: bool, positions: list[tuple[int, int]]) -> str | None:
    """Return our name of a tensor of theirs; None for one of another network."""
    index, rest, table, prefix = None, name, _OUTSIDE, ""
    if mobile and (match := re.fullmatch(r"feature\.([1-9]\d*)\.(.*)", name)):
        index, rest, table = int(match[1]) - 1, match[2], _MOBILENET
    elif not mobile and (match := re.fullmatch(r"layer(\d+)\.(\d+)\.(.*)", name)):
        index, rest, table = positions.index((int(match[1]), int(match[2]))), match[3], _RESNET
    if index is not None:
        prefix = f"backbone.blocks.{index}."
    for pattern, own in table.items():
        if match := re.fullmatch(rf"({pattern})(\.\w+)?", rest):
            return prefix + own + (match[match.re.groups] or "")
    return None


def save_converted(path: str, output: Path) -> str:
    """Write the authors' file `path` as a checkpoint that mmcls, `export` and recipes read; say what it is.

    Raises:
        LskdError: for a file that cannot be read or written, or of another network.
    """
    description, weights = convert(load_teacher_weights(path))
    note = {"binarize": description["backbone"]["binarize"], "model": json.dumps(description)}
    with whole_file(output) as scratch, scratch.open("wb") as file:
        torch.save({"state_dict": weights, "meta": {"mmcls_bnn": note}}, file)
    backbone = description["backbone"]
    kind = "ReActNet-A" if backbone["type"] == "ReActNetA" else f"ReActNet-{backbone['depth']}"
    return f"{output}: {kind}, {description['head']['num_classes']} classes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = ShownParser(prog="python -m mmcls_bnn.authors", description=__doc__)
    parser.add_argument("theirs", help="checkpoint that the authors published")
    parser.add_argument("output", type=Path, help="checkpoint to write, .pth")
    given = parser.parse_args(arguments)
    return run(lambda: save_converted(given.theirs, given.output))


if __name__ == "__main__":
    raise SystemExit(main())
