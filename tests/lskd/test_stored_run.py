"""A run that reads what is stored and stores what is not, without any trainer."""

import numpy as np
import pytest
import torch

from lskd import SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels.forms import stored_difference, stored_form
from lskd.soft_labels.run import StoredRun, image_layout
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
