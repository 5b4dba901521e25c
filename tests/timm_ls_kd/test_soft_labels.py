"""Students that share one teacher's stored answers: exactness, refusals, kills, full disks."""

import argparse
import builtins
import errno
import os
import shutil
import signal

import numpy as np
import pytest
import torch

import forked
from lskd import DistillationLoss, FrozenTeacher, SoftLabels, SoftLabelsWriter
from lskd.soft_labels import blocks as block_file_module
from lskd.soft_labels import run as stored_run_module
from lskd.soft_labels.shards import merge_shards
from timm_ls_kd import cli
from timm_ls_kd.store import SoftLabelsRun
from timm_ls_kd.task import SoftLabelsTask

pytestmark = pytest.mark.unit
AUGMENTED = ["--hflip", "0.5", "--scale", "0.3", "1", "--aa", "rand-m5-mstd0.5"]
MIXED = ["--mixup", "0.5", "--cutmix", "1", "--mixup-off-epoch", "1"]
# 96 images in batches of 20: 16 of each epoch are in no batch.
STUDENT = ["--batch-size", "20", "--epochs", "2", "--checkpoint-hist", "1", *AUGMENTED]


@pytest.fixture
def filled(student, tmp_path_factory, request):
    """A complete store of two epochs, top 2 in float16, copied from one that is made once."""
    cache = request.config.cache_of_stores = getattr(request.config, "cache_of_stores", {})
    if "store" not in cache:
        cache["store"] = tmp_path_factory.mktemp("filled") / "store"
        student("filling", "--kd-soft-labels-top-k", 2, where=cache["store"])
    return cache["store"]


@pytest.fixture
def filled_copy(filled, store):
    shutil.copytree(filled, store)
    return store


@pytest.mark.parametrize(
    "options",
    [
        [],
        [*MIXED, "--reprob", "0.5", "--kd-hard-weight", "0.3", "--smoothing", "0.1", "--kd-temperature", "2"],
    ],
    ids=["plain", "everything"],
)
def test_stored_and_online_students_are_equal_weight_for_weight(student, same_weights, monkeypatch, options):
    options = [*options, "--kd-soft-labels-top-k", "0", "--model-ema", "--grad-accum-steps", "2"]
    student("stores", *options)
    with monkeypatch.context() as patch:
        # Nobody builds a teacher any more.
        patch.setattr(FrozenTeacher, "__init__", lambda *a, **k: pytest.fail("a teacher was built"))
        result = student("reads", *options)
    assert "all 2 epochs are read" in result.out
    with monkeypatch.context() as patch:
        # The path of a run without a store, on the same images: logits straight from the teacher.
        def ask(self, images, targets):
            loss = self.loss
            return self.teacher(images), targets.hard(4, loss.alpha, loss.convention)

        patch.setattr(SoftLabelsTask, "ask_teacher", ask)
        student("online", *options)
    assert same_weights("stores", "reads")
    assert same_weights("stores", "online")
    student("other", *options, "--seed", "7")
    assert not same_weights("stores", "other")


def test_top_k_and_half_precision_change_the_loss_as_they_must(student, summary, tmp_path, monkeypatch):
    """A learning rate of 0, so that the losses are of one student; against float64 of what it was told."""
    said, seen = [], []
    ask, components = FrozenTeacher.__call__, DistillationLoss.components

    def listen(self, batch):
        said.append(ask(self, batch))
        return said[-1]

    def watch(self, logits, *arguments):
        seen.append((logits.detach().double(), said[-1].log_softmax(1)))
        return components(self, logits, *arguments)

    monkeypatch.setattr(FrozenTeacher, "__call__", listen)
    monkeypatch.setattr(DistillationLoss, "components", watch)
    for name, k, rest in (
        ("all", 0, "spread"),
        ("3", 3, "spread"),
        ("1", 1, "spread"),
        ("1 renormalised", 1, "renormalise"),
    ):
        seen.clear()
        options = ["--lr", "0", "--epochs", "1", "--kd-soft-labels-top-k", k, "--kd-rest", rest]
        student(name, *options, where=tmp_path / f"store {name}")
        logits, words = map(torch.cat, zip(*seen, strict=True))
        kept = torch.zeros_like(words).scatter(1, words.topk(k or 4).indices, 1)
        known = kept * (words.half() if k else words).double().exp()  # all of them are stored in float32
        left = (1 - known.sum(1, keepdim=True)).clamp(min=0) * (k > 0) * (rest == "spread")
        told = known + (1 - kept) * left / (4 - k)
        told /= told.sum(1, keepdim=True)
        cross_entropy = -(told * logits.log_softmax(1)).sum(1).mean()
        entropy = torch.special.entr(told).sum(1).mean()
        row = summary(tmp_path / "runs" / name)[0]
        # A logarithm rounded to its other float16 neighbour moves the mean of 80 samples by less than this.
        assert row["train_ce"] == pytest.approx(float(cross_entropy), abs=1e-5), name
        assert row["train_teacher_entropy"] == pytest.approx(float(entropy), abs=1e-5), name


