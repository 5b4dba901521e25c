"""A fast teacher whose answers are stored: what the manifest says of it, and who may read them."""

import shutil

import numpy as np
import pytest
import torch

from lskd import FrozenTeacher, SoftLabels
from lskd.soft_labels.run import StoredRun
from lskd.teachers import fast as fast_teacher_module

pytestmark = pytest.mark.unit
STUDENT = ["--batch-size", "20", "--epochs", "1", "--scale", "0.3", "1", "--kd-soft-labels-top-k", "0"]
FORMS = ["float32", "bfloat16", "int8"]


@pytest.fixture
def stores(student, tmp_path_factory, request):
    """A store of each form, one epoch, written once for all tests."""
    made = request.config.fast_stores = getattr(request.config, "fast_stores", {})
    if not made:
        folder = tmp_path_factory.mktemp("stores")
        for form in ("none", *FORMS):
            student(f"writes {form}", "--kd-teacher-fast", form, where=folder / form)
            made[form] = folder / form
    return made


def form_of(store):
    return SoftLabels(store).identity["teacher_form"]


needs_eight_bits = pytest.mark.skipif(
    "int8" not in fast_teacher_module.supported_modes(torch.device("cpu")), reason="CPU: no VNNI"
)
needs_bfloat16 = pytest.mark.skipif(
    "bfloat16" not in fast_teacher_module.supported_modes(torch.device("cpu")),
    reason="CPU: no AVX512_BF16",
)


@needs_eight_bits
@needs_bfloat16
def test_the_manifest_says_how_the_teacher_was_made_and_measured(stores):
    exact = SoftLabels(stores["none"]).take(np.arange(96)).values.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    assert form_of(stores["none"]) == {"mode": "exact"}
    for form in FORMS:
        content = form_of(stores[form])
        assert content["mode"] == form
        assert "15 of 15 batch norms folded" in content["made"]
        assert content["images"] == 72
        assert 0 <= content["mean_kl"] <= min(content["max_kl"], 0.01)
        fast = SoftLabels(stores[form]).take(np.arange(96)).values.astype(np.float64)
        fast -= np.log(np.exp(fast).sum(-1, keepdims=True))
        # What is stored is as far from the exact teacher as was measured on other images.
        kl = (np.exp(exact) * (exact - fast)).sum(-1).mean()
        assert not np.array_equal(exact, fast)
        assert kl == pytest.approx(content["mean_kl"], rel=4, abs=1e-10), form


@needs_eight_bits
@needs_bfloat16
@pytest.mark.parametrize(
    ("stored", "asked", "words"),
    [
        *[(form, "none", ["asks for the exact teacher", f"({form}): KL(exact || fast)"]) for form in FORMS],
        ("bfloat16", "float32", ["asks for float32, which is closer to the exact one"]),
        ("int8", "bfloat16", ["asks for bfloat16, which is closer to the exact one"]),
    ],
)
def test_a_store_with_more_liberties_than_asked_for_is_refused(student, stores, stored, asked, words):
    result = student("reads", "--kd-teacher-fast", asked, where=stores[stored], status=2)
    result.assert_one_clear_line(*words, "another folder")


@needs_eight_bits
@needs_bfloat16
@pytest.mark.parametrize(
    ("stored", "asked", "line"),
    [
        ("int8", "int8", "of a fast teacher (int8): KL(exact || fast)"),
        ("int8", "auto", "of a fast teacher (int8): KL(exact || fast)"),
        ("float32", "int8", "of a fast teacher (float32): KL(exact || fast)"),
        ("none", "int8", "of the exact teacher, taken instead of int8"),
    ],
)
def test_what_is_at_least_as_exact_is_read_and_said(student, stores, monkeypatch, stored, asked, line):
    monkeypatch.setattr(FrozenTeacher, "__init__", lambda *a, **k: pytest.fail("a teacher was built"))
    out = student("reads", "--kd-teacher-fast", asked, where=stores[stored]).out
    assert line in out
    assert ("instead of" in out) == (stored != asked and asked != "auto")


