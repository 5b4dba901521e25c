"""Rows that come in any order from several processes; what is stored of logits; stores that grow."""

import numpy as np
import pytest
import torch

from lskd import DistillationLoss, SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import stored_form, teacher_form
from lskd.soft_labels.run import RowCollector

pytestmark = pytest.mark.unit
CLASSES, SAMPLES = 7, 23


def layout(**changes):
    base = {"num_classes": CLASSES, "k": 3, "samples": SAMPLES, "epochs": 2}
    return SoftLabelsLayout(**(base | {"rows_per_sample": 1, "seeds": True} | changes))


def logits():
    return torch.randn(2 * SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1)) * 3


def add(collector, shape, keys):
    values, ids = (part.numpy() for part in stored_form(logits()[keys], shape))
    collector.add(keys, values, ids, keys + 100)


def fill(collector):
    add(collector, layout(), np.arange(SAMPLES))


def test_rows_of_several_processes_come_out_in_order(tmp_path):
    shape = layout()
    order = np.random.default_rng(0).permutation(SAMPLES)
    with SoftLabelsWriter(tmp_path, shape, {}) as writer:
        collectors = [RowCollector(tmp_path, shape, rank) for rank in range(3)]
        collectors[0].clear()
        for epoch in range(2):
            first = epoch * SAMPLES
            for collector in collectors:
                add(collector, shape, first + order[collector.rank : 18 : 3])
                add(collector, shape, first + order[:1])  # a sample that every process has
            missing = collectors[1].missing(first, first + SAMPLES)
            assert missing.tolist() == sorted(first + order[18:])
            with pytest.raises(ValueError, match="5 keys"):
                collectors[0].append_to(writer, first + SAMPLES)
            add(collectors[2], shape, missing)
            collectors[0].append_to(writer, first + SAMPLES)
            for collector in collectors:
                collector.restart()
        assert writer.complete
    labels = SoftLabels(tmp_path)
    labels.verify()
    values, ids = stored_form(logits(), shape)
    keys = np.array([5, 40, 0])
    taken = labels.take(keys)
    np.testing.assert_array_equal(taken.values, values[keys])
    np.testing.assert_array_equal(taken.ids, ids[keys])
    np.testing.assert_array_equal(taken.seeds, keys + 100)
    with pytest.raises(IndexError, match="key 46"):
        labels.take([0, 46])


def test_what_an_ended_process_left_does_not_count(tmp_path):
    shape = layout()
    with SoftLabelsWriter(tmp_path, shape, {}) as writer:
        for rank in range(2):
            left = RowCollector(tmp_path, shape, rank)
            add(left, shape, np.arange(SAMPLES))
        collector = RowCollector(tmp_path, shape)
        collector.clear()
        assert len(collector.missing(0, SAMPLES)) == SAMPLES
        assert writer.keys == 0


def test_an_epoch_that_was_cut_off_is_gone_on_with(tmp_path):
    shape = layout()
    values, ids = stored_form(logits(), shape)
    with SoftLabelsWriter(tmp_path, shape, {}) as writer:
        writer.append(values[:9].numpy(), ids[:9].numpy(), seeds=np.arange(9) + 100)
    with SoftLabelsWriter(tmp_path, shape, {}) as writer:
        collector = RowCollector(tmp_path, shape)
        add(collector, shape, np.arange(SAMPLES)[::-1].copy())
        collector.append_to(writer, SAMPLES)
        assert writer.keys == SAMPLES
    np.testing.assert_array_equal(SoftLabels(tmp_path).take(np.arange(SAMPLES)).values, values[:SAMPLES])


def test_epochs_may_grow_and_nothing_else(tmp_path):
    values, ids = stored_form(logits()[:SAMPLES], layout())
    with SoftLabelsWriter(tmp_path, layout(epochs=1), {"a": 1}) as writer:
        writer.append(values.numpy(), ids.numpy(), seeds=np.zeros(SAMPLES))
        assert writer.complete
    with SoftLabelsWriter(tmp_path, layout(epochs=3), {"a": 1}) as writer:
        assert not writer.complete
        assert (writer.keys, writer.layout.epochs) == (SAMPLES, 3)
    assert SoftLabels(tmp_path).layout.epochs == 3
    with SoftLabelsWriter(tmp_path, layout(epochs=2), {"a": 1}) as writer:
        assert writer.layout.epochs == 3
    for change in ({"k": 2}, {"samples": 22}, {"values": "float32"}, {"seeds": False}):
        with pytest.raises(SoftLabelsError, match=f"layout.{next(iter(change))}"):
            SoftLabelsWriter(tmp_path, layout(**change), {"a": 1})


def test_a_full_disk_is_one_line(tmp_path):
    collector = RowCollector(tmp_path, layout())
    add(collector, layout(), np.arange(3))
    collector._file.close()
    collector._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(SoftLabelsError, match=r"cannot be written \(No space left on device\)"):
        fill(collector)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_classes_in_float32_give_the_arithmetic_of_the_logits(temperature):
    shape = layout(k=CLASSES, values="float32")
    loss = DistillationLoss(temperature)
    student = torch.randn(2 * SAMPLES, CLASSES)
    said = teacher_form(*stored_form(logits(), shape), CLASSES)
    assert torch.equal(loss(student, said), loss(student, logits()))


def test_top_k_in_half_precision_is_close_to_the_whole():
    student = torch.randn(2 * SAMPLES, CLASSES)
    whole = DistillationLoss()(student, logits())
    losses = {}
    for k in (1, 3, 5, 6, 7):
        said = teacher_form(*stored_form(logits(), layout(k=k)), CLASSES, "spread")
        losses[k] = abs(float(DistillationLoss()(student, said) - whole))
    assert losses[7] < 2e-3
    assert losses[6] < 2e-3
    assert losses[3] < 0.05
