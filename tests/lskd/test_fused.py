"""The fused loss is the plain one: same numbers, same gradient, less time and memory."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lskd import TopK, distillation_terms, fused_distillation
from lskd.kernel import chunks, native
from lskd.terms import sampled_log_probabilities

pytestmark = pytest.mark.unit

SHAPE = (7, 5, 23)
REFUSED_BY_AUTOGRAD = "create_graph=False|double backward"  # AOTAutograd has two checks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four samples a chunk, so that 35 samples fill eight and a part of one."""
    monkeypatch.setitem(chunks._CHUNK_ELEMENTS, "cpu", 4 * SHAPE[-1])


def inputs(kind, dtype=torch.float32, spread=2.0):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = (draw(*SHAPE) * spread).to(dtype)
    dense = (draw(*SHAPE) * spread).to(dtype)
    labels = torch.randint(SHAPE[-1], SHAPE[:-1], generator=generator)
    mask = torch.rand(SHAPE[:-1], generator=generator) < 0.7
    if kind in ("dense", "label rows"):
        rows = draw(*SHAPE).softmax(-1).to(dtype)
        return student, dense, rows if kind == "label rows" else labels, mask
    values, ids = dense.log_softmax(-1).topk(SHAPE[-1] if kind == "all" else 4, -1)
    rest = "renormalise" if kind == "all" else kind
    return student, TopK(values, ids, rest), labels, mask


def computed(student, teacher, labels, mask, dtype=None, **arguments):
    """Return terms and gradient, of three times the loss, where both logits come in ``dtype``."""
    leaf = student.to(dtype or student.dtype, copy=True).requires_grad_()
    if isinstance(teacher, TopK):
        teacher = TopK(teacher.values.to(dtype or teacher.values.dtype), teacher.ids, teacher.rest)
    else:
        teacher = teacher.to(dtype or teacher.dtype)
    terms = fused_distillation(leaf, teacher, labels, mask, **arguments)
    (terms.loss * 3).backward()
    return terms, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def both(*given, **arguments):
    """Return terms and gradient of the fused loss, and those of the plain one in float64."""
    fused, plain = (
        computed(*given, **arguments),
        computed(*given, torch.float64, impl="reference", **arguments),
    )
    return *fused, *plain


@pytest.fixture(params=["native", "chunks", "elsewhere"])
def device_path(request, monkeypatch):
    """Compiled code, the chunks on a CPU, and on the CPU those of a GPU, which ask nothing of it."""
    compiled = request.getfixturevalue("compiled_loss") if request.param == "native" else None
    monkeypatch.setattr(native, "function", lambda: compiled)
    if request.param == "elsewhere":
        monkeypatch.setattr(chunks, "on_cpu", lambda tensor: False)
        monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS_ELSEWHERE", 4 * SHAPE[-1])


