"""The distillation loss on the validation set: Fig. 6's curve of the test loss."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from lskd import LskdError
from mmcls_bnn.compat import METRICS

# No "loss" in a name: mmengine would show such a number averaged over the last ten validations.
NAMES = ("cross_entropy", "kl", "teacher_entropy", "agreement")


@METRICS.register_module()
class DistillationMetric(BaseMetric):
    """Means over the validation samples of cross-entropy, KL and teacher entropy (nats), and of agreement.

    Reported as `distillation/cross_entropy` and so on, at the temperature of the training loss.
    """

    default_prefix = "distillation"

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the terms that `LsKdClassifier.predict` put into each sample.

        Raises:
            LskdError: where there are none: the model is no LsKdClassifier, or it is tested without training.
        """
        for sample in data_samples:
            if "distillation" not in sample:
                raise LskdError(
                    "DistillationMetric found no teacher: it works in val_evaluator of a run that trains an "
                    "LsKdClassifier; take it out of test_evaluator."
                )
            self.results.append(sample["distillation"].cpu())

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Return the means; nothing in a run whose teacher's words are read from a store."""
        means = torch.stack(results).double().mean(0).tolist()
        if all(math.isnan(mean) for mean in means):
            return {}
        return dict(zip(NAMES, means, strict=True))
