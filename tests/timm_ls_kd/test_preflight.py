import pytest
import torch
from scipy.stats import binomtest

from lskd import LskdError
from timm_ls_kd.teacher import check_teacher_accuracy, spread_indices, verdict

pytestmark = pytest.mark.unit


def test_verdict_is_the_one_sided_test():
    for right in range(201):
        significant = binomtest(right, 200, 0.3, alternative="greater").pvalue <= 0.01
        if significant:
            assert "right on" in verdict(right, 200, 0.3, "t")
        else:
            with pytest.raises(LskdError, match=r"at chance.*--kd-teacher-img-size.*kd_preflight_samples: 0"):
                verdict(right, 200, 0.3, "t")


def test_too_few_images_refuse_nobody():
    assert "too few" in verdict(3, 3, 0.5, "t")
    assert "too few" in verdict(0, 3, 0.5, "t")
    assert "no validation images" in verdict(0, 0, 0.5, "t")


def test_indices_are_spread_over_a_folder_sorted_by_class():
    labels = [c for c in range(10) for _ in range(100)]
    chosen = [labels[i] for i in spread_indices(1000, 50)]
    assert {chosen.count(c) for c in range(10)} == {5}
    assert spread_indices(3, 10) == [0, 1, 2]
    assert spread_indices(10, 10) == list(range(10))


def test_constant_guess_of_the_most_frequent_class_is_chance():
    """90 % right is no merit where 90 % of the images are of one class."""
    targets = torch.tensor([0] * 180 + [1] * 20)
    batches = [(torch.zeros(len(targets), 1), targets)]
    constant = lambda images: torch.tensor([[1.0, 0.0]]).expand(len(images), 2)  # noqa: E731
    with pytest.raises(LskdError, match=r"90.0 % of 200 validation images \(chance 90.0 %\)"):
        check_teacher_accuracy(constant, batches, 2, name="t", device=torch.device("cpu"))
    perfect = iter([torch.eye(2)[targets]])
    line = check_teacher_accuracy(
        lambda images: next(perfect), batches, 2, name="t", device=torch.device("cpu")
    )
    assert "100.0 %" in line