SETTINGS = [
    {"temperature": t, "temperature_squared": squared, "hard_weight": w, "alpha": a, "convention": c}
    for t, squared, w, (a, c) in itertools.product(
        [1.0, 0.6, 4.0], [False, True], [0.0, 0.3, 1.0], [(0.0, "paper"), (0.1, "paper"), (0.2, "uniform")]
    )
    if not (t == 1.0 and squared)
]
KINDS = ["dense", "renormalise", "spread", "lump", "restrict", "all"]
OTHER_SHAPES = [(7, 5, 22), (5, 23), (1, 5, 23), (7, 5), (23,)]  # some of which would broadcast


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("labelled", "shape"), [("ids", SHAPE), ("rows", (35, 23))])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_implementation_is_the_plain_loss_in_float64(shape, dtype, kind, labelled, masked, device_path):
    """No further from it than the plain formulas are, computed in the arithmetic of these logits."""
    student, teacher, labels, mask = inputs(kind, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    student, labels, mask = student.reshape(shape), labels.reshape(shape[:-1]), mask.reshape(shape[:-1])
    if isinstance(teacher, TopK):
        teacher = TopK(
            *(part.reshape(*shape[:-1], -1) for part in (teacher.values, teacher.ids)), teacher.rest
        )
    else:
        teacher = teacher.reshape(shape)
    if labelled == "rows":
        rows = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
        labels = rows.to(wide)
    mask, eps = mask if masked else None, torch.finfo(wide).eps
    for arguments in SETTINGS[:: 1 if labelled == "ids" and dtype == torch.float32 else 7]:
        given = student, teacher, labels, mask
        terms, gradient, gold, expected = both(*given, **arguments)
        naive, its_gradient = computed(*given, impl="reference", **arguments)
        assert gradient.dtype == dtype
        for name in gold._fields:
            ours, theirs, exact = (float(getattr(found, name).detach()) for found in (terms, naive, gold))
            if math.isnan(exact):
                assert math.isnan(ours), name
            else:
                # The agreement is a count, which a GPU divides in float32.
                least = 2e-8 if name == "agreement" else 16 * eps * max(abs(exact), 1)
                assert abs(ours - exact) <= abs(theirs - exact) + least, name
        # Half precision is rounded once, at the end; the factor 3 outside rounds it a second time.
        rounding = 2 * torch.finfo(dtype).eps * expected.abs() + 2 * torch.finfo(dtype).tiny
        allowed = (
            4 * (its_gradient.double() - expected).abs().amax() + 8 * eps * expected.abs().amax() + rounding
        )
        assert bool(((gradient.double() - expected).abs() <= allowed).all()), arguments


def test_a_named_implementation_runs_or_says_why_not(monkeypatch, compiled_loss):
    monkeypatch.setattr(native, "function", lambda: compiled_loss)
    student, teacher, labels, _ = inputs("dense")
    terms = {
        impl: fused_distillation(student, teacher, labels, hard_weight=0.3, impl=impl)
        for impl in ("auto", "native", "chunks", "reference")
    }
    for found in terms.values():
        torch.testing.assert_close(found, terms["reference"], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(terms["auto"], terms["native"], strict=True))
    strided = student.transpose(0, 1).contiguous().transpose(0, 1)
    for given in ((student.double(), teacher), (strided, teacher), inputs("spread")[:2]):
        with pytest.raises(RuntimeError, match=r"takes contiguous float32 .* on the CPU$"):
            fused_distillation(*given, impl="native")
    monkeypatch.setattr(native, "function", lambda: None)
    with pytest.raises(RuntimeError, match="no compiled code"):
        fused_distillation(student, teacher, impl="native")


def test_the_reference_has_second_derivatives():
    student, teacher, *_ = inputs("dense")
    student = student.double().requires_grad_()

    def loss(logits):
        return fused_distillation(logits, teacher, impl="reference").loss

    (gradient,) = torch.autograd.grad(loss(student), student, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), student)
    assert bool(second.isfinite().all())
    assert bool(second.any())


@pytest.mark.parametrize("kind", ["dense", "restrict"])
def test_sum_is_mean_times_samples_and_nll_is_unsmoothed(kind, device_path):
    student, teacher, labels, mask = inputs(kind)
    mean = fused_distillation(student, teacher, labels, mask, hard_weight=0.5, alpha=0.1)
    total = fused_distillation(student, teacher, labels, mask, hard_weight=0.5, alpha=0.1, reduction="sum")
    for one, other in zip(mean, total, strict=True):
        torch.testing.assert_close(one * mask.sum(), other)
    expected = torch.nn.functional.cross_entropy(student[mask], labels[mask], reduction="sum")
    torch.testing.assert_close(total.nll, expected)
    assert float(total.hard_cross_entropy) > float(total.nll)


