"""The loss of a teacher that is trained with mmcls: cross-entropy with smoothed labels."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lskd import Convention, smooth_targets
from lskd.targets import smooth_probabilities
from mmcls_bnn.compat import MODELS


@MODELS.register_module()
class SmoothedCrossEntropy(nn.Module):
    """Cross-entropy with labels smoothed in either convention (mmcls' own has "uniform" alone).

    Args:
        alpha: smoothing; 0 is plain cross-entropy.
        convention: see :data:`lskd.Convention`.
        loss_weight: factor of the loss.
    """

    def __init__(
        self, alpha: float = 0.0, convention: Convention = "paper", loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.alpha, self.convention, self.loss_weight = alpha, convention, loss_weight

    def forward(self, cls_score: Tensor, target: Tensor, avg_factor: float | None = None, **_: Any) -> Tensor:
        """Return the loss, a scalar in nats.

        Args:
            cls_score: logits `(B, K)`.
            target: labels `(B,)`, or one-hot or mixed ones `(B, K)`; smoothed here.
            avg_factor: the sum over the batch is divided by this; None: by B.
        """
        if target.ndim == 2:
            target = smooth_probabilities(target, self.alpha, self.convention)
        else:
            target = smooth_targets(target, cls_score.shape[-1], self.alpha, self.convention)
        total = functional.cross_entropy(cls_score.float(), target, reduction="sum")
        return self.loss_weight * total / (avg_factor or cls_score.shape[0])
