"""`TeacherMeasures.contributions`: exact means, numerical derivatives, and sampling errors by simulation."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from draws import DEFINITIONS, PROPERTY, draw_samples, every_definition
from lskd import measure_teacher
from lskd.stability import small_class_factor

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("error")]

SIMPLE = ("top1", "top5", "nll", "entropy", "calibrated_nll")
ERRORS = ("ece", "calibrated_ece")  # means of these by definition; test_measures has the reference


draw = partial(draw_samples, dtype=torch.float64, lead=1.0)


def quantity(measures, name):
    values = {
        "top1": lambda: measures.topk(1),
        "top5": lambda: measures.topk(5),
        "nll": lambda: float(measures.nll.mean()),
        "entropy": lambda: float(measures.entropy.mean()),
        "calibrated_nll": lambda: float(measures.calibrated.nll.mean()),
    }
    return values[name]() if name in values else measures.one_minus_stability(name)


# Means


@PROPERTY
@given(
    num_classes=st.integers(1, 9),
    samples=st.integers(1, 80),
    corrected=st.booleans(),
    seed=st.integers(0, 99),
)
def test_mean_is_the_quantity(num_classes, samples, corrected, seed):
    logits, labels = draw(samples, num_classes, seed)
    measures = measure_teacher(logits, labels, influence=True, small_class_correction=corrected)
    for name in (*SIMPLE, *ERRORS, *DEFINITIONS):
        contributions = measures.contributions(name)
        assert contributions.shape == (samples,)
        assert contributions.dtype == torch.float64
        if name in ERRORS:
            continue
        expected = quantity(measures, name)
        if corrected and name.startswith("between") and expected == 0:
            assert contributions.isnan().all()  # beside the noise nothing is left that could have an error
        else:
            found = float(contributions.mean())
            assert found == pytest.approx(expected, abs=1e-9, nan_ok=True), name


@every_definition
def test_mean_within_each_class_is_the_quantity(definition):
    """Influences are centred within classes: which classes there are is not left to chance."""
    logits, labels = draw(200, 5)
    measures = measure_teacher(logits, labels, influence=True)
    contributions, expected = measures.contributions(definition), quantity(measures, definition)
    for c in range(5):
        assert float(contributions[labels == c].mean()) == pytest.approx(expected, abs=1e-9)


def test_contributions_of_means_are_the_samples_own():
    logits, labels = draw(50, 8)
    measures = measure_teacher(logits, labels)
    rank = (np.argsort(-logits.numpy(), axis=1, kind="stable") == labels.numpy()[:, None]).argmax(1)
    assert measures.contributions("top1").tolist() == (rank == 0).tolist()
    assert measures.contributions("top5").tolist() == (rank < 5).tolist()
    assert torch.equal(measures.contributions("nll"), measures.nll)
    assert torch.equal(measures.contributions("entropy"), measures.entropy)
    assert torch.equal(measures.contributions("calibrated_nll"), measures.calibrated.nll)
    ece, calibrated = measures.contributions("ece"), measures.contributions("calibrated_ece")
    correct = measures.correct
    torch.testing.assert_close(ece.abs(), (correct - measures.confidence).abs())
    torch.testing.assert_close(calibrated.abs(), (correct - measures.calibrated.confidence).abs())


def test_names():
    measures = measure_teacher(*draw(30, 3))
    for name in DEFINITIONS:
        if "vector" in name:
            with pytest.raises(ValueError, match=rf"{name}.*influence=True"):
                measures.contributions(name)
        else:
            measures.contributions(name)
    with pytest.raises(ValueError, match=r"'top3'.*top1.*calibrated_ece.*target_std.*between_target_std"):
        measures.contributions("top3")


# Influence, against numerical derivatives


def weighted(probabilities, labels, weights, name):
    """The statistic with a weight on each sample."""
    p, classes = probabilities, np.unique(labels)
    rows = {c: labels == c for c in classes}
    means = {c: np.average(p[rows[c]], axis=0, weights=weights[rows[c]]) for c in classes}
    if name == "vector_l2":
        distances = {c: np.linalg.norm(p[rows[c]] - means[c], axis=1) for c in classes}
        values = [np.average(distances[c], weights=weights[rows[c]]) for c in classes if rows[c].sum() > 1]
        return np.mean(values)
    if name == "between_vector_l2":
        overall = np.average(p, axis=0, weights=weights)
        return np.mean([np.linalg.norm(means[c] - overall) for c in classes])
    return np.std([means[c][c] for c in classes], ddof=1)


def derivatives(probabilities, labels, name, step=1e-4):
    found = np.zeros(len(labels))
    for i in range(len(labels)):
        up, down = np.ones(len(labels)), np.ones(len(labels))
        up[i] += step
        down[i] -= step
        high = weighted(probabilities, labels, up, name)
        found[i] = (high - weighted(probabilities, labels, down, name)) / (2 * step)
    # The weight of a class is fixed: its samples' derivatives add up to nothing.
    for c in np.unique(labels):
        found[labels == c] -= found[labels == c].mean()
    return found


def widening(labels):
    n = np.bincount(labels)[labels]
    return np.where(n > 1, np.sqrt(n / np.maximum(n - 1, 1)), 1.0)


@pytest.mark.parametrize("name", ["vector_l2", "between_vector_l2", "between_target_std"])
@pytest.mark.parametrize("seed", [0, 1])
def test_influence_is_the_derivative(name, seed):
    logits, labels = draw(60, 6, seed)
    labels[labels == 3] = 2  # one class without samples, one larger, one of a single sample
    labels[labels == 4] = 5
    labels[8] = 4
    measures = measure_teacher(logits, labels, influence=True)
    expected = derivatives(special.softmax(logits.numpy(), axis=1), labels.numpy(), name)
    found = measures.contributions(name).numpy() - quantity(measures, name)
    found = found / len(labels) / widening(labels.numpy())
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_influence_by_class_and_on_the_mean():
    """What is kept: influence on the mean distance of the sample's class, and on the mean over classes."""
    logits, labels = draw(60, 4)
    measures = measure_teacher(logits, labels, influence=True)
    p, n = special.softmax(logits.numpy(), axis=1), np.bincount(labels.numpy())[labels.numpy()]
    within, between = measures.mean_influence.numpy()
    np.testing.assert_allclose(within / n / 4, derivatives(p, labels.numpy(), "vector_l2"), atol=1e-8)
    np.testing.assert_allclose(between / n, derivatives(p, labels.numpy(), "between_vector_l2"), atol=1e-8)