def test_the_mean_of_one_sample_is_its_sum(device_path):
    student, teacher, labels, mask = inputs("dense")
    alone = student[0, :1], teacher[0, :1], labels[0, :1], None
    mask[:] = False
    mask[2, 1] = True
    for given in (alone, (student, teacher, labels, mask)):
        mean, total = (computed(*given, hard_weight=0.5, reduction=name) for name in ("mean", "sum"))
        torch.testing.assert_close(mean, total, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dense", "label rows", "renormalise", "spread"])
def test_padding_may_be_anything_and_nan_elsewhere_is_not_hidden(kind, device_path):
    student, teacher, labels, mask = inputs(kind)
    clean = both(student, teacher, labels, mask, hard_weight=0.5)
    student[~mask] = math.nan
    labels[~mask] = math.nan if kind == "label rows" else -100
    if isinstance(teacher, TopK):
        teacher.values[~mask] = math.nan
        teacher.ids[~mask] = 10**6
    else:
        teacher[~mask] = math.inf
    dirty = both(student, teacher, labels, mask, hard_weight=0.5)
    torch.testing.assert_close(dirty[0], clean[0], equal_nan=kind == "label rows")  # they have no nll
    torch.testing.assert_close(dirty[1], clean[1])
    assert not dirty[1][~mask].any()
    if kind == "label rows":
        labels[tuple(mask.nonzero()[0])] = math.nan
        assert fused_distillation(student, teacher, labels, mask, hard_weight=0.5).loss.isnan()


@pytest.mark.parametrize("kind", ["dense", "renormalise", "spread", "lump"])
def test_masked_classes_of_minus_infinity(kind, device_path):
    student, teacher, labels, _ = inputs("dense")
    student[:, :, 20:] = -math.inf
    teacher[:, :, 20:] = -math.inf
    labels.clamp_(max=19)
    same = teacher
    if kind != "dense":
        values, ids = teacher.log_softmax(-1).topk(20, -1)
        # A little more than 1: whichever way of the rest, nothing is left for the others.
        teacher, same = (TopK(values + 1e-4, ids, rest) for rest in (kind, "renormalise"))
    plain, expected = computed(student, same, labels, None, torch.float64, hard_weight=0.5, impl="reference")
    for impl in ("auto", "reference"):
        terms, gradient = computed(student, teacher, labels, None, hard_weight=0.5, impl=impl)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(terms.loss.double(), plain.loss.double())
        assert math.isfinite(terms.kl)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_label_rows_of_0_and_1_are_labels(temperature, device_path):
    """Also where the student gives a class of probability 0 nothing at all."""
    student, teacher, labels, mask = inputs("dense")
    student[:, :, 20:] = -math.inf
    teacher[:, :, 20:] = -math.inf
    labels.clamp_(max=19)
    rows = torch.nn.functional.one_hot(labels, SHAPE[-1]).float()
    arguments = {"hard_weight": 0.3, "temperature": temperature}
    found, gradient = computed(student, teacher, rows, mask, **arguments)
    expected, its_gradient = computed(student, teacher, labels, mask, **arguments)
    assert found.nll.isnan()
    torch.testing.assert_close(found._replace(nll=expected.nll), expected)
    torch.testing.assert_close(gradient, its_gradient)


def test_a_student_that_is_its_teacher(device_path):
    student, *_ = inputs("dense", spread=30.0)
    ours = student.clone().requires_grad_()
    fused = fused_distillation(ours, student)
    fused.loss.backward()
    assert float(fused.kl) == 0
    assert float(fused.agreement) == 1
    assert float(ours.grad.abs().max()) < 1e-8  # of 1/35: what a fused multiplication rounds


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_of_drawn_classes_the_cross_entropy_alone_is_known(impl):
    """Of a student that is the teacher it is the entropy, in expectation; KL would be far from 0."""
    logits = torch.randn(4000, 50, generator=torch.Generator().manual_seed(0))
    points = torch.rand(len(logits), generator=torch.Generator().manual_seed(1))
    drawn = TopK(*sampled_log_probabilities(logits, 5, points), sampled=True)
    found, exact = (fused_distillation(logits, teacher, impl=impl) for teacher in (drawn, logits))
    assert float(found.cross_entropy) == pytest.approx(float(exact.cross_entropy), rel=0.01)
    assert torch.equal(found.loss, found.cross_entropy)
    assert all(torch.isnan(part) for part in (found.kl, found.teacher_entropy, found.agreement))
    terms = distillation_terms(logits, drawn)
    assert torch.isnan(terms.kl).all()
    assert torch.isnan(terms.teacher_entropy).all()
    with pytest.raises(ValueError, match="drawn classes stand for all"):
        TopK(drawn.values, drawn.ids, "lump", sampled=True)


def test_no_sample_and_no_gradient(device_path):
    student, teacher, labels, mask = inputs("dense")
    student.requires_grad_()
    fused = fused_distillation(student, teacher, labels, torch.zeros_like(mask), hard_weight=0.5)
    fused.loss.backward()
    assert float(fused.loss.detach()) == 0
    assert not student.grad.any()
    with torch.no_grad():
        assert fused_distillation(student, teacher).loss.grad_fn is None
    assert math.isnan(fused_distillation(student, teacher).nll)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_under_inference_mode(kind, masked, device_path):
    student, teacher, labels, mask = inputs(kind)
    mask = mask if masked else None
    with torch.inference_mode():
        spoken = TopK(teacher.values * 1, teacher.ids * 1, teacher.rest) if kind != "dense" else teacher * 1
    found, expected = (computed(student, who, labels, mask, hard_weight=0.5) for who in (spoken, teacher))
    torch.testing.assert_close(found, expected)


def test_double_backward_is_refused(device_path):
    student, teacher, *_ = inputs("dense")
    student.requires_grad_()
    loss = fused_distillation(student, teacher).loss
    with pytest.raises(RuntimeError, match=r"no second derivative; .* lskd\.distillation_terms"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("kind", ["dense", "spread"])
def test_a_retained_graph_gives_its_gradient_again_and_another_does_not(kind, device_path):
    student, teacher, labels, mask = inputs(kind)
    student.requires_grad_()
    loss = fused_distillation(student, teacher, labels, mask, hard_weight=0.3).loss
    (first,) = torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, torch.tensor(1.0))
    torch.testing.assert_close(first, 3 * second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


def test_a_teacher_less_its_largest_logit_is_the_same_bit_for_bit_in_the_gradient(device_path):
    """What lets a student of a stored teacher be equal to one of an online teacher."""
    student, teacher, labels, _ = inputs("dense")
    for t in (1.0, 3.0):
        found = []
        for given in (teacher, teacher - teacher.amax(-1, keepdim=True), teacher.clone()):
            ours = student.clone().requires_grad_()
            terms = fused_distillation(ours, given, labels, hard_weight=0.2, temperature=t)
            terms.loss.backward()
            found.append((ours.grad, terms))
        for gradient, terms in found[1:]:
            assert torch.equal(gradient, found[0][0])
            torch.testing.assert_close(terms, found[0][1], rtol=1e-6, atol=1e-6)
        assert torch.equal(found[2][0], found[0][0])
        assert all(torch.equal(one, other) for one, other in zip(found[2][1], found[0][1], strict=True))


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 2.0), (30.0, 2.0), (1e4, 2.0), (0.0, 3e4)])
def test_neither_a_constant_on_a_row_nor_large_logits_cost_digits(offset, spread, device_path):
    student, teacher, labels, _ = inputs("dense", spread=spread)
    given = student + offset, teacher - offset, labels, None
    fused, gradient, plain, expected = both(*given, hard_weight=0.5)
    for name in ("loss", "kl", "teacher_entropy"):
        ours, exact = (getattr(terms, name).double() for terms in (fused, plain))
        torch.testing.assert_close(ours, exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["dense", "spread"])
