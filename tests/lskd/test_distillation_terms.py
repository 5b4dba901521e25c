import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from draws import PROPERTY, draw, top_k
from lskd import DistillationLoss, TopK, distillation_terms
from lskd.terms import (
    Divergence,
    Rest,
    centred,
    divergence,
    sampled_log_probabilities,
    top_k_log_probabilities,
)

pytestmark = pytest.mark.unit

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("cross_entropy", "kl", "teacher_entropy")
SHAPES = st.lists(st.integers(0, 3), max_size=3)


def arrays(*tensors):
    return tuple(tensor.detach().double().numpy() for tensor in tensors)


def assert_terms(terms, expected, dtype, size=1.0):
    """Compare with the reference; ``size`` is that of the logits over the temperature."""
    eps = 1e-13 if dtype == torch.float64 else 5e-7
    for name, ours, theirs in zip(NAMES, terms, expected, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        np.testing.assert_allclose(
            ours.detach().numpy(), theirs, rtol=20 * eps, atol=20 * eps * max(size, 1.0), err_msg=name
        )


# The three terms


@PROPERTY
@given(
    shape=SHAPES,
    num_classes=st.integers(1, 30),
    temperature=st.sampled_from([0.05, 0.5, 1.0, 2.0, 4.0, 64.0]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_terms_are_the_definition(reference, shape, num_classes, temperature, scale, dtype, seed):
    student = draw(*shape, num_classes, seed=seed, scale=scale, dtype=dtype)
    teacher = draw(*shape, num_classes, seed=seed + 100, scale=scale, dtype=dtype)
    terms = distillation_terms(student, teacher, temperature)
    assert all(term.shape == tuple(shape) for term in terms)
    size = 5 * scale / temperature
    assert_terms(terms, reference.terms(*arrays(student, teacher), temperature), dtype, size)


@PROPERTY
@given(
    num_classes=st.integers(1, 20),
    temperature=st.floats(0.1, 20),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e4]),
)
def test_invariants_of_the_terms(num_classes, temperature, dtype, scale):
    student = draw(7, num_classes, scale=scale, dtype=dtype)
    teacher = draw(7, num_classes, seed=1, scale=scale, dtype=dtype)
    terms = distillation_terms(student, teacher, temperature)
    torch.testing.assert_close(
        terms.cross_entropy - terms.kl, terms.teacher_entropy, rtol=1e-5, atol=1e-6 * scale / temperature
    )
    assert (terms.teacher_entropy >= 0).all()
    assert (terms.teacher_entropy <= math.log(num_classes) + 1e-6).all()
    assert (terms.kl >= -1e-6).all()
    same = distillation_terms(teacher, teacher, temperature)
    assert (same.kl == 0).all()
    assert torch.equal(same.cross_entropy, same.teacher_entropy)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_masked_classes_have_no_part(reference, temperature):
    """Logits of -inf in both, or in the teacher alone, count for nothing and leave finite gradients."""
    student, teacher = draw(5, 6), draw(5, 6, seed=1)
    teacher[:, [1, 4]] = -math.inf
    student[:, 4] = -math.inf
    student.requires_grad_()
    terms = distillation_terms(student, teacher, temperature)
    assert_terms(terms, reference.terms(*arrays(student, teacher), temperature), torch.float64)
    (terms.cross_entropy + terms.kl).sum().backward()
    assert student.grad.isfinite().all()
    assert (student.grad[:, 4] == 0).all()


def test_student_that_excludes_a_class_of_the_teacher_pays_infinitely():
    terms = distillation_terms(torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2))
    assert terms.cross_entropy.item() == math.inf
    assert terms.kl.item() == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_is_never_hidden(bad, who):
    """A loss of 0 for a teacher that has overflowed would look like success."""
    logits = {"student": draw(2, 4), "teacher": draw(2, 4, seed=1)}
    logits[who][0, 0] = bad
    terms = distillation_terms(logits["student"], logits["teacher"])
    assert terms.cross_entropy[0].isnan()
    assert terms.kl[0].isnan()
    assert terms.cross_entropy[1].isfinite()
    assert DistillationLoss()(logits["student"], logits["teacher"]).isnan()


