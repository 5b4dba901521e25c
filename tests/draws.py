"""Logits, labels and teachers that follow from a seed, for the tests of what is computed from them."""

import pytest
import torch
from hypothesis import settings

from lskd import TopK

DEFINITIONS = ("target_std", "vector_l2", "between_vector_l2", "between_target_std")
every_definition = pytest.mark.parametrize("definition", DEFINITIONS)
PROPERTY = settings(deadline=None, max_examples=80, derandomize=True, database=None)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return logits.clamp(-1e4, 1e4).to(dtype)


def draw_samples(samples, num_classes, seed=0, scale=2.0, dtype=torch.float32, lead=0.0):
    """Return logits and labels; the label's logit is larger by ``lead`` times the scale."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, num_classes, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(num_classes, (samples,), generator=generator)
    logits[torch.arange(samples), labels] += lead * scale
    return logits.to(dtype), labels


def top_k(teacher, k, rest, dtype=torch.float64):
    values = teacher.log_softmax(-1) if rest in ("spread", "lump") else teacher
    values, ids = values.topk(k, dim=-1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))  # the order must not matter
    return TopK(values[..., order].to(dtype), ids[..., order], rest)