def test_under_compile_it_is_one_operator_with_the_same_numbers(kind, device_path):
    student, teacher, labels, mask = inputs(kind)
    torch.compiler.reset()

    def step(logits):
        terms = fused_distillation(logits * 2, teacher, labels, mask, hard_weight=0.3, alpha=0.1)
        return terms.loss * 3, terms.kl

    plain, compiled = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected, found = step(plain), torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    expected[0].backward()
    found[0].backward()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_operator_gives_what_it_announces(wanted, masked, dtype):
    """Shapes, dtypes and strides, also of logits whose classes do not lie side by side."""
    student = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)).to(dtype).T
    mask = torch.tensor([True, True, False, True, False]) if masked else None
    settings = 1.0, 1.0, 0.0, 1.0, 0.0, "renormalise", True, "auto", wanted
    given = student, torch.zeros(5, 23), None, None, mask, *settings
    torch.library.opcheck(
        torch.ops.lskd.fused_distillation.default, given, test_utils=("test_schema", "test_faketensor")
    )


def test_accumulated_gradients_do_not_share_memory(device_path):
    student, teacher, *_ = inputs("dense")
    student.requires_grad_()
    fused_distillation(student, teacher).loss.backward()
    once = student.grad.clone()
    fused_distillation(student, teacher).loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"hard_weight": 1.1}, "hard_weight is 1.1"),
        ({"hard_weight": 0.5, "labels": None}, "no labels were given"),
        ({"alpha": 1.5}, "alpha"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"impl": "fast"}, "impl is 'fast'; it must be one of auto"),
        ({"mask": torch.ones(7, 5)}, "mask has dtype"),
        ({"mask": torch.ones(7, dtype=torch.bool)}, "shape of mask"),
        ({"labels": torch.zeros(7, dtype=torch.long)}, "shape of labels"),
        ({"labels": torch.full((7, 5), 23)}, "labels"),
        ({"labels": torch.zeros(7, 5)}, "label probabilities have shape"),
        *[({"teacher": torch.zeros(*shape)}, "teacher logits have shape") for shape in OTHER_SHAPES],
        ({"labels": torch.full((7, 5), -100)}, "-100"),
        (
            {"teacher": TopK(torch.zeros(7, 5, 24), torch.zeros(7, 5, 24, dtype=torch.long))},
            "1 to all classes",
        ),
        ({"teacher": TopK(torch.zeros(7, 5, 2), torch.full((7, 5, 2), 23))}, "top-K ids"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    student, teacher, labels, mask = inputs("dense")
    arguments = {"student_logits": student, "teacher": teacher, "labels": labels, "mask": mask} | change
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=message):
            fused_distillation(**({"impl": impl} | arguments))


