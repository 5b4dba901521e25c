"""Fidelity: how closely a student follows its teacher on samples that neither was trained on.

One of the two measures of Stanton et al. (NeurIPS 2021, "Does Knowledge Distillation Really Work?"); the
other is how often both give the same class. Neither needs labels, and a faithful student errs as its teacher.
"""

import numpy as np
import torch

from lskd.analysis.by_sample import Array, Softmax


def between(teacher: Softmax, student: Softmax) -> Array:
    """Return ``KL(teacher || student)`` of each sample of a block in nats, ``(n,)``, not negative (Eq. 3)."""
    further = torch.linalg.vecdot(teacher.probabilities, teacher.logits - student.logits)
    kl = further + (teacher.log_largest - student.log_largest)
    return np.asarray(kl.clamp_(min=0))  # equal rows differ by rounding