def test_teacher_may_have_another_dtype():
    student, teacher = draw(3, 5, dtype=torch.float32), draw(3, 5, seed=1)
    expected = distillation_terms(student, teacher.float())
    torch.testing.assert_close(distillation_terms(student, teacher), expected)


# Other divergences


def by_definition(kind, student, teacher, temperature):
    """Return a divergence in float64 and its gradient by the student's logits, worked out by hand.

    ``dD/dq_i`` less what is the same for all classes is ``log(q_i / p_i)`` and ``log(q_i / m_i) / 2``.
    """
    p, q = (special.softmax(z / temperature, axis=-1) for z in (teacher, student))
    if kind == "forward":
        return special.rel_entr(p, q).sum(-1), (q - p) / temperature
    m = p if kind == "reverse" else (p + q) / 2
    value = special.rel_entr(q, m).sum(-1)
    ratio = np.log(np.where(q > 0, q, 1.0)) - np.log(np.where(q > 0, m, 1.0))
    gradient = q * (ratio - value[..., None]) / temperature
    if kind == "jsd":
        value, gradient = (value + special.rel_entr(p, m).sum(-1)) / 2, gradient / 2
    return value, gradient


@PROPERTY
@given(
    kind=st.sampled_from(get_args(Divergence)),
    shape=SHAPES,
    num_classes=st.integers(1, 30),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_divergences_and_gradients_are_the_definition(
    kind, shape, num_classes, temperature, scale, dtype, seed
):
    student = draw(*shape, num_classes, seed=seed, scale=scale, dtype=dtype).requires_grad_()
    teacher = draw(*shape, num_classes, seed=seed + 100, scale=scale, dtype=dtype)
    value, gradient = by_definition(kind, *arrays(student, teacher), temperature)
    ours = divergence(student, teacher, kind, temperature)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ours.sum().backward()
    exact = 1e-9 if dtype == torch.float64 else 2e-5 * max(scale, 1.0)
    np.testing.assert_allclose(ours.detach().numpy(), value, rtol=exact, atol=exact)
    rounded = exact + torch.finfo(dtype).eps * float(np.abs(gradient).max(initial=0.0))
    np.testing.assert_allclose(student.grad.double().numpy(), gradient, atol=rounded)
    if kind == "jsd":
        assert (ours <= math.log(2) + 1e-6).all()


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_divergences_of_masked_classes(kind):
    """Logits of -inf in both count for nothing; a class that the teacher excludes costs what it says."""
    student, teacher = draw(5, 6), draw(5, 6, seed=1)
    student[:, 4] = teacher[:, 4] = -math.inf
    student.requires_grad_()
    value, gradient = by_definition(kind, *arrays(student, teacher), 1.0)
    ours = divergence(student, teacher, kind)
    ours.sum().backward()
    np.testing.assert_allclose(ours.detach().numpy(), value, rtol=1e-9)
    np.testing.assert_allclose(student.grad.numpy(), gradient, atol=1e-9)
    teacher[0, 1] = -math.inf
    assert divergence(student, teacher, kind)[0].isfinite() == (kind != "reverse")
    teacher[0, 1] = math.nan
    assert divergence(student, teacher, kind)[0].isnan()


def test_a_divergence_that_does_not_exist():
    with pytest.raises(ValueError, match="kind is 'hellinger'"):
        divergence(draw(2, 3), draw(2, 3), "hellinger")
    with pytest.raises(ValueError, match="same samples"):
        divergence(draw(2, 3), draw(2, 4), "jsd")
    with pytest.raises(ValueError, match="temperature is 0"):
        divergence(draw(2, 3), draw(2, 3), "jsd", 0.0)


# A teacher of which the largest k are known


@PROPERTY
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 3), max_size=2),
    num_classes=st.integers(1, 12),
    rest=st.sampled_from(get_args(Rest)),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    scale=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_top_k_is_the_completed_distribution(
    reference, data, shape, num_classes, rest, temperature, scale, seed
):
    k = data.draw(st.integers(1, num_classes))
    student = draw(*shape, num_classes, seed=seed, scale=scale)
    teacher = top_k(draw(*shape, num_classes, seed=seed + 1, scale=scale), k, rest)
    expected = reference.top_k_terms(
        student.numpy(), teacher.values.numpy(), teacher.ids.numpy(), rest, temperature
    )
    terms = distillation_terms(student, teacher, temperature)
    for name, ours, theirs in zip(NAMES, terms, expected, strict=True):
        assert ours.shape == tuple(shape)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", get_args(Rest))