def test_the_one_that_stores_and_those_that_read_are_equal_with_top_k(student, same_weights, store):
    student("stores", "--kd-soft-labels-top-k", "2", *MIXED)
    student("reads", *MIXED, "--workers", "2")
    assert same_weights("stores", "reads")
    labels = SoftLabels(store)
    labels.verify()
    assert (len(labels), labels.layout.k, labels.layout.values) == (192, 2, "float16")
    assert (store / "rows.bin").stat().st_size == 192 * (4 + 4 * 2)
    assert not (store / "scratch").exists()


def test_two_views_serve_four_epochs(student, same_weights, store, monkeypatch):
    """The teacher is asked about two, and the one that stores them learns what later ones do."""
    asked, ask = [], FrozenTeacher.__call__
    count = lambda self, images: asked.append(len(images)) or ask(self, images)  # noqa: E731
    monkeypatch.setattr(FrozenTeacher, "__call__", count)
    views = ["--kd-soft-labels-views", "2", "--epochs", "4", "--mixup", "0.5", "--kd-preflight-samples", "0"]
    student("stores", *views, "--workers", "2")
    once = sum(asked)
    assert 2 * 96 <= once < 3 * 96  # batches are filled up, and it is tried first
    assert "all 2 views are read" in student("reads", *views).out
    assert sum(asked) == once
    assert same_weights("stores", "reads")
    labels = SoftLabels(store)
    assert (len(labels), labels.layout.views) == (2 * 96, True)
    result = student("epochs", "--epochs", "4", status=2)
    result.assert_one_clear_line("2 view(s) of each image", "ask for views (2)")
    result = student("gap", *views, "--start-epoch", "3", where=store / "gap", status=2)
    result.assert_one_clear_line("has 0 view(s) and training is at epoch 3; views are stored in order")
    result = student("off", *views, "--mixup-off-epoch", "1", status=2)
    result.assert_one_clear_line("--mixup-off-epoch", "--kd-soft-labels-views")


def test_drawn_classes(student, same_weights, store):
    student("stores", "--kd-soft-labels-sampled", "2")
    student("reads")
    assert same_weights("stores", "reads")
    assert SoftLabels(store).layout.sampled
    result = student("hot", "--kd-temperature", "2", status=2)
    result.assert_one_clear_line("right at temperature 1 and biased at 2")


def test_more_epochs_than_stored_are_added(student, same_weights, filled_copy):
    before = (filled_copy / "rows.bin").read_bytes()
    result = student("three", "--epochs", "3")
    assert "epochs 2 to 2 are to be stored" in result.out
    assert SoftLabels(filled_copy).layout.epochs == 3
    assert (filled_copy / "rows.bin").read_bytes()[: len(before)] == before
    student("again", "--epochs", "3")
    assert same_weights("three", "again")
    student("two")  # and fewer are no reason to complain
    result = student("gap", "--epochs", "6", "--start-epoch", "4", status=2)
    result.assert_one_clear_line("has 3 epoch(s)", "epoch 4", "timm soft-labels")


def test_ahead_of_time(student, ahead, store, filled):
    result = ahead("--kd-soft-labels-top-k", 2)
    assert result.status == 0, result.err
    assert SoftLabels(store).complete
    student("reads")
    student("reads of the other", where=filled)
    there, stored = SoftLabels(filled), SoftLabels(store)
    for key in range(192):  # other batches: the same to rounding
        assert (there[key].seeds == stored[key].seeds).all()
        np.testing.assert_allclose(there[key].values, stored[key].values, atol=0.01)


def test_ahead_of_time_in_shards_and_read_at_a_url(student, ahead, store, filled, tmp_path):
    for shard in ("2/3", "1/3", "3/3", "3/3"):  # the last a second time: there is nothing left to ask
        result = ahead("--kd-soft-labels-top-k", 2, "--kd-soft-labels-shard", shard)
        assert result.status == 0, result.err
        assert f"of shard {shard} 64 of 64 images are stored" in result.out
    student("early", status=2).assert_one_clear_line("3 shard(s)", "lskd soft-labels merge")
    result = student("one", "--kd-soft-labels-shard", "1/3", status=2)
    result.assert_one_clear_line("training reads all of them")
    merge_shards(store)
    cache = ("--kd-soft-labels-cache", tmp_path / "cache")
    assert "all 2 epochs are read" in student("reads", *cache, where=f"file://{store}").out
    result = student("more", *cache, "--epochs", 3, where=f"file://{store}", status=2)
    result.assert_one_clear_line("a copy of soft labels that are elsewhere")
    there, stored = SoftLabels(filled), SoftLabels(store)
    keys = np.arange(192)
    np.testing.assert_array_equal(stored.take(keys).seeds, there.take(keys).seeds)
    np.testing.assert_allclose(stored.take(keys).values, there.take(keys).values, atol=0.01)