def test_a_single_class_leaves_nothing_to_learn(device_path):
    student, labels = torch.randn(3, 1), torch.zeros(3, dtype=torch.long)
    for impl in ("auto", "reference"):
        terms, gradient = computed(student, -student, labels, None, hard_weight=0.5, alpha=0.1, impl=impl)
        assert terms.loss == terms.hard_cross_entropy == 0
        assert not gradient.any()
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        fused_distillation(student, student, labels, alpha=1.5)


def test_a_teacher_in_float64_is_centred_before_it_is_rounded(device_path):
    student, teacher, labels, mask = inputs("dense")
    far = teacher.double() + 1e9
    found, gradient = computed(student, far, labels, mask, hard_weight=0.5)
    expected, its_gradient = computed(student, (far - 1e9).float(), labels, mask, hard_weight=0.5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, its_gradient)


def test_vocabulary_sized_input_with_the_chunks_of_every_day(monkeypatch):
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(96, 10_000, generator=generator)
    teacher = torch.randn(96, 10_000, generator=generator)
    fused, gradient, plain, expected = both(student, teacher, None, None)
    torch.testing.assert_close(fused.loss.double(), plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_chunk_is_as_many_rows_as_its_device_takes(on_cpu, monkeypatch):
    """And at least one: what bounds the memory beside the gradient."""
    made, place = [], chunks.Place

    def spied(rows, *arguments):
        made.append(rows)
        return place(rows, *arguments)

    monkeypatch.setattr(chunks, "Place", spied)
    monkeypatch.setattr(chunks, "on_cpu", lambda tensor: on_cpu)
    monkeypatch.setitem(chunks._CHUNK_ELEMENTS, "cpu", 60 if on_cpu else 1000)
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS_ELSEWHERE", 1000 if on_cpu else 60)
    for classes, expected in ((15, [4, 1]), (5, [9]), (61, [1])):
        made.clear()
        fused_distillation(torch.zeros(9, classes), torch.zeros(9, classes), impl="chunks")
        assert made == expected


def test_gradient_is_the_only_tensor_of_its_size():
    """In a process of its own: its peak beside that of the naive formula, above what the inputs need."""
    code = """
import sys, torch
from torch.nn import functional as F
from lskd import fused_distillation
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
student = torch.randn(2048, 10_000).requires_grad_()
teacher = torch.randn(2048, 10_000)
small = torch.randn(2, 10).requires_grad_()
fused_distillation(small, torch.randn(2, 10)).loss.backward()
before = memory("VmRSS")
if sys.argv[1] == "fused":
    fused_distillation(student, teacher).loss.backward()
else:
    logs = student.log_softmax(-1), teacher.log_softmax(-1)
    F.kl_div(*logs, log_target=True, reduction="batchmean").backward()
print(memory("VmHWM") - before)
"""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, which], capture_output=True, text=True, check=True
            ).stdout
        )
        for which in ("fused", "naive")
    ]
    print(f"\npeak above the inputs: {peaks[0] / 1024:.0f} against {peaks[1] / 1024:.0f} MiB")
    assert peaks[0] <= 0.40 * peaks[1]


