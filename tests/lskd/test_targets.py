import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import special
from torch.nn import functional as F

from lskd import convert_alpha, smooth_targets, target_entropy, target_mass, target_values
from lskd.targets import chance_like_mass, check_finite, check_samples, smooth_probabilities

pytestmark = pytest.mark.unit

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
CONVENTIONS = ("paper", "uniform")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@PROPERTY
@given(
    num_classes=st.integers(2, 40),
    alpha=st.floats(0, 0.99),
    convention=st.sampled_from(CONVENTIONS),
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(list(TOLERANCE)),
    label_dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    seed=st.integers(0, 9),
)
def test_rows_are_the_definition(reference, num_classes, alpha, convention, shape, dtype, label_dtype, seed):
    labels = torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))
    targets = smooth_targets(labels.to(label_dtype), num_classes, alpha, convention, dtype)
    assert targets.shape == (*shape, num_classes)
    assert targets.dtype == dtype
    expected = reference.targets(labels.numpy(), num_classes, alpha, convention)
    np.testing.assert_allclose(targets.double().numpy(), expected, atol=TOLERANCE[dtype])


@PROPERTY
@given(
    num_classes=st.integers(2, 40),
    alpha=st.floats(0, 0.99),
    convention=st.sampled_from(CONVENTIONS),
    weight=st.floats(0, 1),
    dtype=st.sampled_from([torch.int64, torch.float16, torch.float32, torch.float64]),
)
def test_mixed_labels_are_smoothed_as_smoothed_ones_are_mixed(
    reference, num_classes, alpha, convention, weight, dtype
):
    weight = weight if dtype.is_floating_point else round(weight)
    labels = np.arange(num_classes)
    one_hot, smoothed = (reference.targets(labels, num_classes, a, convention) for a in (0.0, alpha))
    mixed, expected = (weight * rows + (1 - weight) * rows[::-1] for rows in (one_hot, smoothed))
    found = smooth_probabilities(torch.tensor(mixed).to(dtype), alpha, convention)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(found.double().numpy(), expected, atol=TOLERANCE.get(dtype, 1e-6))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rows_sum_to_one_over_many_classes(convention):
    targets = smooth_targets(torch.tensor([0, 21_842]), 21_843, 0.3, convention, torch.float64)
    np.testing.assert_allclose(targets.sum(-1).numpy(), 1, rtol=1e-12)


def test_equation_1_and_the_convention_of_torch():
    assert target_values(5, 0.2) == (0.8, 0.05)
    assert target_values(5, 0.2, "uniform") == pytest.approx((0.84, 0.04))
    assert target_values(5, 0.0) == (1.0, 0.0)
    assert target_values(1, 0.0) == (1.0, 0.0)


@PROPERTY
@given(num_classes=st.integers(2, 30), alpha=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_uniform_is_label_smoothing_of_torch(num_classes, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (6,), generator=generator)
    targets = smooth_targets(labels, num_classes, alpha, "uniform", torch.float64)
    ours = -(targets * logits.log_softmax(-1)).sum(-1)
    theirs = F.cross_entropy(logits, labels, label_smoothing=alpha, reduction="none")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("num_classes", "uniform"), [(1000, 0.1001), (10, 0.1111), (2, 0.2)])
def test_alpha_of_a_tenth_in_the_other_convention(num_classes, uniform):
    assert convert_alpha(0.1, num_classes, "paper", "uniform") == pytest.approx(uniform, abs=5e-5)


@PROPERTY
@given(num_classes=st.integers(2, 5000), share=st.floats(0, 0.999))
def test_converted_alpha_gives_the_same_targets_and_returns(num_classes, share):
    paper = share * (num_classes - 1) / num_classes  # above this the label has less than the others
    uniform = convert_alpha(paper, num_classes, "paper", "uniform")
    assert target_values(num_classes, paper) == pytest.approx(
        target_values(num_classes, uniform, "uniform"), abs=1e-12
    )
    assert convert_alpha(uniform, num_classes, "uniform", "paper") == pytest.approx(paper, abs=1e-12)
    assert convert_alpha(paper, num_classes, "paper", "paper") == paper
    assert convert_alpha(paper, num_classes, "uniform", "uniform") == paper


def test_hard_labels_of_one_class_convert():
    assert convert_alpha(0.0, 1, "paper", "uniform") == convert_alpha(0.0, 1, "uniform", "paper") == 0.0