@needs_eight_bits
def test_a_store_beyond_this_runs_bound_is_refused(student, stores):
    flags = ["--kd-teacher-fast", "int8", "--kd-teacher-fast-bound", "1e-9"]
    student("reads", *flags, where=stores["int8"], status=2).assert_one_clear_line(
        "bound of this run is 1e-09"
    )


@needs_eight_bits
@pytest.mark.parametrize("asked", ["auto", "int8"])
def test_more_epochs_are_of_the_form_that_is_there(student, stores, tmp_path, same_weights, asked):
    """Float32 though int8 would be allowed, and the reader gets what the writer got."""
    shutil.copytree(stores["float32"], tmp_path / "store")
    before = form_of(tmp_path / "store")
    out = student("goes on", "--kd-teacher-fast", asked, "--epochs", "2").out
    assert "fast: float32, " in out
    assert len(SoftLabels(tmp_path / "store")) == 192
    assert form_of(tmp_path / "store") == before
    student("reads", "--kd-teacher-fast", "float32", "--epochs", "2")
    assert same_weights("goes on", "reads")


@needs_eight_bits
def test_a_form_that_cannot_be_had_here_is_not_continued(student, stores, tmp_path, monkeypatch):
    shutil.copytree(stores["int8"], tmp_path / "store")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    result = student("goes on", "--kd-teacher-fast", "int8", "--epochs", "2", status=2)
    result.assert_one_clear_line("here the teacher is float32, since int8 cannot be had")
    assert len(SoftLabels(tmp_path / "store")) == 96
    student("reads", "--kd-teacher-fast", "int8")  # which needs no teacher


@needs_eight_bits
@needs_bfloat16
def test_verifying_with_the_tolerance_of_the_form(student, stores, rewritten):
    """In other batches."""
    tolerances = {"float32": "0.01", "bfloat16": "0.1", "int8": "0.1"}
    for form, tolerance in tolerances.items():
        flags = ["--kd-teacher-fast", form, "--kd-soft-labels-verify", "96", "--batch-size", "7"]
        out = student(f"verifies {form}", *flags, where=stores[form]).out
        assert f"({tolerance} is allowed of a teacher in {form})" in out

    def shift(values, ids, seeds):
        values[:] = np.roll(values, 1, 0)

    flags = ["--kd-teacher-fast", "int8", "--kd-soft-labels-verify", "96"]
    result = student("verifies", *flags, where=rewritten(stores["int8"], shift), status=2)
    result.assert_one_clear_line("not what the teacher says", "allowed of a teacher in int8")


@needs_eight_bits
def test_ahead_of_time(ahead, stores, tmp_path):
    result = ahead("--kd-teacher-fast", "int8")
    assert result.status == 0, result.err
    assert "of a fast teacher (int8): KL(exact || fast)" in result.out
    first, trained = SoftLabels(tmp_path / "store"), SoftLabels(stores["int8"])
    assert form_of(tmp_path / "store") == form_of(stores["int8"])
    keys = np.arange(96)
    np.testing.assert_allclose(first.take(keys).values, trained.take(keys).values, atol=0.05)


def test_a_form_of_a_later_release_is_refused(student, stores, rewritten):
    rewritten(stores["none"], teacher_form={"mode": "int4"})
    result = student("reads", "--kd-teacher-fast", "auto", status=2)
    result.assert_one_clear_line("a form that this release does not know")


def test_soft_labels_without_a_form_are_of_the_exact_teacher(student, stores, rewritten):
    """As they were written before there were others."""
    store = rewritten(stores["none"], rows=50, teacher_form=None)
    student("goes on")
    assert SoftLabels(store).complete
    assert "teacher_form" not in SoftLabels(store).identity


def test_a_new_store_waits_until_the_fast_teacher_is_made(tmp_path):
    from lskd.soft_labels.settings import StoreSettings

    layout = StoreSettings(tmp_path).layout(tmp_path, 4, 3, 1)
    run = StoredRun(tmp_path / "store", layout, {}, seed=0, teacher="auto")
    with pytest.raises(RuntimeError, match="speaks before"):
        run.open_writer()
    assert not (tmp_path / "store").exists()
