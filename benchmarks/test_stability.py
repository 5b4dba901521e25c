"""What it costs to measure a teacher: beside its evaluation, and from a file of logits."""

import numpy as np
import timm
import torch
from torchmetrics import MetricCollection

from lskd import Stability, measure_teacher
from lskd_study.teachers.outputs import read_outputs

DEFINITIONS = ("target_std", "vector_l2", "between_vector_l2", "between_target_std")


def test_metrics_beside_an_evaluation(ratio):
    """A ResNet-18 over images of 224 px with the four stabilities, against without."""
    model = timm.create_model("resnet18", pretrained=False).eval()
    images = [torch.randn(8, 3, 224, 224) for _ in range(4)]
    labels = [torch.randint(1000, (8,)) for _ in images]

    def evaluate(metrics: MetricCollection | None) -> None:
        with torch.inference_mode():
            for batch, ids in zip(images, labels, strict=True):
                logits = model(batch)
                if metrics is not None:
                    metrics.update(logits, ids)

    def ours() -> None:
        evaluate(MetricCollection({name: Stability(1000, name) for name in DEFINITIONS}))

    ratio(
        "ResNet-18 evaluation at 224 px with the four stabilities / without",
        ours,
        lambda: evaluate(None),
        bar=1.02,
        rounds=9,
    )


def test_file_of_logits(ratio, tmp_path):
    """Everything `lskd stability` says of one teacher, against NumPy reading it and taking one softmax."""
    file, labels = tmp_path / "logits.npz", np.repeat(np.arange(1000), 50)
    logits = np.random.default_rng(0).standard_normal((50_000, 1000), dtype=np.float32)
    logits[np.arange(len(labels)), labels] += 4
    np.savez(file, logits=logits, labels=labels)

    def ours() -> None:
        outputs = read_outputs(file)
        assert outputs.logits is not None
        measures = measure_teacher(outputs.logits, outputs.labels)
        for name in DEFINITIONS:
            measures.one_minus_stability(name)  # type: ignore[arg-type]
        _ = measures.topk(1), measures.topk(5), measures.calibration_error, measures.calibrated_error

    def peer() -> None:
        with np.load(file) as arrays:
            logits, _ = arrays["logits"], arrays["labels"]
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        _ = exponentials / exponentials.sum(1, keepdims=True)

    ratio(
        "50,000 x 1,000 logits from a file, all measures / NumPy's reading and one softmax",
        ours,
        peer,
        bar=1.5,
        rounds=9,
    )
