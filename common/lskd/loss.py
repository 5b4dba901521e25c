"""The distillation loss of Shen et al. (ICLR 2021), Eq. 4, as a module."""

from torch import Tensor, nn

from lskd.kernel.chunks import Implementation
from lskd.kernel.fused import LossComponents, fused_distillation
from lskd.targets import Convention, check_smoothing, check_temperature
from lskd.terms import TopK


class DistillationLoss(nn.Module):
    """The paper's distillation loss; as it stands soft labels only, temperature 1, mean over the batch.

    ``hard_weight * H(y, p_student) + (1 - hard_weight) * H(p_teacher / T, p_student / T)`` (Sec. 2, where the
    paper writes the arguments the other way round); ``y`` are the hard labels, smoothed by ``alpha``. The
    soft part is the cross-entropy of Eq. 4, which has the gradients of the KL divergence.

    Args:
        temperature: ``T``, divides both logits in the soft part.
        temperature_squared: multiply the soft part by ``T^2`` (Hinton et al., 2015), which keeps the size
            of its gradients when ``T`` changes.
        hard_weight: the paper's lambda, 0 to 1: the weight of the hard labels.
        alpha: smoothing of integer hard labels. It is 0 unless asked for.
        convention: how ``alpha`` is meant, see :data:`lskd.Convention`.
        impl: what computes it, see :data:`lskd.kernel.chunks.Implementation`.

    It runs on :func:`lskd.fused_distillation`, whose gradient is ready when forward ends. For terms by sample
    and second derivatives there is :func:`lskd.distillation_terms`.

    Raises:
        ValueError: for arguments out of range.

    >>> import torch
    >>> loss = DistillationLoss()
    >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    >>> round(float(loss(torch.zeros(2, 3), teacher)), 4)
    1.0986
    """

    def __init__(
        self,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        hard_weight: float = 0.0,
        alpha: float = 0.0,
        convention: Convention = "paper",
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_smoothing(2, alpha, convention)
        if not 0 <= hard_weight <= 1:
            raise ValueError(f"hard_weight is {hard_weight}; the weight of the hard labels is 0 to 1")
        self.temperature = temperature
        self.temperature_squared = temperature_squared
        self.hard_weight = hard_weight
        self.alpha = alpha
        self.convention = convention
        self.impl: Implementation = impl

    def forward(
        self,
        student_logits: Tensor,
        teacher: Tensor | TopK,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar in nats. Arguments as in :meth:`components`."""
        return self.components(student_logits, teacher, labels, mask).loss

    def components(
        self,
        student_logits: Tensor,
        teacher: Tensor | TopK,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LossComponents:
        """Return the loss and what it is made of, means over the samples that count.

        Args:
            student_logits: ``(..., K)``.
            teacher: logits ``(..., K)``, or a :class:`TopK`.
            labels: integer ids ``(...)``, smoothed here; or probabilities ``(..., K)`` (of mixup, say), taken
                as they are. Needed when ``hard_weight > 0``; otherwise only for the log.
            mask: bool ``(...)``, true where a sample counts (not padding). The mean is over these;
                with none left everything is 0. What is outside the mask, labels and logits, may be anything.

        Raises:
            ValueError: for shapes or dtypes that do not fit, or missing labels.

        >>> import torch
        >>> parts = DistillationLoss().components(torch.zeros(1, 2), torch.tensor([[0.0, 0.0]]))
        >>> round(float(parts.cross_entropy), 4), float(parts.kl), round(float(parts.teacher_entropy), 4)
        (0.6931, 0.0, 0.6931)
        """
        return fused_distillation(
            student_logits,
            teacher,
            labels,
            mask,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            hard_weight=self.hard_weight,
            alpha=self.alpha,
            convention=self.convention,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Show the settings in ``repr``."""
        return (
            f"temperature={self.temperature}, temperature_squared={self.temperature_squared}, "
            f"hard_weight={self.hard_weight}, alpha={self.alpha}, convention={self.convention!r}"
        )
