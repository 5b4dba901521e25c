"""Settings for every test."""

import os

import pytest

# Before torch is imported anywhere, and inherited by every subprocess.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def without_float64(monkeypatch):
    """A context that treats the processor as a device without float64, as Apple's MPS is one.

    ``lskd`` believes it of the processor for the whole test; within the context every operation that would
    make such a tensor raises.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from lskd import _devices

    class WithoutFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                    raise TypeError(f"this device has no float64, asked for by {function}")
            return result

    monkeypatch.setattr(_devices, "_WITHOUT_FLOAT64", {"cpu"})
    return WithoutFloat64