@pytest.mark.parametrize("corrected", [False, True])
def test_target_std_is_the_jackknife(corrected):
    logits, labels = draw(60, 6)
    labels[labels == 3] = 2
    labels[labels == 5] = 4
    labels[labels == 1] = 0
    labels[:2] = 3  # two samples: one left has no deviation, so the class says nothing
    labels[2] = 5
    labels[3:6] = 1  # three are enough
    measures = measure_teacher(logits, labels, influence=True, small_class_correction=corrected)
    p = special.softmax(logits.numpy(), axis=1)[np.arange(60), labels.numpy()]
    sizes = labels.bincount(minlength=6)
    factor = small_class_factor(sizes, "target_std").numpy() if corrected else np.ones(6)
    expected = np.full(60, measures.one_minus_stability("target_std"))
    counted = int((sizes > 1).sum())
    for c in np.flatnonzero(sizes.numpy() > 2):
        rows = np.flatnonzero(labels.numpy() == c)
        n = len(rows)
        left_out = np.array([np.delete(p[rows], i).std(ddof=1) for i in range(n)])
        pseudo = n * p[rows].std(ddof=1) - (n - 1) * left_out
        influence = (pseudo - pseudo.mean()) * factor[c] / counted
        expected[rows] += influence * np.sqrt(n / (n - 1)) * 60 / n
    np.testing.assert_allclose(measures.contributions("target_std").numpy(), expected, atol=1e-9)