@pytest.mark.parametrize("kind", ["dense", "renormalise", "spread", "lump", "restrict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_and_its_parts_may_be_changed_in_place(kind, dtype, device_path):
    student, teacher, labels, mask = inputs(kind, dtype)
    arguments = {"hard_weight": 0.3, "temperature": 2.0}
    plain, changed = student.clone().requires_grad_(), student.clone().requires_grad_()
    (1.5 * fused_distillation(plain, teacher, labels, mask, **arguments).loss).backward()
    terms = fused_distillation(changed, teacher, labels, mask, **arguments)
    loss, before = terms.loss, [float(part) for part in terms[1:]]
    loss += 1
    loss /= 2
    loss *= 3
    loss.backward()
    torch.testing.assert_close(changed.grad, plain.grad)
    kl = terms.kl
    kl *= 2
    assert [float(part) for part in terms[1:]] == [before[0], 2 * before[1], *before[2:]]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_compile_the_loss_may_be_changed_in_place(backend):
    student, teacher, *_ = inputs("dense")
    torch.compiler.reset()

    def halved(logits):
        loss = fused_distillation(logits, teacher).loss
        loss /= 2
        return loss

    plain, compiled = student.clone().requires_grad_(), student.clone().requires_grad_()
    fused_distillation(plain, teacher).loss.backward()
    loss = torch.compile(halved, fullgraph=True, backend=backend)(compiled)
    loss *= 2
    loss.backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


def second_derivative(backend):
    """Ask for it where the loss is compiled."""
    student, teacher, *_ = inputs("dense")
    torch.compiler.reset()
    student.requires_grad_()
    loss = torch.compile(lambda logits: fused_distillation(logits, teacher).loss, backend=backend)(student)
    (gradient,) = torch.autograd.grad(loss * student.sum(), student, create_graph=True)
    torch.autograd.grad(gradient.sum(), student)


@pytest.mark.parametrize(
    ("backend", "message"), [("eager", r"lskd\.distillation_terms"), ("aot_eager", REFUSED_BY_AUTOGRAD)]
)
def test_under_compile_second_derivatives_are_refused(backend, message):
    """Also of what the loss is multiplied with, where the rest of the second derivative would be left."""
    with pytest.raises(RuntimeError, match=message):  # "eager" leaves it to us, the others to AOTAutograd
        second_derivative(backend)


def test_under_inductor_second_derivatives_are_refused():
    """By itself: torch compiles nothing below a path with a blank, and takes TMPDIR when it is imported."""
    code = "import test_fused; test_fused.second_derivative('inductor')"
    environment = os.environ | {"TMPDIR": "/tmp", "PYTHONPATH": str(Path(__file__).parent)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode
    assert re.search(f"^RuntimeError.*({REFUSED_BY_AUTOGRAD})", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_are_refused_in_one_line_and_the_plain_terms_go_through_them(compiled):
    student, dense, *_ = inputs("dense")
    student, dense = student[0], dense[0]
    torch.compiler.reset()

    def loss(logits, given):
        return fused_distillation(logits, given).loss

    for transform in (torch.func.grad, torch.vmap, torch.func.jacrev):
        transformed = transform(loss)
        if compiled:
            transformed = torch.compile(transformed, backend="eager")
        with pytest.raises(RuntimeError) as error:
            transformed(student, dense)
        assert str(error.value).splitlines()[0].endswith("build the loss from lskd.distillation_terms")
    values, ids = dense.log_softmax(-1).topk(4)
    expected = distillation_terms(student, TopK(values, ids, "spread")).kl

    def plain(logits, values, ids):
        return distillation_terms(logits, TopK(values, ids, "spread")).kl

    torch.testing.assert_close(torch.vmap(plain)(student, values, ids), expected)
    gradients = torch.vmap(torch.func.grad(plain))(student, values, ids)
    leaf = student.clone().requires_grad_()
    plain(leaf, values, ids).sum().backward()
    torch.testing.assert_close(gradients, leaf.grad)


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:, :1].expand(SHAPE),
        lambda x: torch.stack([x, x], -1)[..., 0],
    ],
    ids=["transposed", "expanded", "every second number"],
)
def test_inputs_of_any_stride_under_autocast(strided, device_path):
    student, teacher, labels, mask = inputs("dense")
    leaf, expected, given = (x.clone().requires_grad_() for x in (student, student, teacher))
    arguments = {"hard_weight": 0.3, "temperature": 2.0}
    plain = fused_distillation(
        strided(expected).contiguous(), strided(teacher).contiguous(), labels, mask, **arguments
    )
    with torch.autocast("cpu", torch.bfloat16):
        fused = fused_distillation(strided(leaf), strided(given), labels, mask, **arguments)
    (fused.loss * 3).backward()
    (plain.loss * 3).backward()
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(leaf.grad, expected.grad)
    assert given.grad is None


# NaN

NAN_BITS = {  # the plainest, quiet with a payload, signalling; of either sign
    torch.float32: (torch.int32, [0x7FC00000, 0x7FFFFFFF, 0x7FC00001, 0x7F800001]),
    torch.float64: (torch.int64, [0x7FF8 << 48, 2**63 - 1, (0x7FF8 << 48) + 1, (0x7FF0 << 48) + 1]),
    torch.bfloat16: (torch.int16, [0x7FC0, 0x7FFF, 0x7FC1, 0x7F81]),
    torch.float16: (torch.int16, [0x7E00, 0x7FFF, 0x7E01, 0x7C01]),
}


def rows_with_nan(dtype, classes, mean):
    """Return rows of which each has one NaN, at every place and of every kind; some have an infinity too."""
    integers, patterns = NAN_BITS[dtype]
    low = torch.iinfo(integers).min
    bits = torch.tensor([*patterns, *(pattern + low for pattern in patterns)], dtype=integers)
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(classes * len(bits), classes, generator=generator) + mean).to(dtype)
    number = torch.arange(len(rows))
    place = number // len(bits)
    rows[number[::3], (place[::3] + 1) % classes] = -math.inf
    rows[number[1::3], (place[1::3] + 2) % classes] = math.inf
    rows.view(integers)[number, place] = bits[number % len(bits)]
    assert bool(rows.isnan().any(-1).all())
    return rows