def test_top_k_of_extreme_logits(reference, rest, dtype):
    student = draw(6, 50, scale=1e4, dtype=dtype).requires_grad_()
    teacher = top_k(draw(6, 50, seed=1, scale=1e4), 5, rest, dtype)
    terms = distillation_terms(student, teacher, 2.0)
    expected = reference.top_k_terms(*arrays(student, teacher.values), teacher.ids.numpy(), rest, 2.0)
    assert_terms(terms, expected, dtype, size=1e4)
    terms.cross_entropy.sum().backward()
    assert student.grad.isfinite().all()


def test_small_rest_survives_a_high_temperature(reference):
    """A rest of 2e-8, below float32's resolution beside 1, has a fifth of the mass at T = 4."""
    values = torch.tensor([[-3e-8, math.log(1e-8)]])
    ids = torch.tensor([[3, 7]])
    student = draw(1, 1000, dtype=torch.float32)
    completed = reference.completed(*arrays(values), ids.numpy(), 1000, "spread", 4.0)
    expected = reference.terms_of(completed, reference.log_probabilities(*arrays(student), 4.0))
    assert_terms(distillation_terms(student, TopK(values, ids, "spread"), 4.0), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probabilities_kept_in_half_precision_are_taken(dtype):
    """Rounding alone brings a sum of 205 / 206 to 1.0106 in bfloat16."""
    values = torch.full((1, 205), -math.log(206)).to(dtype)
    terms = distillation_terms(torch.zeros(1, 206), TopK(values, torch.arange(205).unsqueeze(0), "spread"))
    assert terms.cross_entropy.item() == pytest.approx(math.log(206), rel=1e-4)


def test_logits_given_to_spread_are_refused():
    with pytest.raises(ValueError, match="log-probabilities"):
        distillation_terms(draw(2, 5), TopK(torch.ones(2, 3), torch.arange(3).repeat(2, 1), "spread"))
    values = torch.tensor([[0.5, 0.2], [0.6, 0.5]]).log()  # of one row alone, and by little
    with pytest.raises(ValueError, match=r"a probability of 1\.1;"):
        distillation_terms(draw(2, 5), TopK(values, torch.arange(2).repeat(2, 1), "lump"))


def test_top_k_that_does_not_fit():
    with pytest.raises(ValueError, match="shape"):
        TopK(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="integers"):
        TopK(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="rest"):
        TopK(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), "drop")
    ids = torch.arange(3).repeat(2, 1)
    with pytest.raises(ValueError, match="drawn classes"):
        TopK(torch.zeros(2, 3), ids, "spread", sampled=True)
    with pytest.raises(ValueError, match="one for each sample"):
        DistillationLoss()(draw(2, 5), TopK(torch.zeros(2, 3), ids), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="same samples"):
        distillation_terms(draw(4, 5), TopK(torch.zeros(2, 3), ids))
    with pytest.raises(ValueError, match="all classes"):
        distillation_terms(draw(2, 2), TopK(torch.zeros(2, 3), ids))
    with pytest.raises(ValueError, match="all classes"):
        distillation_terms(draw(2, 5), TopK(torch.zeros(2, 0), ids[:, :0]))


@pytest.mark.parametrize("bad", [-1, 5])
def test_top_k_ids_out_of_range_are_called_ids(bad):
    ids = torch.tensor([[0, 1], [2, bad]])
    with pytest.raises(ValueError, match=rf"ids.*{bad}\b"):
        distillation_terms(draw(2, 5), TopK(torch.zeros(2, 2), ids))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_the_largest_log_probabilities_and_the_centre_are_numpys(shape):
    logits = draw(*shape, scale=5).half()
    rows = logits.double().numpy()
    found = centred(logits)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), (rows - rows.max(-1, keepdims=True)).astype(np.float32))
    for k in (1, 3, 4):
        values, ids = top_k_log_probabilities(logits, k)
        order = np.argsort(-rows, -1)[..., :k]
        np.testing.assert_array_equal(ids.numpy(), order)
        expected = np.take_along_axis(special.log_softmax(rows, -1), order, -1)
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6, atol=1e-6)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}; it must be 1 to 4"):
            top_k_log_probabilities(logits, k)


