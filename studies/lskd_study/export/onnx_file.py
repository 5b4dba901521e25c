"""A network as ONNX, written by torch's exporter and checked by onnxruntime."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lskd import LskdError
from lskd.errors import one_line
from lskd.teachers.outputs import logits_of
from lskd_study.trainers.trainer import quiet

TOLERANCE = 1e-4  # of the logits' spread, the largest less the smallest


class OnnxError(LskdError):
    """A network that has no ONNX, or another one; the command's status is then 1."""

    status = 1


class _Logits(nn.Module):
    """A classifier whose first output counts, where it has several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def write_onnx(model: nn.Module, images: Tensor, path: Path, name: str, any_size: bool = False) -> float:
    """Write a classifier as ONNX and compare its logits by onnxruntime with the classifier's own.

    The batch is free: it is traced with all images and tried with one of them as well.

    Args:
        model: from images to logits, in evaluation mode on the CPU.
        images: `(B, C, H, W)`, B >= 2.
        name: what the network is called in messages.
        any_size: height and width are free too; images of half of them are tried.

    Returns:
        The largest difference, as a part of the logits' spread.

    Raises:
        OnnxError: there is no ONNX of it, or its logits differ by more than `TOLERANCE` of their spread.
    """
    import onnxruntime

    classifier, fix = _Logits(model).eval(), "add --no-onnx to export it without"
    free = torch.export.Dim.DYNAMIC
    tried = [images, images[:1]]
    if any_size:
        tried.append(images[..., : images.shape[2] // 2, : images.shape[3] // 2].contiguous())
    try:
        with quiet(), torch.no_grad():
            own = [classifier(some) for some in tried]
            program = torch.onnx.export(
                classifier,
                (images,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=(dict.fromkeys((0, 2, 3) if any_size else (0,), free),),
                dynamo=True,
            )
            assert program is not None
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # stack traces, with the paths of this machine
            program.save(path, external_data=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(session.run(None, {"images": some.numpy()})[0]) for some in tried]
    except Exception as error:  # the exporter and the runtime have no exceptions of one kind
        raise OnnxError(f"{name} cannot be exported to ONNX ({one_line(error)}); {fix}") from None
    apart = [float((a - b).abs().max() / (b.max() - b.min())) for a, b in zip(found, own, strict=True)]
    worst = next((part for part in apart if not part <= TOLERANCE), None)
    if worst is not None:
        raise OnnxError(f"{name} as ONNX gives other logits, by {worst:.3g} of their spread; {fix}")
    return max(apart)
