"""Logits and labels that do not fit each other, or their classes: refused alike by all that measure them."""

import pytest
import torch

from lskd import Stability, fit_temperature, measure_teacher
from lskd.analysis.classes import class_mean_probabilities, class_separation

pytestmark = pytest.mark.unit
MEASURES = {
    "stability": lambda logits, labels: Stability(3)(logits, labels),
    "class means": lambda logits, labels: class_mean_probabilities(logits, labels, 3),
    "separation": lambda logits, labels: class_separation(logits, labels, [(0, 1)]),
    "measures": measure_teacher,
    "temperature": fit_temperature,
}
NEVER_FIT = [
    (torch.zeros(4, 3), torch.zeros(3).long()),
    (torch.zeros(4, 3), torch.zeros(4, 1).long()),
    (torch.zeros(3), torch.zeros(1).long()),
    (torch.zeros(3), torch.zeros(3).long()),
    (torch.zeros(2, 2, 3), torch.zeros(2, 2).long()),
    (torch.zeros(4, 3).long(), torch.zeros(4).long()),
    (torch.zeros(4, 3).to(torch.complex64), torch.zeros(4).long()),
    (torch.zeros(4, 3), torch.zeros(4)),
    (torch.zeros(4, 3), torch.zeros(4).bool()),
]
CASES = [(name, *case) for name in MEASURES for case in NEVER_FIT]
CASES += [(name, torch.zeros(4, 2), torch.zeros(4).long()) for name in ("stability", "class means")]
CASES += [(name, torch.zeros(0, 3), torch.zeros(0).long()) for name in ("measures", "temperature")]


@pytest.mark.parametrize(("name", "logits", "labels"), CASES)
def test_shapes_and_dtypes(name, logits, labels):
    with pytest.raises(ValueError, match=r"shape|dtype"):
        MEASURES[name](logits, labels)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("wrong", [-1, 3, -100])
def test_labels_out_of_range_are_named_by_sample(name, wrong):
    logits, labels = torch.zeros(20, 3), torch.arange(20) % 3
    labels[13] = wrong
    with pytest.raises(ValueError, match=rf"labels\[13\] is {wrong};"):
        MEASURES[name](logits, labels)