@pytest.mark.parametrize("rest", get_args(Rest))
def test_a_top_k_teacher_under_inference_mode_and_on_a_device_that_is_not_waited_for(rest):
    student = draw(2, 5).requires_grad_()
    with torch.inference_mode():
        teacher = top_k(draw(2, 5, seed=1), 3, rest)
    distillation_terms(student, teacher).cross_entropy.sum().backward()
    assert student.grad.isfinite().all()
    away = TopK(teacher.values.to("meta"), teacher.ids.to("meta"), rest)
    assert distillation_terms(student.to("meta"), away, 2.0).kl.shape == (2,)


# Classes that are drawn


@PROPERTY
@given(
    num_classes=st.integers(1, 40),
    data=st.data(),
    scale=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_drawn_classes_have_their_probability_in_expectation(num_classes, data, scale, dtype, seed):
    """Exactly: over points at equal distances the mean is off by no more than their number says."""
    k = data.draw(st.integers(1, num_classes))
    logits, count = draw(num_classes, seed=seed, scale=scale, dtype=dtype), 500
    points = (torch.arange(count) + 0.5) / count
    weights, ids = sampled_log_probabilities(logits.expand(count, -1), k, points)
    p = logits.double().softmax(-1)
    mean = torch.zeros(num_classes, dtype=torch.float64)
    mean.index_add_(0, ids.flatten(), weights.double().exp().flatten() / count)
    drawn = weights.double().exp().amin()  # what a class is counted with when it is drawn
    torch.testing.assert_close(mean, p, rtol=0, atol=float(drawn) / count + 3e-6)
    torch.testing.assert_close(weights.double().exp().sum(-1), torch.ones(count).double(), rtol=0, atol=1e-5)
    assert bool((weights[:, 1:] <= weights[:, :-1]).all())
    assert all(len(set(row)) == k for row in ids.tolist())


def test_a_k_out_of_range_is_refused():
    with pytest.raises(ValueError, match="k is 4; it must be 1 to 3"):
        sampled_log_probabilities(draw(2, 3), 4, torch.zeros(2))


def test_the_first_and_the_last_point_draw_a_class_that_is_there_and_not_kept_already():
    logits = torch.tensor([0.6, 0.1, 0.1, 0.2]).log()
    assert sampled_log_probabilities(logits, 2, torch.tensor(0.0))[1].tolist() == [0, 1]
    last = torch.tensor(math.nextafter(1, 0), dtype=torch.float64)
    assert sampled_log_probabilities(draw(4, seed=1), 2, last)[1].tolist() == [1, 3]


def test_of_drawn_classes_only_the_cross_entropy_is_known():
    weights, ids = sampled_log_probabilities(draw(2, 6, seed=1), 3, torch.tensor([0.2, 0.7]))
    student = draw(2, 6)
    terms = distillation_terms(student, TopK(weights, ids, sampled=True))
    known = distillation_terms(student, TopK(weights, ids))
    torch.testing.assert_close(terms.cross_entropy, known.cross_entropy)
    assert terms.kl.isnan().all()
    assert terms.teacher_entropy.isnan().all()
    away = sampled_log_probabilities(student.to("meta"), 3, torch.zeros(2, device="meta"))
    assert {values.device.type for values in away} == {"meta"}


def test_a_lumped_teacher_and_masked_classes_have_a_gradient():
    """Nothing is left for classes that the student gives nothing: as if they were not there."""
    student = torch.cat([draw(2, 4), torch.full((2, 2), -math.inf, dtype=torch.float64)], 1).requires_grad_()
    ids = torch.arange(4).repeat(2, 1)
    values = draw(2, 4).log_softmax(1) + 1e-4  # a little more than 1 together
    found = [distillation_terms(student, TopK(values, ids, rest)) for rest in ("lump", "renormalise")]
    torch.testing.assert_close(*found)
    gradients = [torch.autograd.grad(terms.cross_entropy.sum(), student)[0] for terms in found]
    torch.testing.assert_close(*gradients)
    assert gradients[0].isfinite().all()
    surprised = distillation_terms(student, TopK(values - 1, ids, "lump"))
    assert (surprised.cross_entropy == math.inf).all()
