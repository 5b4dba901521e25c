"""Whether a run is still finite."""

import math

import pytest
import torch

from lskd import DivergedError
from lskd.base.tensors import require_finite, require_finite_weights

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_a_number_is_named_with_its_epoch(bad: float) -> None:
    with pytest.raises(DivergedError, match=r"epoch 3: the validation loss is -?(nan|inf); the run diverged"):
        require_finite("the validation loss", bad, epoch=3)


def test_tensors() -> None:
    values = torch.zeros(4, 5)
    require_finite("the logits", values)
    values[3, 4] = math.nan
    with pytest.raises(DivergedError, match="the logits are not all finite numbers"):
        require_finite("the logits", values)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int32])
def test_dtypes_without_a_smallest_number(dtype: torch.dtype) -> None:
    require_finite("the logits", torch.ones(3, 2).to(dtype))
    require_finite("the logits", torch.ones(0, 2).to(dtype))
    if dtype.is_floating_point or dtype.is_complex:
        with pytest.raises(DivergedError, match="the logits are not all finite numbers"):
            require_finite("the logits", torch.tensor([1.0, math.nan]).to(dtype))


def test_weights_are_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    require_finite_weights(model.state_dict().items())
    model[1].running_var[0] = math.inf
    with pytest.raises(DivergedError, match=r"epoch 0: the weights 1\.running_var"):
        require_finite_weights(model.state_dict().items(), epoch=0)
