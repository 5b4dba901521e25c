"""A run that reads what is stored and stores what is not, without any trainer."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import special

from lskd import DistillationLoss, SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout, read_manifest
from lskd.soft_labels.forms import TOLERANCE, check_reading, stored_difference, stored_form, teacher_form
from lskd.soft_labels.own_error import ROWS, OwnErrorMeter
from lskd.soft_labels.run import SCRATCH, StoredRun
from lskd.soft_labels.settings import StoreSettings
from lskd.teachers.replay import augmentation_seed
from lskd.terms import Rest

pytestmark = pytest.mark.unit
CLASSES, SAMPLES = 6, 11
LOGITS = torch.randn(3 * SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def answers(keys):
    for part in np.array_split(keys, 2):
        yield part, LOGITS[part]


def image_layout(path, classes, samples, epochs, top_k=None, **asked):
    return StoreSettings(path, top_k=top_k, **asked).layout(Path(path), classes, samples, epochs)


def run(path, epochs=2, top_k=3, sampled=None, views=0, **changes):
    layout = image_layout(path, CLASSES, SAMPLES, epochs, top_k, sampled=sampled, views=views)
    return StoredRun(path, layout, {"teacher": "a"}, **({"seed": 5, "say": lambda line: None} | changes))


def grow(path, epochs, views=0):
    ahead = run(path, 3, views=views)
    ahead.write_ahead(epochs * SAMPLES, answers)
    ahead.close()


def of_threads(ranks):
    """Return a run whose processes are threads of this one, and what calls a function of a rank in each."""
    said, barrier = [None] * ranks, Barrier(ranks, timeout=60)

    class Run(StoredRun):
        def _gather(self, own):
            said[self.rank] = own
            barrier.wait()
            found = list(said)
            barrier.wait()
            return found

    def call(process):
        with ThreadPoolExecutor(ranks) as pool:
            return [pool.submit(process, rank) for rank in range(ranks)]

    return Run, call


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


@pytest.mark.parametrize("late", [False, True, None])
def test_rows_of_several_processes_come_out_in_order(late, tmp_path, monkeypatch):
    """Three processes, here threads, each with a third of an epoch; the last images nobody has recorded.

    Late: what they add appears when it is waited for, as on a network's file system; or, None, it never does.
    """
    ranks = 3
    Threads, call = of_threads(ranks)
    hidden = tmp_path / "hidden"
    hidden.mkdir()

    class Run(Threads):
        PATIENCE = 60 if late else 0

        def _add(self, *given):
            super()._add(*given)
            if late is not False and self._own_file.exists():
                self._own_file.rename(hidden / self._own_file.name)

    def appear(_):
        for file in hidden.iterdir():
            with suppress(FileNotFoundError):  # another one has
                file.rename(tmp_path / "store" / SCRATCH / file.name)

    clock = SimpleNamespace(sleep=appear, monotonic=time.monotonic)
    monkeypatch.setattr("lskd.soft_labels.run.time", clock)
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

    ended = call(process)
    if late is None:
        for one in ended:
            with pytest.raises(SoftLabelsError, match=r"another process wrote to .*store has not appeared"):
                one.result()
        return
    asked = sorted(key for one in ended for key in one.result())
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


@pytest.mark.parametrize(
    ("arriving", "error"),
    [(9, None), (0, "must see one folder$"), (1, r"one folder \(one sees: .*176 bytes of 352 are there\)$")],
)
def test_what_only_one_process_sees_is_waited_for_by_all(arriving, error, tmp_path, monkeypatch):
    """Another computer sees the store's files appear one by one, the manifest first, or only some of them.

    They begin with one view and store a second one; where it does not appear, both of them end.
    """
    grow(tmp_path / "store", 1, views=2)
    Threads, call = of_threads(2)
    ticks, arrivals = count(), []
    monkeypatch.setattr(
        "lskd.soft_labels.run.time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: next(ticks))
    )

    class Run(Threads):
        PATIENCE = 40

        def _look(self):
            try:
                return super()._look()
            finally:
                if self.rank and arrivals:  # seen when it looks again
                    name = arrivals.pop(0)
                    shutil.copy(tmp_path / "store" / name, tmp_path / "new")
                    (tmp_path / "new").rename(tmp_path / "other" / name)

    def process(rank):
        folder = tmp_path / ("other" if rank else "store")
        layout = image_layout(tmp_path / "store", CLASSES, SAMPLES, 2, 3, views=2)
        one = Run(folder, layout, {"teacher": "a"}, seed=5, rank=rank, processes=2)
        one._scratch = tmp_path / "store" / SCRATCH
        assert one.epochs == 1
        one.open_writer()
        arrivals[:] = files[:arriving]
        keys = torch.arange(SAMPLES, 2 * SAMPLES)
        one.record(keys, LOGITS[keys])
        with closing(one):
            one.complete(2 * SAMPLES, answers)
        assert one.stored(keys) is not None
        return one.epochs

    (tmp_path / "other").mkdir()
    files = sorted(file.name for file in (tmp_path / "store").iterdir() if file.name != "lock")
    files.sort(key=lambda name: name != "manifest.json")
    arrivals[:] = files
    for one in call(process):
        if error is None:
            assert one.result() == 2
            continue
        with pytest.raises(SoftLabelsError, match=error):
            one.result()


def test_a_store_that_grows_while_it_is_opened_is_the_same_for_all(tmp_path):
    """One process sees an epoch, the other two; and then there are three."""
    grow(tmp_path, 1)
    Threads, call = of_threads(2)
    looked, grown = Event(), Event()

    class Run(Threads):
        PATIENCE = 1

        def _look(self):
            if not self.rank:
                found = super()._look()
                looked.set()
                return found
            looked.wait(60)
            if grown.is_set():
                return super()._look()
            grow(tmp_path, 2)
            found = super()._look()
            grow(tmp_path, 3)
            grown.set()
            return found

    def process(rank):
        layout = image_layout(tmp_path, CLASSES, SAMPLES, 1, 3)
        return Run(tmp_path, layout, {"teacher": "a"}, seed=5, rank=rank, processes=2).keys

    assert [one.result() for one in call(process)] == [3 * SAMPLES] * 2


def test_views_are_stored_once_and_read_in_turn(tmp_path):
    """Five epochs of two views: the third reads what the first has stored, in this run and in later ones."""
    first = run(tmp_path / "store", epochs=5, views=2)
    assert [first.layout.stored_epoch(epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]
    first.open_writer()
    said = []
    for view in range(2):
        keys = torch.arange(SAMPLES) + view * SAMPLES
        assert first.stored(keys) is None
        said.append(first.record(keys, LOGITS[keys]))
        first.complete((view + 1) * SAMPLES, lambda keys: pytest.fail("all were recorded"))
        for stored, recorded in zip(first.stored(keys), said[-1], strict=True):
            torch.testing.assert_close(stored.long(), recorded.long())
    first.close()
    assert SoftLabels(tmp_path / "store").complete
    later = run(tmp_path / "store", epochs=9, views=2)
    assert later.epochs == later.layout.epochs == 2
    with pytest.raises(SoftLabelsError, match=r"are 2 view\(s\) of each image.*ask for views \(2\)"):
        run(tmp_path / "store")


def test_epochs_that_are_there_serve_as_views(tmp_path):
    of_epochs = run(tmp_path)
    of_epochs.write_ahead(2 * SAMPLES, answers)
    of_epochs.close()
    assert run(tmp_path, epochs=7, views=2).epochs == 2
    more = run(tmp_path, epochs=7, views=3)
    more.write_ahead(3 * SAMPLES, lambda keys: [(keys, LOGITS[keys])])
    more.close()
    assert run(tmp_path, epochs=3).epochs == 3  # they are still epochs, for those who want such


def test_drawn_classes_are_the_same_whenever_they_are_stored(tmp_path):
    """By key alone: in training, in any order, and ahead of it; neither kind is read as the other."""
    trained, ahead = run(tmp_path / "t", 1, None, 3), run(tmp_path / "a", 1, None, 3)
    trained.open_writer()
    order = np.random.default_rng(1).permutation(SAMPLES)
    for part in np.array_split(order, 3):
        trained.record(part, LOGITS[part])
    trained.complete(SAMPLES, answers)
    ahead.write_ahead(SAMPLES, answers)
    for each in (trained, ahead):
        each.close()
    assert (tmp_path / "t/rows.bin").read_bytes() == (tmp_path / "a/rows.bin").read_bytes()
    labels = SoftLabels(tmp_path / "t")
    assert json.loads((tmp_path / "t/manifest.json").read_text())["version"] == 2
    drawn = labels.take(np.arange(SAMPLES))
    assert (drawn.ids != stored_form(LOGITS[:SAMPLES], layout_of(k=3))[1].numpy()).any()
    assert "at most" in run(tmp_path / "t", 1, None).verify(answers, SAMPLES, 0.01)
    teacher = teacher_form(torch.from_numpy(drawn.values), torch.from_numpy(drawn.ids), labels.layout)
    assert (teacher.rest, teacher.sampled) == ("renormalise", True)
    with pytest.raises(SoftLabelsError, match="3 drawn of 6 classes, and this run asks for the largest"):
        run(tmp_path / "t", 1)
    with pytest.raises(SoftLabelsError, match="biased at 2: train at temperature 1"):
        check_reading(tmp_path, labels.layout, 2.0, "spread")
    largest = run(tmp_path / "top", 1)
    largest.write_ahead(SAMPLES, answers)
    largest.close()
    with pytest.raises(SoftLabelsError, match="top 3 of 6 classes, and this run asks for drawn ones"):
        run(tmp_path / "top", 1, None, 3)


@pytest.mark.parametrize("kind", ["spread", "renormalise", "restrict", "drawn", "all"])
def test_a_store_says_its_own_error(tmp_path, kind):
    """Against NumPy in float64, from the rows as they lie on the disk."""
    top_k = {"drawn": None, "all": 0}.get(kind, 3)
    one = run(tmp_path, 1, top_k, 3 if kind == "drawn" else None)
    one.write_ahead(SAMPLES, answers)
    one.close()
    found = SoftLabels(tmp_path).own_error
    rows = SoftLabels(tmp_path).take(np.arange(SAMPLES))
    ids = rows.ids.astype(int)
    p, known = special.softmax(LOGITS[:SAMPLES].double().numpy(), -1), special.softmax(rows.values, -1)
    stored, student = np.zeros_like(p), np.full_like(p, 1 / CLASSES)
    if kind == "spread":
        known = np.exp(rows.values.astype(float))
        stored += (1 - known.sum(-1, keepdims=True)) / (CLASSES - 3)
    if kind == "restrict":
        student[:] = 0
        np.put_along_axis(student, ids, 1 / 3, -1)
    np.put_along_axis(stored, ids, known, -1)
    order = np.argsort(-p, -1)
    full, ours = (np.take_along_axis(each, order, -1) for each in (1 / CLASSES - p, student - stored))
    error = np.sqrt((ours - full).var(0, ddof=1).sum() / SAMPLES)
    full, ours = full.mean(0), ours.mean(0)
    cosine = full @ ours / np.linalg.norm(full) / np.linalg.norm(ours)
    assert found.rows == SAMPLES
    assert found.angle[kind] == pytest.approx(np.degrees(np.arccos(min(cosine, 1))), abs=1e-2)
    assert found.error[kind] == pytest.approx(np.degrees(np.arctan(error / np.linalg.norm(full))), abs=1e-2)
    assert found.length[kind] == pytest.approx(np.linalg.norm(ours) / np.linalg.norm(full), abs=1e-4)
    kept = np.take_along_axis(p, ids, -1).sum(-1).mean()
    assert found.mass == pytest.approx(kept, abs=1e-6)
    if kind == "spread":
        assert found.kl == pytest.approx((p * np.log(p / stored)).sum(-1).mean(), abs=1e-6)
        assert f"{100 * kept:.2f} % of the mass kept" in run(tmp_path).describe()
    if kind == "all":
        assert found.kl < 1e-6


@pytest.mark.parametrize("rows", ["of one class", "of all"])
def test_what_is_unbiased_is_within_its_standard_error(rows):
    """And what is biased is not, whatever the classes of the rows are."""
    generator, classes = torch.Generator().manual_seed(0), 100
    labels = torch.arange(2000) % (1 if rows == "of one class" else classes)
    logits = torch.randn(2000, classes, generator=generator)
    logits += 3 * torch.nn.functional.one_hot(labels, classes)
    found = {}
    for sampled in (False, True):
        layout = SoftLabelsLayout(classes, 10, 2000, rows_per_sample=1, values="float32", sampled=sampled)
        meter = OwnErrorMeter(layout)
        meter.add(logits, *stored_form(logits, layout, np.arange(2000)))
        found[sampled] = meter.read()
    drawn, top = found[True], found[False]
    assert drawn.angle["drawn"] < 2 * drawn.error["drawn"]
    assert drawn.length["drawn"] == pytest.approx(1, abs=0.02)
    assert all(angle > 10 * top.error[way] for way, angle in top.angle.items())
    assert top.angle["renormalise"] > 5 * drawn.angle["drawn"]


def test_own_error_is_of_rows_that_are_spread_over_an_epoch(tmp_path):
    """Of all keys that a writer itself has stored, when it goes on, and once."""
    samples, seen = 3 * ROWS, []
    layout = SoftLabelsLayout(CLASSES, 3, samples, epochs=2, rows_per_sample=1)
    for start, stop in ((0, 1000), (1000, samples), (samples, 2 * samples)):
        with SoftLabelsWriter(tmp_path, layout, {}) as writer:
            keys = np.arange(start, stop)
            logits = LOGITS[keys % len(LOGITS)]
            values, ids = stored_form(logits, layout)
            writer.measure(keys, logits, values, ids)
            writer.append(values.numpy(), ids.numpy())
        error = SoftLabels(tmp_path).own_error
        seen.append(error and error.rows)
    assert seen == [None, *2 * [len(range(1002, samples, 3))]]


@pytest.mark.parametrize("value", [[1], "0.5", True, 1])
def test_an_error_made_by_hand_is_one_line(tmp_path, value):
    one = run(tmp_path, 1)
    one.write_ahead(SAMPLES, answers)
    one.close()
    manifest = read_manifest(tmp_path)
    replace(manifest, own_error={**manifest.own_error, "mass": value}).write(tmp_path)
    with pytest.raises(SoftLabelsError, match="damaged"):
        run(tmp_path, 1).describe()


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


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_kill_after_the_last_commit_left_is_removed_once_nobody_writes(rank, tmp_path):
    """All is stored then, so no writer follows who would clear up."""
    ended = run(tmp_path)
    ended.open_writer()
    ended.record(np.arange(SAMPLES), LOGITS[:SAMPLES])
    rows = (tmp_path / SCRATCH / "rows-0.bin").read_bytes()
    ended.complete(2 * SAMPLES, answers)
    (tmp_path / SCRATCH / "rows-0.bin").write_bytes(rows)
    run(tmp_path, rank=rank)
    assert (tmp_path / SCRATCH / "rows-0.bin").exists()
    ended._writer.close()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    run(tmp_path, rank=rank)
    assert (tmp_path / SCRATCH).exists() == bool(rank)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    later = run(tmp_path)
    later.open_writer()  # nobody holds it
    later.close()


def test_what_a_plugin_must_not_do(tmp_path):
    layout = SoftLabelsLayout(CLASSES, 3, SAMPLES, rows_per_sample=2)
    with pytest.raises(ValueError, match="one row for each"):
        StoredRun(tmp_path / "sentences", layout, {}, seed=0)
    with pytest.raises(ValueError, match="keys; give them"):
        stored_form(LOGITS, SoftLabelsLayout(CLASSES, 3, SAMPLES, rows_per_sample=1, sampled=True))
    one = run(tmp_path / "store")
    with pytest.raises(RuntimeError, match="open_writer comes before"):
        one.complete(SAMPLES, answers)
    assert "nothing is stored yet" in one.verify(answers, 3, 0.0)
    one.open_writer()
    with pytest.raises(ValueError, match=f"2 keys of 0 to {SAMPLES - 1} are missing"):
        one.complete(SAMPLES, lambda keys: answers(keys[2:]))
    one.close()
    assert len(SoftLabels(tmp_path / "store")) == 0


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


def test_packed_values_are_within_their_tolerance_and_too_coarse_for_a_hot_rest():
    """Of a peaked teacher at T = 4: the error of what is missing to 1 is the whole error."""
    logits = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 18
    kl = {}
    for values in ("float16", "packed"):
        layout = SoftLabelsLayout(1000, 10, 500, rows_per_sample=1, values=values)
        stored, ids = stored_form(logits, layout)
        for rest in get_args(Rest):
            said = teacher_form(stored, ids, layout, rest)
            kl[rest, values] = float(DistillationLoss(4.0).components(logits, said).kl)
        worst = float(stored_difference(stored.numpy(), ids.numpy(), logits).max())
        assert worst < TOLERANCE[values] / 2
    refused = []
    for rest in get_args(Rest):
        with suppress(SoftLabelsError):
            check_reading("p", layout, 1.0, rest)
            check_reading("p", replace(layout, values="float16"), 4.0, rest)
            check_reading("p", layout, 4.0, rest)
            continue
        refused.append(rest)
    assert refused == [rest for rest in get_args(Rest) if kl[rest, "packed"] - kl[rest, "float16"] > 0.1]
    assert refused == ["spread", "lump"]


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
    said = teacher_form(*stored_form(LOGITS, shape), shape)
    assert torch.equal(loss(student, said), loss(student, LOGITS))


def test_top_k_in_half_precision_is_close_to_the_whole():
    student = torch.randn(3 * SAMPLES, CLASSES)
    whole = DistillationLoss()(student, LOGITS)
    losses = {}
    for k in (1, 3, 5, 6):
        said = teacher_form(*stored_form(LOGITS, layout_of(k=k)), layout_of(k=k), "spread")
        losses[k] = abs(float(DistillationLoss()(student, said) - whole))
    assert losses[6] < 2e-3
    assert losses[5] < 2e-3
    assert losses[3] < 0.05