@PROPERTY
@given(
    num_classes=st.integers(2, 3000),
    alpha=st.floats(1e-6, 0.95),
    temperature=st.floats(0.05, 100),
    convention=st.sampled_from(CONVENTIONS),
)
@example(num_classes=2, alpha=0.3, temperature=2.0, convention="paper")
@example(num_classes=1, alpha=0.3, temperature=2.0, convention="uniform")
def test_mass_and_entropy_of_an_ideal_teacher(reference, num_classes, alpha, temperature, convention):
    targets = reference.targets(np.array([0]), num_classes, alpha, convention)[0]
    tempered = special.softmax(np.log(targets) / temperature)
    mass = target_mass(num_classes, alpha, temperature, convention)
    assert mass == pytest.approx(tempered[0], rel=1e-9, abs=1e-15)
    entropy = target_entropy(num_classes, alpha, temperature, convention)
    assert entropy == pytest.approx(special.entr(tempered).sum(), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(
    ("num_classes", "masses"), [(1000, (0.900, 0.087, 0.020)), (200, (0.9, 0.175, 0.058))]
)
def test_mass_falls_with_temperature_as_published(num_classes, masses):
    assert [round(target_mass(num_classes, 0.1, t), 3) for t in (1, 2, 3)] == list(masses)


@pytest.mark.parametrize(("num_classes", "entropy"), [(1000, 1.016), (200, 0.854)])
def test_entropy_of_a_smoothed_teacher_is_part_of_the_loss(num_classes, entropy):
    assert target_entropy(num_classes, 0.1) == pytest.approx(entropy, abs=5e-4)


@pytest.mark.parametrize("num_classes", [1, 2, 1000])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e6])
def test_hard_teacher_keeps_its_mass_at_any_temperature(num_classes, temperature):
    assert target_mass(num_classes, 0.0, temperature) == 1.0
    entropy = target_entropy(num_classes, 0.0, temperature)
    assert entropy == 0.0
    assert math.copysign(1, entropy) == 1  # a report must not print -0.0


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 1e300])
def test_extreme_temperatures_reach_their_limits(temperature):
    expected = 1 / 10 if temperature > 1 else 1.0
    assert target_mass(10, 0.1, temperature) == pytest.approx(expected)
    assert target_entropy(10, 0.1, temperature) == pytest.approx(math.log(10) if temperature > 1 else 0)
    below_chance = 0.0 if temperature < 1 else 1 / 10  # alpha 0.95 of 10: the label has the least
    assert target_mass(10, 0.95, temperature) == pytest.approx(below_chance)
    assert target_entropy(10, 0.95, temperature) == pytest.approx(math.log(10 if temperature > 1 else 9))


LABELS = torch.tensor([0])
OUT_OF_RANGE = [
    (smooth_targets, (LABELS, 3, 0.1, "paper", torch.int64), "dtype"),
    (target_values, (3, 0.1, "torch"), "convention"),
    (convert_alpha, (0.1, 3, "paper", "torch"), "convention"),
    (target_values, (0, 0.1), "num_classes"),
    (target_values, (1, 0.1), "one class"),
    (chance_like_mass, (0,), "num_classes"),
    (check_finite, (torch.tensor([[0.0], [math.nan]]), torch.tensor([7, 5])), "sample 5 are"),
    (check_finite, (torch.tensor([[0.0], [math.inf]]), 7), "sample 8 are"),
    (check_finite, (torch.tensor([[0.0], [math.inf], [math.nan]]),), "sample 1 are"),
    (check_finite, (torch.tensor([[0.0, math.nan], [math.inf] * 2]), 0, " of these"), "sample 0 of these"),
    (check_samples, (torch.zeros(2, 3), torch.tensor([0, 1, 2])), r"must be \(N, K\)"),
    (check_samples, (torch.zeros(1, 3), torch.tensor([0]), 4), r"must be \(N, 4\)"),
    (check_samples, (torch.zeros(1, 3, dtype=torch.long), torch.tensor([0])), "floating"),
    (partial(check_samples, least=1), (torch.zeros(0, 3), torch.tensor([]).long()), "at least one"),
    (convert_alpha, (0.5, 2, "paper", "uniform"), "smaller alpha"),
    (convert_alpha, (0.95, 10, "paper", "uniform"), "smaller alpha"),
]
OUT_OF_RANGE += [(smooth_targets, (torch.tensor([label]), 3, 0.1), "integers") for label in (0.0, True, 0j)]
for alpha in (-0.1, 1.0, 1.5, math.nan):
    OUT_OF_RANGE += [(target_values, (3, alpha), "alpha"), (target_mass, (3, alpha, 1.0), "alpha")]
    OUT_OF_RANGE += [(target_entropy, (3, alpha), "alpha"), (smooth_targets, (LABELS, 3, alpha), "alpha")]
    OUT_OF_RANGE += [(convert_alpha, (alpha, 3, "paper", "uniform"), "alpha")]
for t in (0.0, -1.0, math.nan, math.inf):
    OUT_OF_RANGE += [(target_mass, (3, 0.1, t), "temperature"), (target_entropy, (3, 0.1, t), "temperature")]


@pytest.mark.parametrize(("function", "arguments", "message"), OUT_OF_RANGE)
def test_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("bad", [-100, -1, 5, 99])
def test_label_out_of_range_is_named_with_its_position(bad):
    labels = torch.zeros(12, dtype=torch.long)
    labels[7] = bad
    with pytest.raises(ValueError, match=rf"\b7\b.*{bad}\b"):
        smooth_targets(labels, 5, 0.1)


def test_as_many_samples_as_asked_are_enough_and_none_where_none_is_asked():
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    check_samples(logits, labels, 3, least=2)
    check_samples(logits[:0], labels[:0])


def test_a_device_is_not_waited_for_unless_asked():
    """A tensor of the device "meta" has no values that could be looked at."""
    labels, logits = torch.zeros(2, dtype=torch.long, device="meta"), torch.zeros(2, 3, device="meta")
    assert smooth_targets(labels, 3, 0.1).device.type == "meta"
    check_samples(logits, labels)
    with pytest.raises(RuntimeError, match="meta"):
        check_samples(logits, labels, any_device=True)


def test_compiled_targets_are_the_same():
    compiled = torch.compile(smooth_targets, fullgraph=True, backend="eager")
    labels = torch.tensor([[2, 0], [1, 1]])
    torch.testing.assert_close(compiled(labels, 3, 0.1), smooth_targets(labels, 3, 0.1))