def assert_nan_comes_out(loss_of, dtype, classes=19, mean=0.0):
    """In student or teacher, NaN in a row is NaN in its loss and in its gradient, and in no other row's."""
    broken = rows_with_nan(dtype, classes, mean)
    sound = (torch.randn(broken.shape, generator=torch.Generator().manual_seed(1)) + mean).to(dtype)
    broken = torch.cat([broken, sound[:1]])
    sound = torch.cat([sound, sound[:1]])
    for student, teacher in ((broken, sound), (sound, broken)):
        leaf = student.clone().requires_grad_()
        loss_of(leaf, teacher).sum().backward()
        found = leaf.grad.isnan().any(-1)
        assert bool(found[:-1].all())
        assert not found[-1]
        with torch.no_grad():
            losses = torch.stack(
                [loss_of(student[i : i + 1], teacher[i : i + 1]).sum() for i in range(len(student))]
            )
        assert bool(losses[:-1].isnan().all())
        assert not losses[-1].isnan()


EVERY_PATH = [("native", torch.float32), *itertools.product(["chunks", "elsewhere"], NAN_BITS)]


@pytest.mark.parametrize(("device_path", "dtype"), EVERY_PATH, indirect=["device_path"])
@pytest.mark.parametrize(("temperature", "labelled"), [(1.0, True), (2.0, False), (2.0, True)])
def test_any_nan_comes_out(temperature, labelled, dtype, device_path):
    def loss(student, teacher):
        labels = torch.zeros(len(student), dtype=torch.long) if labelled else None
        return fused_distillation(
            student,
            teacher,
            labels,
            temperature=temperature,
            hard_weight=0.3 if labelled else 0.0,
            alpha=0.1,
            reduction="sum",
        ).loss

    assert_nan_comes_out(loss, dtype)