KILLED = """
import os, signal, sys
import timm_ls_kd.trainer.main
from lskd import FrozenTeacher
from timm_ls_kd import cli

asked, ask = 0, FrozenTeacher.__call__

def kill(self, batch):
    global asked
    asked += 1
    if asked == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(self, batch)

FrozenTeacher.__call__ = kill
timm_ls_kd.trainer.main._BATCHES = 2
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("while_ahead", [True, False])
def test_a_kill_in_an_epoch_loses_that_epoch_only(
    student, ahead, store, filled, while_ahead, same_weights, monkeypatch, tmp_path
):
    """The process is killed in its 8th question to the teacher, in the second epoch."""
    monkeypatch.setattr("timm_ls_kd.trainer.main._BATCHES", 2)
    unchecked = ["--kd-preflight-samples", 0, "--kd-soft-labels-top-k", 2]

    def go(*more, status=0):
        if while_ahead:
            assert ahead(*unchecked).status == status
        else:
            student("killed", *unchecked, *more, status=status)

    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def killed(words):
        return forked.run(script, *words, imported=("torchvision", "timm")).returncode

    with monkeypatch.context() as patch:
        patch.setattr(cli, "main", killed)
        go(status=-signal.SIGKILL)
    stored = len(SoftLabels(store))
    assert stored == (120 if while_ahead else 96)
    last = tmp_path / "runs" / "killed" / "last.pth.tar"
    go("--resume", last)
    assert SoftLabels(store).complete
    if not while_ahead:
        assert (store / "rows.bin").read_bytes() == (filled / "rows.bin").read_bytes()
        student("reads", where=filled)
        assert same_weights("killed", "reads")


REFUSALS = {
    "augmentation.scale": ["--scale", "0.4", "1"],
    "augmentation.ratio": ["--ratio", "0.9", "1.1"],
    "augmentation.hflip": ["--hflip", "0.4"],
    "augmentation.vflip": ["--vflip", "0.1"],
    "augmentation.aa": ["--aa", "rand-m6-mstd0.5"],
    "augmentation.color_jitter": ["--color-jitter", "0.1"],
    "augmentation.train_crop_mode": ["--train-crop-mode", "rkrc"],
    "augmentation.reprob": ["--reprob", "0.1"],
    "augmentation.mixup": ["--mixup", "0.2"],
    "augmentation.cutmix": ["--cutmix", "0.2"],
    "augmentation.no_aug": ["--no-aug"],
    "augmentation.seed": ["--kd-soft-labels-seed", "43"],
    "augmentation.mean": ["--mean", "0.4", "0.4", "0.4"],
    "augmentation.std": ["--std", "0.4", "0.4", "0.4"],
    "augmentation.prefetcher": ["--no-prefetcher"],
    "augmentation.transform": ["--train-interpolation", "bilinear"],
    "augmentation.transform ": ["--img-size", "40"],
    "stored.top_k": ["--kd-soft-labels-top-k", "3"],
    "stored.values": ["--kd-soft-labels-values", "float32"],
    "teacher.precision": ["--kd-teacher-dtype", "bfloat16"],
    "teacher.precision ": ["--amp", "--amp-dtype", "bfloat16"],
    "teacher.arguments": ["--kd-teacher-img-size", "40"],
}


@pytest.mark.parametrize("difference", REFUSALS)
def test_a_store_of_something_else_is_refused(student, filled, difference):
    result = student("other", *REFUSALS[difference], status=2, where=filled)
    result.assert_one_clear_line("do not belong", f"{difference.strip()} is ")


def test_a_store_of_other_images_teacher_or_versions_is_refused(
    student, filled, own_digits, teacher, teacher_run, tmp_path, monkeypatch
):
    image = next((own_digits / "train" / "digit2").iterdir())
    image.rename(image.with_name("other.png"))
    result = student("other", status=2, data=own_digits, where=filled)
    result.assert_one_clear_line("data.listing is ")
    image.with_name("other.png").unlink()
    student("other", status=2, data=own_digits, where=filled).assert_one_clear_line("data.images is 96 ")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(teacher, weights_only=True)
    content["state_dict"]["fc.weight"] += 1e-3
    shutil.copytree(teacher_run, tmp_path / "taught")
    torch.save(content, tmp_path / "taught" / "last.pth.tar")
    elsewhere = ["--kd-teacher-checkpoint", tmp_path / "taught" / "last.pth.tar"]
    student("other", *elsewhere, status=2, where=filled).assert_one_clear_line("teacher.weights is ")
    (tmp_path / "taught" / "args.yaml").unlink()
    shutil.copy(teacher, tmp_path / "taught" / "last.pth.tar")
    result = student("other", *elsewhere, status=2, where=filled)
    result.assert_one_clear_line("teacher.run_beside_it is ")
    monkeypatch.setattr("timm.__version__", "1.0.28")
    student("other", status=2, where=filled).assert_one_clear_line("versions.timm is ", "1.0.28")


def test_views_together(student, ahead, filled, store):
    assert "all 2 epochs are read" in student("two", "--kd-soft-labels-together", "2", where=filled).out
    result = student("three", "--kd-soft-labels-together", "3", where=filled, status=2)
    result.assert_one_clear_line("all 2 must be stored before (there are 2), and 3 divide the 2 of training")
    views = ["--kd-soft-labels-views", "2", "--epochs", "3", "--kd-soft-labels-together", "2"]
    student("views", *views, where=filled, status=2).assert_one_clear_line("2 divide the 3 of training")
    result = student("none", "--kd-soft-labels-together", "2", status=2)
    result.assert_one_clear_line("all 2 must be stored before (there are 0)", "by timm soft-labels")
    assert not store.exists()
    assert ahead("--kd-soft-labels-together", "2").status == 0
    student("now", "--kd-soft-labels-together", "2")


def test_verifying(student, filled, rewritten):
    result = student("good", "--kd-soft-labels-verify", "500", where=filled)
    assert "192 images verified" in result.out

    def shift(values, ids, seeds):
        """As if the images of the first epoch had been shifted by one place."""
        values[:96], ids[:96] = np.roll(values[:96], 1, 0), np.roll(ids[:96], 1, 0)

    result = student("bad", "--kd-soft-labels-verify", "150", where=rewritten(filled, shift), status=2)
    result.assert_one_clear_line("not what the teacher says", "write them again")


def test_rows_of_other_augmentation_are_noticed_while_reading(student, filled, rewritten):
    def reseed(values, ids, seeds):
        seeds[17] += 1

    result = student("bad", "--workers", "1", where=rewritten(filled, reseed), status=2)
    result.assert_one_clear_line("augmented otherwise")


def test_a_flipped_byte_is_noticed_while_reading(student, filled_copy):
    content = bytearray((filled_copy / "rows.bin").read_bytes())
    content[700] ^= 1
    (filled_copy / "rows.bin").write_bytes(content)
    student("bad", "--workers", "1", status=2).assert_one_clear_line("rows.bin is damaged in block 0")


def full_scratch(patch):
    def full(*arguments, **options):
        return builtins.open("/dev/full", "wb")

    patch.setattr(stored_run_module, "open", full, raising=False)


def full_store(patch):
    def append(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(block_file_module.BlockWriter, "append", append)


@pytest.mark.parametrize("full", [full_scratch, full_store])
def test_a_full_disk(student, filled_copy, filled, same_weights, full, monkeypatch, summary, tmp_path):
    labels = SoftLabels(filled_copy)
    with monkeypatch.context() as patch:
        full(patch)
        result = student("stops", "--epochs", "4", status=2)
        result.assert_one_clear_line("No space left on device", "--kd-soft-labels-on-error continue")
        result = student("continues", "--epochs", "4", "--kd-soft-labels-on-error", "continue")
    lines = [line for line in result.out.splitlines() if "No space left on device" in line]
    assert len(lines) == 1
    assert "stores nothing more" in lines[0]
    assert len(summary(tmp_path / "runs" / "continues")) == 4
    assert (filled_copy / "rows.bin").read_bytes() == (filled / "rows.bin").read_bytes()
    assert len(SoftLabels(filled_copy)) == len(labels) == 192
    student("later", "--epochs", "4")
    student("stops", "--epochs", "4", "--resume", tmp_path / "runs" / "stops" / "last.pth.tar")
    assert same_weights("continues", "later")
    assert same_weights("stops", "later")


def test_two_writers_at_once(student, filled_copy, monkeypatch):
    monkeypatch.setattr(SoftLabelsRun, "LOCK_SECONDS", 0.2)
    labels = SoftLabels(filled_copy)
    with SoftLabelsWriter(filled_copy, labels.layout, labels.identity):
        result = student("second", "--epochs", "3", status=2)
        result.assert_one_clear_line("being written by another process")
        student("reader")  # who needs nothing written
    student("second", "--epochs", "3")


def test_a_run_that_does_not_start_leaves_nothing_behind(student, store):
    """The images do not fill one batch."""
    student("none", "--batch-size", "200", status=2)
    assert not store.exists()
