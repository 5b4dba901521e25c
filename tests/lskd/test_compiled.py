"""What compiled code adds to the fused loss; that its numbers are the plain loss's, test_fused.py shows."""

import math
import platform
import threading

import numpy as np
import pytest
import torch
from scipy import special

from lskd import fused_distillation
from lskd.kernel import native

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def use_compiled(monkeypatch, compiled_loss):
    monkeypatch.setattr(native, "function", lambda: compiled_loss)


def run(student, teacher, *rest, **arguments):
    student = student.clone().requires_grad_()
    terms = fused_distillation(student, teacher, *rest, **arguments)
    terms.loss.backward()
    return terms, student.grad


@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 511, 512, 513, 2047, 2049, 5000])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_every_length_of_row_against_float64(classes, spread):
    generator = np.random.default_rng(classes)
    x, z = (spread * generator.standard_normal((2, 6, classes))).astype(np.float32)
    terms, gradient = run(torch.from_numpy(x), torch.from_numpy(z))
    log_q, log_p = (special.log_softmax(rows.astype(np.float64), -1) for rows in (x, z))
    p = np.exp(log_p)
    np.testing.assert_allclose(float(terms.kl), (p * (log_p - log_q)).sum(-1).mean(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        float(terms.teacher_entropy), special.entr(p).sum(-1).mean(), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(gradient, (np.exp(log_q) - p) / 6, rtol=4e-6, atol=2e-8)  # eps / 6
    assert float(terms.agreement) == pytest.approx((x.argmax(-1) == z.argmax(-1)).mean())


@pytest.mark.parametrize("classes", [7, 40])
def test_rows_of_the_smallest_numbers_and_of_nothing(classes):
    lowest = torch.full((1, classes), torch.finfo(torch.float32).min)
    terms, gradient = run(lowest, torch.zeros(1, classes))
    assert float(terms.kl) == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-7
    terms, _ = run(torch.full((1, classes), -math.inf), torch.zeros(1, classes))
    assert math.isnan(terms.loss)


def test_only_the_first_of_equal_largest_classes_counts():
    student = torch.zeros(1, 2000)
    teacher = torch.zeros(1, 2000)
    student[0, [700, 1900]] = 3.0
    teacher[0, 1900] = 3.0
    assert float(run(student, teacher)[0].agreement) == 0
    teacher[0, 700] = 3.0
    assert float(run(student, teacher)[0].agreement) == 1


def test_threads_share_the_rows(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 37, 50, generator=generator)
    labels = torch.randint(50, (37,), generator=generator)
    mask = torch.rand(37, generator=generator) < 0.6
    arguments = {"hard_weight": 0.3, "alpha": 0.1, "temperature": 2.0}
    one, expected = run(student, teacher, labels, mask, **arguments)
    monkeypatch.setattr(native, "_SMALLEST_SHARE", 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    several, gradient = run(student, teacher, labels, mask, **arguments)
    assert torch.equal(gradient, expected)
    torch.testing.assert_close(several, one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("failing", [0, 2])
def test_what_one_thread_raises_is_raised_after_all_have_ended(failing):
    ended, other = [], threading.Event()

    def share(thread):
        if thread == failing:
            other.set()
            raise MemoryError("no scratch")
        other.wait()
        ended.append(thread)

    with pytest.raises(MemoryError, match="no scratch"):
        native.in_threads(share, 3)
    assert sorted([*ended, failing]) == [0, 1, 2]


def test_a_gradient_does_not_depend_on_where_a_row_lies_in_memory():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 9, 133, generator=generator)
    _, together = run(student, teacher, reduction="sum")
    for index in range(9):
        _, alone = run(student[index : index + 1], teacher[index : index + 1], reduction="sum")
        assert torch.equal(alone[0], together[index])


def test_a_library_of_another_machine_is_passed_over(tmp_path):
    assert native.load(tmp_path / "none.so") is None
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"\x7fELF" + bytes(60))
    assert native.load(damaged) is None


CLONES = {
    "x86-64": True,
    "x86-64-v3": torch.cpu._is_avx2_supported(),
    "x86-64-v4": torch.cpu._is_avx512_supported(),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one build alone")
@pytest.mark.parametrize("clone", [name for name, runs in CLONES.items() if runs])
def test_nan_of_any_payload_comes_out_of_the_clone_for_each_cpu(clone, compile_loss, monkeypatch):
    """At the seams of vectors, blocks and parts of a row, and in its last classes."""
    built = compile_loss(f"-march={clone}", "-DLSKD_ONE_TARGET")
    monkeypatch.setattr(native, "function", lambda: built)
    patterns = [0x7FC00000, 0x7FFFFFFF, 0x7FC00001, 0x7F800001]
    bits = torch.tensor([*patterns, *(pattern - 2**31 for pattern in patterns)], dtype=torch.int32)
    for classes in (1, 5, 16, 37, 2054):
        places = [place for place in {0, 5, 15, 16, 36, 511, 512, 2047, 2048, 2053} if place < classes]
        for place in places:
            for which, labels in ((0, None), (1, None), (0, torch.zeros(8, dtype=torch.long))):
                logits = torch.randn(2, 8, classes, generator=torch.Generator().manual_seed(0))
                logits.view(torch.int32)[which, :, place] = bits
                for temperature in (1.0, 2.0):
                    arguments = {"temperature": temperature, "hard_weight": 0.0 if labels is None else 0.5}
                    _, gradient = run(*logits, labels, **arguments)
                    assert bool(gradient.isnan().any(-1).all())
                    for row in range(8):
                        label = None if labels is None else labels[:1]
                        terms, _ = run(*logits[:, row : row + 1], label, **arguments)
                        assert terms.loss.isnan()