@pytest.mark.parametrize(("device_path", "dtype"), EVERY_PATH[1:], indirect=["device_path"])
@pytest.mark.parametrize("rest", ["renormalise", "spread", "lump"])
def test_any_nan_of_a_top_k_teacher_comes_out(rest, dtype, device_path):
    def loss(student, teacher):
        ids = torch.arange(3, 12).expand(len(teacher), 9)
        student = torch.nn.functional.pad(student, (0, 3))  # of classes 0 to 2 the teacher says nothing
        return fused_distillation(student, TopK(teacher, ids, rest), reduction="sum").loss

    assert_nan_comes_out(loss, dtype, classes=9, mean=-40)


@pytest.mark.parametrize("dtype", NAN_BITS)
def test_any_nan_comes_out_of_the_plain_terms(dtype):
    assert_nan_comes_out(lambda *logits: distillation_terms(*logits).kl, dtype)


def test_a_teacher_of_weight_0_spoils_neither_loss_nor_gradient(device_path):
    for kind, temperature in itertools.product(
        ["dense", "renormalise", "spread", "lump", "restrict"], [1.0, 2.0]
    ):
        student, teacher, labels, mask = inputs(kind)
        (teacher.values if isinstance(teacher, TopK) else teacher)[0, 0, 0] = math.nan
        student.requires_grad_()
        for kept in (mask, None):
            loss = fused_distillation(
                student, teacher, labels, kept, hard_weight=1.0, temperature=temperature
            ).loss
            (gradient,) = torch.autograd.grad(loss, student)
            assert loss.isfinite()
            assert gradient.isfinite().all()


def test_labels_of_weight_0_spoil_neither_loss_nor_gradient(device_path):
    student, teacher, labels, mask = inputs("label rows")
    labels[tuple(mask.nonzero()[0])] = math.nan
    for kept, temperature in itertools.product([mask, None], [1.0, 2.0]):
        terms, gradient = computed(student, teacher, labels, kept, temperature=temperature)
        assert terms.hard_cross_entropy.isnan()
        assert terms.loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["dense", "renormalise", "spread", "lump", "restrict", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_device_without_float64(kind, temperature, monkeypatch, without_float64):
    student, teacher, labels, mask = inputs(kind)
    if isinstance(teacher, TopK):
        teacher = TopK(teacher.values.float(), teacher.ids, teacher.rest)
    arguments = {"temperature": temperature, "hard_weight": 0.3, "alpha": 0.1}
    expected = both(student, teacher, labels, mask, **arguments)
    monkeypatch.setattr(chunks, "on_cpu", lambda tensor: False)
    monkeypatch.setattr(native, "function", lambda: None)
    leaf = student.clone().requires_grad_()
    with without_float64():
        fused = fused_distillation(leaf, teacher, labels, mask, **arguments)
        (fused.loss * 3).backward()
        terms = distillation_terms(student, teacher, temperature)
    for ours, theirs in zip(fused[:6], expected[0][:6], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.kl[mask].mean(), fused.kl, rtol=1e-5, atol=1e-5)
