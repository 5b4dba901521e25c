"""A run that reads what is stored and stores what is not, without any trainer."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from lskd import DistillationLoss, SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import stored_difference, stored_form, teacher_form
from lskd.soft_labels.run import SCRATCH, StoredRun, image_layout
from lskd.teachers.replay import augmentation_seed

pytestmark = pytest.mark.unit
CLASSES, SAMPLES = 6, 11
LOGITS = torch.randn(3 * SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def answers(keys):
    for part in np.array_split(keys, 2):
        yield part, LOGITS[part]


def run(path, epochs=2, **changes):
    layout = image_layout(path, CLASSES, SAMPLES, epochs, top_k=3)
    return StoredRun(path, layout, {"teacher": "a"}, **({"seed": 5, "say": lambda line: None} | changes))


def test_an_epoch_is_what_was_recorded_and_what_the_teacher_says_about_the_rest(tmp_path):
    first = run(tmp_path / "store")
    first.open_writer()
    order = np.random.default_rng(0).permutation(SAMPLES)[:8]
    values, _ = first.record(order, LOGITS[order])
    asked = []
    first.complete(SAMPLES, lambda keys: asked.extend(keys) or answers(keys))
    first.close()
    assert sorted([*asked, *order]) == list(range(SAMPLES))
    assert (first.epochs, len(SoftLabels(tmp_path / "store"))) == (1, SAMPLES)
    rows = SoftLabels(tmp_path / "store").take(np.arange(SAMPLES))
    np.testing.assert_array_equal(rows.values[order], values.numpy())
    np.testing.assert_array_equal(rows.seeds, augmentation_seed(5, 0, np.arange(SAMPLES)))
    log_p = LOGITS[:SAMPLES].double().log_softmax(-1).numpy()
    np.testing.assert_allclose(rows.values, -np.sort(-log_p, -1)[:, :3], rtol=1e-3)
    later = run(tmp_path / "store", epochs=3)
    assert later.epochs == 1
    assert later.labels is not None
    assert "at most" in later.verify(answers, 5, 0.01)


def test_rows_of_several_processes_come_out_in_order(tmp_path):
    """Three processes, here threads, each with a third of an epoch; the last images nobody has recorded."""
    ranks = 3
    said, barrier = [None] * ranks, Barrier(ranks, timeout=60)

    class Run(StoredRun):
        def _agree(self, error):
            said[self.rank] = error
            barrier.wait()
            found = next((each for each in said if each), None)
            barrier.wait()
            return found

    layout = image_layout(tmp_path / "store", CLASSES, SAMPLES, 2, top_k=3)
    order = np.random.default_rng(0).permutation(SAMPLES)

    def process(rank):
        one = Run(tmp_path / "store", layout, {}, seed=5, rank=rank, processes=ranks)
        one.open_writer()
        asked = []
        for epoch in range(2):
            first = epoch * SAMPLES
            for keys in (first + order[rank:8:3], first + order[:1]):  # one sample that every process has
                one.record(keys, LOGITS[keys])
            one.complete(first + SAMPLES, lambda keys: asked.extend(keys) or answers(keys))
        one.close()
        return asked

    with ThreadPoolExecutor(ranks) as pool:
        asked = sorted(key for keys in pool.map(process, range(ranks)) for key in keys)
    assert asked == sorted([*order[8:], *(SAMPLES + order[8:])])
    labels = SoftLabels(tmp_path / "store")
    labels.verify()
    assert labels.complete
    values, ids = stored_form(LOGITS, layout)
    keys = np.array([5, 2 * SAMPLES - 1, 0])
    taken = labels.take(keys)
    np.testing.assert_array_equal(taken.values, values[keys])
    np.testing.assert_array_equal(taken.ids, ids[keys])
    assert not (tmp_path / "store" / SCRATCH).exists()


@pytest.mark.parametrize("written", [0, 5])
def test_what_an_ended_process_left_does_not_count(tmp_path, written):
    """Neither what it had recorded, nor an epoch that was cut off while it was written in order."""
    ended = run(tmp_path)
    ended.open_writer()
    ended.record(np.arange(SAMPLES), torch.zeros(SAMPLES, CLASSES))
    values, ids = stored_form(LOGITS[:written], ended.layout)
    ended._writer.append(values.numpy(), ids.numpy(), seeds=ended.seeds(np.arange(written)))
    ended._writer.commit()
    ended._writer.close()
    assert list((tmp_path / SCRATCH).iterdir())
    later = run(tmp_path)
    assert later.keys == written
    later.open_writer()
    later.complete(SAMPLES, answers)
    later.close()
    np.testing.assert_array_equal(
        SoftLabels(tmp_path).take(np.arange(SAMPLES)).values, stored_form(LOGITS[:SAMPLES], later.layout)[0]
    )


def test_a_full_disk_is_one_line(tmp_path):
    full = run(tmp_path)
    full.open_writer()
    full.record(np.arange(3), LOGITS[:3])
    full._file.close()
    full._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(SoftLabelsError, match=r"cannot be written \(No space left on device\)"):
        full.record(np.arange(3), LOGITS[:3])


def test_written_ahead_in_order(tmp_path):
    ahead, told = run(tmp_path), []
    ahead.write_ahead(SAMPLES + 4, answers, told.append)
    ahead.close()
    assert (sum(told), ahead.keys) == (SAMPLES + 4, SAMPLES + 4)
    later = run(tmp_path)
    assert (later.keys, later.epochs) == (SAMPLES + 4, 1)
    assert "at most" in later.verify(answers, SAMPLES, 0.01)


def test_another_teacher_is_found_by_verifying(tmp_path):
    first = run(tmp_path)
    first.open_writer()
    first.complete(SAMPLES, answers)
    first.close()
    with pytest.raises(SoftLabelsError, match=r"are not what the teacher says: of image \d+ in epoch 0"):
        run(tmp_path).verify(lambda keys: [(keys, -LOGITS[keys])], SAMPLES, 0.01)


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_nothing_that_cannot_be_stored_is_stored(tmp_path, on_error):
    lines = []
    first = run(tmp_path, on_error=on_error, say=lines.append)
    first.open_writer()
    broken = torch.full((2, CLASSES), torch.nan)
    if on_error == "stop":
        with pytest.raises(SoftLabelsError, match="NaN or infinity"):
            first.record(np.arange(2), broken)
    else:
        first.record(np.arange(2), broken)
        first.record(np.arange(2), broken)
        first.complete(SAMPLES, answers)
        assert first.failed
        assert len(lines) == 1
        assert "stores nothing more" in lines[0]
    first.close()
    assert SoftLabels(tmp_path).rows == 0


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    first.open_writer()
    with pytest.raises(SoftLabelsError, match="being written by another process"):
        second.open_writer()
    first.complete(SAMPLES, answers)
    first.close()
    with pytest.raises(SoftLabelsError, match="was written by another run meanwhile"):
        second.open_writer()
    run(tmp_path).open_writer()


def test_what_was_not_asked_for_is_as_in_the_store(tmp_path):
    assert image_layout(tmp_path / "none", 1000, 4, 1).k == 10
    everything = image_layout(tmp_path / "none", 4, 4, 1)
    assert (everything.k, everything.values, everything.seeds) == (4, "float32", True)
    layout = image_layout(tmp_path / "none", 50, 4, 1, top_k=7, values="float32")
    SoftLabelsWriter(tmp_path / "there", layout, {}).close()
    with SoftLabelsWriter(tmp_path / "there", layout, {}):
        pass
    there = image_layout(tmp_path / "there", 50, 4, 3)
    assert (there.k, there.values, there.epochs) == (7, "float32", 3)


@pytest.mark.parametrize("k", [2, CLASSES])
def test_difference_against_numpy(k):
    layout = image_layout("nowhere", CLASSES, SAMPLES, 1, top_k=k, values="float32")
    values, ids = (part.numpy() for part in stored_form(LOGITS[:4], layout))
    now = LOGITS[4:8].double().numpy()
    said = now - np.log(np.exp(now).sum(-1, keepdims=True))
    stored = values.astype(np.float64)
    if k == CLASSES:
        stored -= np.log(np.exp(stored).sum(-1, keepdims=True))
    said, stored = np.maximum(np.take_along_axis(said, ids, -1), -15), np.maximum(stored, -15)
    expected = (np.abs(said - stored) / (1 + np.abs(stored))).max(-1)
    np.testing.assert_allclose(stored_difference(values, ids, LOGITS[4:8]), expected, rtol=1e-9)
    assert stored_difference(values, ids, LOGITS[:4]).max() < 1e-6
    assert stored_difference(values, ids, LOGITS[:4] * torch.nan).isinf().all()


def layout_of(k=3, **changes):
    base = {"num_classes": CLASSES, "k": k, "samples": SAMPLES, "epochs": 2, "rows_per_sample": 1}
    return SoftLabelsLayout(**(base | {"seeds": True} | changes))


def test_epochs_may_grow_and_nothing_else(tmp_path):
    values, ids = stored_form(LOGITS[:SAMPLES], layout_of())
    with SoftLabelsWriter(tmp_path, layout_of(epochs=1), {"a": 1}) as writer:
        writer.append(values.numpy(), ids.numpy(), seeds=np.zeros(SAMPLES))
        assert writer.complete
    with SoftLabelsWriter(tmp_path, layout_of(epochs=3), {"a": 1}) as writer:
        assert not writer.complete
        assert (writer.keys, writer.layout.epochs) == (SAMPLES, 3)
    assert SoftLabels(tmp_path).layout.epochs == 3
    with SoftLabelsWriter(tmp_path, layout_of(epochs=2), {"a": 1}) as writer:
        assert writer.layout.epochs == 3
    for change in ({"k": 2}, {"samples": 22}, {"values": "float32"}, {"seeds": False}):
        with pytest.raises(SoftLabelsError, match=f"layout.{next(iter(change))}"):
            SoftLabelsWriter(tmp_path, layout_of(**change), {"a": 1})


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_classes_in_float32_give_the_arithmetic_of_the_logits(temperature):
    shape = layout_of(k=CLASSES, values="float32")
    loss = DistillationLoss(temperature)
    student = torch.randn(3 * SAMPLES, CLASSES)
    said = teacher_form(*stored_form(LOGITS, shape), CLASSES)
    assert torch.equal(loss(student, said), loss(student, LOGITS))


def test_top_k_in_half_precision_is_close_to_the_whole():
    student = torch.randn(3 * SAMPLES, CLASSES)
    whole = DistillationLoss()(student, LOGITS)
    losses = {}
    for k in (1, 3, 5, 6):
        said = teacher_form(*stored_form(LOGITS, layout_of(k=k)), CLASSES, "spread")
        losses[k] = abs(float(DistillationLoss()(student, said) - whole))
    assert losses[6] < 2e-3
    assert losses[5] < 2e-3
    assert losses[3] < 0.05
