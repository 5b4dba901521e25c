"""Logits and teachers that follow from a seed, for the tests of the loss and its terms."""

import torch
from hypothesis import settings

from lskd import TopK

PROPERTY = settings(deadline=None, max_examples=80, derandomize=True, database=None)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return logits.clamp(-1e4, 1e4).to(dtype)


def top_k(teacher, k, rest, dtype=torch.float64):
    values = teacher.log_softmax(-1) if rest == "spread" else teacher
    values, ids = values.topk(k, dim=-1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))  # the order must not matter
    return TopK(values[..., order].to(dtype), ids[..., order], rest)
