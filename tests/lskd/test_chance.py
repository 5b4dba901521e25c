import pytest
from scipy.stats import binom, binomtest

from lskd.teachers.preflight import binomial_tail, compare_with_chance

pytestmark = pytest.mark.unit


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