@every_definition
def test_correction_widens(definition):
    """Within classes by its factor; between them, where noise goes out of a square, by raw over corrected."""
    logits, _ = draw(80, 8)
    labels = torch.arange(80) % 8
    plain = measure_teacher(logits, labels, influence=True)
    corrected = measure_teacher(logits, labels, influence=True, small_class_correction=True)
    raw, value = quantity(plain, definition), quantity(corrected, definition)
    factor = (
        float(small_class_factor(torch.tensor([10]), definition))
        if definition in DEFINITIONS[:2]
        else raw / value
    )
    assert factor > 1
    torch.testing.assert_close(
        corrected.contributions(definition) - value, (plain.contributions(definition) - raw) * factor
    )


# Sampling error, against simulation


class World:
    """A classifier of 20 classes that differ in difficulty, with correlated noise on its logits."""

    def __init__(self, num_classes=20):
        generator = np.random.default_rng(0)
        self.centres = generator.normal(size=(num_classes, num_classes))
        self.centres += np.diag(generator.uniform(1, 5, num_classes))
        self.mixing = generator.normal(size=(num_classes, num_classes, 3)) * 1.2

    def logits(self, labels, generator):
        noise = np.einsum("nkf,nf->nk", self.mixing[labels], generator.normal(size=(len(labels), 3)))
        noise += generator.normal(size=(len(labels), len(self.centres))) * 0.7
        return torch.from_numpy(self.centres[labels] + noise).float()


EQUAL = [30] * 20
UNEQUAL = np.linspace(5, 80, 20).round().astype(int).tolist()


def simulate(sizes, names, redraw, data_sets=300, **options):
    """Return by name the ratio of the mean estimated standard error to the spread over data sets."""
    world, generator, samples = World(), np.random.default_rng(100), sum(sizes)
    shares = np.array(sizes) / samples
    values, errors = [], []
    for _ in range(data_sets):
        labels = np.repeat(np.arange(len(sizes)), sizes)
        if redraw:
            labels = generator.choice(len(sizes), samples, p=shares)
        measures = measure_teacher(world.logits(labels, generator), torch.from_numpy(labels), **options)
        contributions = np.stack([measures.contributions(name).numpy() for name in names])
        values.append(contributions.mean(1))
        errors.append(np.sqrt(contributions.var(1) / samples))
    return dict(zip(names, np.mean(errors, 0) / np.std(values, 0, ddof=1), strict=True))


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_standard_errors_of_the_stabilities(sizes):
    """Class sizes are fixed, which is what the stabilities' contributions say.

    Over 3,000 data sets the ratios are 0.98 to 1.05; the spread over 400 is known to 4 % (one sigma).
    """
    for name, ratio in simulate(sizes, DEFINITIONS, False, data_sets=400, influence=True).items():
        assert ratio == pytest.approx(1, abs=0.15), name


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_standard_errors_of_means(sizes):
    """A mean over samples is of samples drawn with their classes, so the classes are redrawn too."""
    for name, ratio in simulate(sizes, ("top1", "top5", "nll", "entropy"), redraw=True).items():
        assert ratio == pytest.approx(1, abs=0.15), name


def test_correction_takes_most_of_the_bias_away():
    """Ten samples to a class, against two thousand.

    Of the distance of a mean only the variance across its direction makes it longer; the correction takes out
    all of it, and so overshoots by half as much as there was.
    """
    world, generator = World(), np.random.default_rng(2)

    def measured(size, **options):
        labels = np.repeat(np.arange(20), size)
        return measure_teacher(world.logits(labels, generator), torch.from_numpy(labels), **options)

    large = measured(2000)
    corrected = [measured(10, small_class_correction=True) for _ in range(100)]
    plain = [replace(measures, small_class_correction=False) for measures in corrected]
    for name in DEFINITIONS:
        truth = large.one_minus_stability(name)
        raw, now = (np.mean([m.one_minus_stability(name) for m in which]) for which in (plain, corrected))
        left = 0.6 if name == "between_vector_l2" else 0.3
        assert abs(now - truth) < left * abs(raw - truth), name
