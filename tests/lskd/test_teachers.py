"""Top-K of logits, ensembles, and selective distillation."""

import numpy as np
import pytest
import torch
from scipy import special

from lskd import DistillationLoss, TopK, distillation_terms, ensemble_logits
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import stored_form
from lskd.terms import centred, selective_weight, top_k_log_probabilities

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_of_everything_sums_to_one_and_is_sorted(dtype):
    logits = torch.randn(5, 3, 11).to(dtype)
    values, ids = top_k_log_probabilities(logits, 11)
    np.testing.assert_allclose(values.exp().sum(-1), 1, rtol=1e-6)
    expected = special.log_softmax(logits.double().numpy(), -1)
    np.testing.assert_allclose(values, np.sort(expected, -1)[..., ::-1], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, ids.numpy(), -1), values, rtol=1e-5)


@pytest.mark.parametrize("k", [0, 12])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="1 to 11"):
        top_k_log_probabilities(torch.zeros(2, 11), k)


def test_stored_log_probabilities_are_as_good_as_logits():
    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    values, ids = top_k_log_probabilities(teacher, 4)
    of_logits = TopK(*teacher.topk(4, -1))
    for t in (0.6, 1.0, 3.0):
        loss = DistillationLoss(temperature=t)
        torch.testing.assert_close(loss(student, TopK(values, ids)), loss(student, of_logits))


def test_ensemble_is_the_mean_of_probabilities():
    members = [torch.randn(4, 7) for _ in range(3)]
    expected = np.mean([special.softmax(member.double().numpy(), -1) for member in members], 0)
    np.testing.assert_allclose(ensemble_logits(members).exp(), expected, rtol=1e-5)
    assert ensemble_logits(members[:1]) is members[0]
    with pytest.raises(ValueError, match="at least one"):
        ensemble_logits([])


@pytest.mark.parametrize(
    ("schedule", "student", "expected"),
    [
        ("fixed", 99.0, 0.9),
        ("threshold", None, 0.9),
        ("threshold", 30.99, 0.9),
        ("threshold", 31.0, 0.0),
        ("adaptive", None, 0.9),
        ("adaptive", 20.0, 0.9),
        ("adaptive", 28.0, 0.9),
        ("adaptive", 29.0, 0.45),
        ("adaptive", 30.0, 0.225),
        ("adaptive", 32.0, 0.9 / 16),
    ],
)
def test_selective_weight(schedule, student, expected):
    assert selective_weight(0.9, schedule, student, 30.0) == pytest.approx(expected)


def test_selective_weight_refuses():
    with pytest.raises(ValueError, match="needs the teacher's BLEU"):
        selective_weight(0.9, "adaptive", 1.0, None)
    with pytest.raises(ValueError, match="schedule is 'cosine'"):
        selective_weight(0.9, "cosine", 1.0, 2.0)


def test_a_float64_teacher_is_rounded_after_its_offset_is_gone():
    """In every place where float64 becomes a narrower dtype: losses, ensembles, what is stored."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 11, generator=generator, dtype=torch.float64)
    student = torch.randn(6, 11, generator=generator)
    shifted = teacher + 1e6
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(
        DistillationLoss()(student, shifted), DistillationLoss()(student, teacher), **close
    )
    torch.testing.assert_close(
        distillation_terms(student, shifted), distillation_terms(student, teacher), **close
    )
    for given in (DistillationLoss(), lambda *logits: distillation_terms(*logits).kl):
        known = [given(student, TopK(*z.topk(4, -1))) for z in (shifted, teacher)]
        torch.testing.assert_close(*known, **close)
    torch.testing.assert_close(ensemble_logits([shifted] * 2), ensemble_logits([teacher] * 2), **close)
    for k, values in ((11, "float32"), (11, "float16"), (4, "float16")):
        layout = SoftLabelsLayout(11, k, 6, values=values)
        stored = [stored_form(z, layout)[0].log_softmax(-1) for z in (shifted, teacher)]
        torch.testing.assert_close(*stored, **(close if values == "float32" else {"rtol": 0, "atol": 2e-3}))


@pytest.mark.parametrize("offset", [0.0, 40.0, -3e3, 1e6])
@pytest.mark.parametrize("spread", [1e-3, 2.0])
def test_centred_logits_in_float16_keep_every_first_place(offset, spread):
    """A thousand classes: at the top steps are those of float32, further down those of float16."""
    logits = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0)).mul(spread) + offset
    stored = centred(logits).half().float()
    assert torch.equal(stored.argmax(-1), logits.argmax(-1))
    assert torch.equal((stored == 0).sum(-1), (logits == logits.amax(-1, keepdim=True)).sum(-1))
    exact = centred(logits.double())
    assert bool(((stored - exact).abs() <= exact.abs() * 2**-11 + 2**-25).all())
