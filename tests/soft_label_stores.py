"""Small stores of soft labels, whose rows follow from their key, for the tests of what happens to them."""

import os
import re

import numpy as np
import torch
from hypothesis import strategies as st

from lskd import SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.soft_labels.forms import as_stored

IDENTITY = {"teacher": "a"}
FILES = ("rows.bin", "index.bin", "rows.bin.sums", "index.bin.sums", "manifest.json")


def layout(samples=9, **changes):
    return SoftLabelsLayout(**({"num_classes": 20, "k": 3, "samples": samples} | changes))


@st.composite
def layouts(draw):
    return layout(
        draw(st.integers(1, 4)),
        num_classes=draw(st.sampled_from([6, 70_000])),
        k=draw(st.integers(1, 3)),
        epochs=draw(st.integers(1, 2)),
        rows_per_sample=draw(st.sampled_from([None, 1, 2])),
        values=draw(st.sampled_from(["float16", "float32", "packed"])),
        seeds=draw(st.booleans()),
    )


def content(layout, key):
    """Return the rows of a key, as the writer takes them: of a sentence there may be none, or several."""
    count = layout.rows_per_sample or key * 7 % 4
    numbers = np.arange(count * layout.k).reshape(count, layout.k)
    seeds = np.full(count, 7 * key + 1) if layout.seeds else None
    values = -numbers / 8 - key
    if layout.values == "packed":  # what eight bits can express
        values = as_stored(torch.from_numpy(values), layout).numpy()
    return values, (numbers + key) % layout.num_classes, [count], seeds


def write(path, layout, stop=None, commit_every=3, identity=IDENTITY):
    """Write, or go on with, a store; return its path."""
    with SoftLabelsWriter(path, layout, identity) as writer:
        while writer.keys < (layout.keys if stop is None else stop):
            writer.append(*content(layout, writer.keys))
            if writer.keys % commit_every == 0:
                writer.commit()
    return path


def assert_a_right_beginning(path, layout, identity=None):
    """Check every block and the rows of every key that is there; return the labels."""
    labels = SoftLabels(path, identity)
    labels.verify()
    for key in range(len(labels)):
        values, ids, _, seeds = content(layout, key)
        got = labels[key]
        np.testing.assert_array_equal(got.values, values.astype(got.values.dtype))
        np.testing.assert_array_equal(got.ids, ids)
        assert (got.seeds is None) == (seeds is None)
        if seeds is not None:
            np.testing.assert_array_equal(got.seeds, seeds)
    return labels


def contents(path):
    return {name: (path / name).read_bytes() for name in FILES}


def in_a_fork(work, message=""):
    """Run ``work`` in a forked process and return how it ended: minus the signal, or its exit status.

    That is 3 for an error of one line in which ``message`` is found.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SoftLabelsError as error:
            status = 3 if re.search(message, str(error)) and "\n" not in str(error) else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
