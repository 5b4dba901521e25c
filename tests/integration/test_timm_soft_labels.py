"""Stored soft labels across processes and routes: two ranks, one rank, and timm's own script."""

import shlex
import shutil

import numpy as np
import pytest
import torch

from lskd import SoftLabels
from timm_runs import SCRIPT, needs_script, run, weights

pytestmark = pytest.mark.integration

# A model without batch statistics, so that two ranks are one; 96 images in batches of 40 leave 16 out.
COMMON = shlex.split(
    "--model test_vit --num-classes 4 --img-size 32 --device cpu --lr 0.05 --warmup-epochs 0 --workers 1 "
    "--hflip 0.5 --scale 0.3 1 --aa rand-m5-mstd0.5 --mixup 0.5 --cutmix 1 --kd-preflight-samples 0 "
    "--epochs 2 --checkpoint-hist 1"
)
TOP = ["--kd-soft-labels-top-k", 3]


@pytest.fixture(scope="module")
def kd(tmp_path_factory):
    """A teacher as good as any to be asked: its weights are random."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    model = timm.create_model("test_resnet", num_classes=4)
    torch.save(model.state_dict(), path)
    return ["--kd-teacher", "test_resnet", "--kd-teacher-checkpoint", path]


def assert_close(first, second):
    """Same seeds and images; batches of other sizes round otherwise."""
    assert len(first) == len(second)
    keys = np.arange(len(first))
    one, other = first.take(keys), second.take(keys)
    assert (one.seeds == other.seeds).all()
    np.testing.assert_allclose(one.values, other.values, atol=0.01)


def test_two_ranks_write_and_one_reads_and_the_reverse(digits, kd, tmp_path):
    options = [digits, *COMMON, *TOP, *kd, "--output", tmp_path / "runs"]
    both, alone = tmp_path / "both", tmp_path / "alone"

    def student(name, store, batch, processes):
        arguments = [*options, "--kd-soft-labels", store, "--batch-size", batch, "--experiment", name]
        return run("train.py", *arguments, processes=processes)

    assert "are to be stored" in student("two write", both, 20, 2).stdout
    assert "are to be stored" in student("one writes", alone, 40, 1).stdout
    first, second = SoftLabels(both), SoftLabels(alone)
    first.verify()
    assert first.complete
    assert first.identity == second.identity
    assert_close(first, second)
    assert "epochs are read" in student("one reads", both, 40, 1).stdout
    assert "epochs are read" in student("two read", alone, 20, 2).stdout
    expected = weights(tmp_path / "runs" / "one writes")
    for name in ("two write", "one reads", "two read"):
        for key, value in weights(tmp_path / "runs" / name).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=2e-3)


@needs_script
def test_the_upstream_script_reads_and_writes_the_same_store(digits, kd, tmp_path):
    options = [digits, *COMMON, *TOP, *kd, "--output", tmp_path / "runs", "--batch-size", 40]
    own, scripts = tmp_path / "own", tmp_path / "scripts"

    def student(name, store, *more, script=SCRIPT, status=0, processes=1):
        arguments = [*options, "--kd-soft-labels", store, "--experiment", name, *more]
        return run(script, *arguments, status=status, processes=processes)

    student("bundled", own, script="train.py")
    student("writes", scripts)
    first, second = SoftLabels(own), SoftLabels(scripts)
    assert first.identity == second.identity
    assert_close(first, second)
    for name in ("reads", "reads again"):
        result = student(name, scripts)
        assert "epochs are read" in result.stdout
    assert "96 images verified" in student("verifies", own, "--kd-soft-labels-verify", 96).stdout
    expected = weights(tmp_path / "runs" / "writes")
    assert all(
        torch.equal(value, expected[key]) for key, value in weights(tmp_path / "runs" / "reads").items()
    )
    # Erasing too, which is the prefetcher's otherwise, and the two ranks of the script.
    erasing = [*("--reprob", 0.5), "--batch-size", 20]
    student("erases", tmp_path / "erased", *erasing, processes=2)
    assert (
        "192 images verified"
        in student("erases too", tmp_path / "erased", "--reprob", 0.5, "--kd-soft-labels-verify", 500).stdout
    )
    for more, word in (
        (["--aug-splits", 2], "--aug-splits"),
        (["--scale", 0.4, 1], "augmentation.scale"),
        (["--use-multi-epochs-loader"], "--use-multi-epochs-loader"),
    ):
        result = student("refused", own, *more, status=2)
        assert word in [line for line in result.stderr.splitlines() if "error" in line][-1]
    content = bytearray((own / "rows.bin").read_bytes())
    content[99] ^= 1
    shutil.copytree(own, tmp_path / "damaged")
    (tmp_path / "damaged" / "rows.bin").write_bytes(content)
    lines = student("damaged", tmp_path / "damaged", status=2).stderr.splitlines()
    assert "rows.bin is damaged in block 0" in next(line for line in lines if line.startswith("timm: error"))
    assert "Traceback" not in "".join(lines)


@needs_script
def test_the_upstream_script_stores_drawn_classes_of_views(digits, kd, tmp_path):
    store = tmp_path / "store"
    options = [digits, *COMMON, *kd, "--output", tmp_path / "runs", "--batch-size", 40]
    options += ["--kd-soft-labels", store, "--kd-soft-labels-views", 1, "--kd-soft-labels-sampled", 2]
    asked = run(SCRIPT, *options, "--experiment", "asks").stdout
    assert "views 0 to 0 are to be stored" in asked
    labels = SoftLabels(store)
    labels.verify()
    layout = labels.layout
    assert (layout.views, layout.sampled, layout.k, layout.epochs, labels.rows) == (True, True, 2, 1, 96)
    for name, script in {"script": SCRIPT, "bundled": "train.py"}.items():
        # Both make the same images again, and ask about them.
        read = run(script, *options, "--experiment", name, "--kd-soft-labels-verify", 96).stdout
        assert "96 images verified" in read
        assert "all 1 views are read, the teacher is not asked" in read
    expected = weights(tmp_path / "runs" / "asks")
    assert all(
        torch.equal(value, expected[key]) for key, value in weights(tmp_path / "runs" / "script").items()
    )
