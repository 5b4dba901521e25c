"""The teacher's trial against chance."""

import pytest
import torch
from scipy.stats import binom, binomtest
from torch import nn

from lskd import LskdError
from lskd.teachers.frozen import FrozenTeacher, Normalisation
from lskd.teachers.preflight import ask, binomial_tail, check_teacher, compare_with_chance, spread_indices

pytestmark = pytest.mark.unit
NORM = Normalisation((0.5,), (0.5,))


def trial(model, batches, classes=2, **options):
    teacher = FrozenTeacher(model, NORM, NORM, name="t")
    return check_teacher(teacher, batches, classes, size_option="--size", skip_option="--skip 1", **options)


@pytest.mark.parametrize(("total", "chance"), [(1, 0.5), (48, 0.25), (512, 0.1), (512, 0.001), (5000, 0.97)])
def test_binomial_tail_is_scipys(total, chance):
    for right in {0, 1, int(total * chance), int(total * chance) + 3, total}:
        if right <= total:
            assert binomial_tail(right, total, chance) == pytest.approx(
                binom.sf(right - 1, total, chance), rel=1e-6
            )


def test_comparison_is_the_one_sided_test():
    for right in range(201):
        significant = binomtest(right, 200, 0.3, alternative="greater").pvalue <= 0.01
        assert compare_with_chance(right, 200, 0.3) == ("above" if significant else "at")


@pytest.mark.parametrize(("total", "chance"), [(0, 0.1), (1, 0.1), (6, 0.5), (9, 1.0)])
def test_too_few_answers_tell_nothing(total, chance):
    assert compare_with_chance(total, total, chance) == "too few"


def test_images_without_any_label_tell_nothing():
    line = trial(nn.Identity(), [(torch.eye(40, 3), torch.zeros(40, 3))], 3, multi_label=True)
    assert line.endswith("no validation images with labels, its accuracy is not checked")


def test_indices_are_spread_over_a_folder_sorted_by_class():
    labels = [c for c in range(10) for _ in range(100)]
    chosen = [labels[i] for i in spread_indices(1000, 50)]
    assert {chosen.count(c) for c in range(10)} == {5}
    assert spread_indices(3, 10) == [0, 1, 2]
    assert spread_indices(10, 10) == list(range(10))


def test_with_several_labels_the_surest_class_must_be_among_them():
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).repeat(40, 1)
    constant = nn.Linear(3, 3)
    nn.init.zeros_(constant.weight)
    constant.bias.data = torch.tensor([0.0, 1.0, 0.0])  # the commonest class, of 3 images in 4
    with pytest.raises(LskdError, match=r"at chance: right on 75.0 % of 160 .* \(chance 75.0 %\)"):
        trial(constant, [(labels, labels)], 3, multi_label=True)
    alike = torch.eye(3).repeat(20, 1)  # no class is the commonest, and an image's one label is seen
    line = trial(nn.Identity(), [(alike, alike), (alike * 2, alike)], 3, multi_label=True)
    assert line == "teacher 't': right on 100.0 % of 120 validation images (chance 33.3 %)"


@pytest.mark.parametrize("as_probabilities", [False, True])
def test_constant_guess_of_the_most_frequent_class_is_chance(as_probabilities):
    """90 % right is no merit where 90 % of the images are of one class."""
    labels = torch.tensor([0] * 180 + [1] * 20)
    images = torch.eye(2)[labels]
    given = images if as_probabilities else labels
    batches = [(images[:100], given[:100]), (images[100:], given[100:])]
    constant = nn.Linear(2, 2)
    nn.init.zeros_(constant.weight)
    constant.bias.data = torch.tensor([1.0, 0.0])
    with pytest.raises(LskdError) as refused:
        trial(constant, batches)
    assert str(refused.value) == (
        "teacher 't' is at chance: right on 90.0 % of 200 validation images (chance 90.0 %); check its "
        "checkpoint, normalisation, image size (--size) and class order; --skip 1 trains on it nevertheless."
    )
    assert trial(nn.Identity(), batches) == (
        "teacher 't': right on 100.0 % of 200 validation images (chance 90.0 %)"
    )


def test_too_few_images_refuse_nobody():
    images = torch.eye(2)[[0, 1, 0]]
    assert trial(nn.Identity(), [(images, torch.tensor([1, 0, 1]))]).endswith(
        "right on 0.0 % of 3 validation images (chance 66.7 %); too few images to tell it from chance"
    )
    assert "no validation images" in trial(nn.Identity(), [])


def test_images_that_a_teacher_cannot_process():
    teacher = FrozenTeacher(nn.Linear(3, 2), NORM, NORM, name="t")
    with pytest.raises(LskdError, match=r"'t' cannot process 4 images \(mat1 and.*; set --size to the size"):
        ask(teacher, torch.zeros(1, 4), "--size")
