import json

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load
from safetensors.torch import save_file as save_torch

from lskd import LskdError, Stability
from lskd_study.pages.page import provenance_rows
from lskd_study.plan.plan import CURVES, JOB, LOGITS
from lskd_study.results.images import read_image_result, read_stored
from lskd_study.results.read import read_results

pytestmark = pytest.mark.unit


def rewrite(folder, **changes):
    tensors = load_file(folder / LOGITS) | changes
    save_file(tensors, folder / LOGITS)


@pytest.fixture
def plan(fake_study):
    return fake_study()


@pytest.fixture
def folder(plan):
    """Return the folder of the first run."""
    return plan.folder(plan.runs[0])


def read(plan):
    return read_image_result(plan.folder(plan.runs[0]), plan.runs[0], plan.num_classes)


def test_accuracy_and_instability_come_from_the_stored_logits(plan, folder):
    tensors = load_file(folder / LOGITS)
    logits, labels = torch.from_numpy(tensors["logits"]).float(), torch.from_numpy(tensors["labels"])
    found = read(plan)
    assert found.top1 == pytest.approx(100 * (logits.argmax(-1) == labels).float().mean().item())
    assert found.value("top5") == 100.0
    expected = 1 - float(Stability(plan.num_classes)(logits, labels))
    assert found.instability == pytest.approx(expected, abs=1e-6)
    assert found.value("val_top1") == found.curves["val_top1"][-1]
    assert np.isnan(found.value("train_kl"))  # a teacher has none


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_top_k(plan, folder, k):
    tensors = load_file(folder / LOGITS)
    order = np.argsort(-tensors["logits"].astype(float), axis=1)[:, :k]
    assert read(plan).value(f"top{k}") == pytest.approx(
        100 * (order == tensors["labels"][:, None]).any(1).mean()
    )


def test_samples_are_matched_by_key_in_whatever_order_they_were_measured(plan, folder):
    before = read(plan)
    tensors = load_file(folder / LOGITS)
    order = np.random.default_rng(0).permutation(len(tensors["labels"]))
    names = bytes(tensors["keys"]).decode().split("\n")
    keys = np.frombuffer("\n".join(names[i] for i in order).encode(), dtype=np.uint8)
    rewrite(folder, logits=tensors["logits"][order], labels=tensors["labels"][order], keys=keys)
    after = read(plan)
    assert after.keys == before.keys
    np.testing.assert_array_equal(after.correct, before.correct)


def test_a_run_with_logits_that_are_not_finite_failed(plan, folder):
    logits = load_file(folder / LOGITS)["logits"]
    logits[3, 1] = np.nan
    rewrite(folder, logits=logits)
    run, results = plan.runs[0], read_results(plan)
    assert run.id not in results.finished
    assert results.missing == []
    assert str(results.failed[run.id]) == f"run {run.id} failed in epoch 4"
    found = results.teachers(run.model, run.smoothing)
    assert (sorted(found), [one.run.id for one in found.failed]) == ([1, 2], [run.id])


def test_runs_measured_on_different_samples_are_not_compared(plan, folder):
    names = bytes(load_file(folder / LOGITS)["keys"]).decode().replace("val/0/0000", "val/0/9999")
    rewrite(folder, keys=np.frombuffer(names.encode(), dtype=np.uint8))
    with pytest.raises(LskdError, match="different validation samples"):
        read_results(plan)


@pytest.mark.parametrize("name", [LOGITS, CURVES, JOB])
def test_a_damaged_run_folder_is_named(plan, folder, name):
    (folder / name).write_bytes(b"{")
    with pytest.raises(LskdError, match="is damaged") as caught:
        read_results(plan)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[:200], lambda data: data + b"x"]
)
def test_logits_that_are_cut_or_followed_by_something_are_damage(plan, folder, change):
    (folder / LOGITS).write_bytes(change((folder / LOGITS).read_bytes()))
    with pytest.raises(LskdError, match="is damaged"):
        read_results(plan)


@pytest.mark.parametrize("moved", [(-2, 0), (0, -2), (0, 2), (8, 8), (-1, -1), "twice"])
def test_logits_elsewhere_in_their_file_are_damage(plan, folder, moved):
    content = (folder / LOGITS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    parts = json.loads(content[8:start])
    if moved == "twice":  # the labels over the logits, and what is left to another
        size = parts["labels"]["data_offsets"][1] - parts["labels"]["data_offsets"][0]
        parts["other"] = parts["labels"] | {"dtype": "U8", "shape": [size]}
        parts["labels"] = parts["labels"] | {"data_offsets": [parts["logits"]["data_offsets"][0]] * 2}
        parts["labels"]["data_offsets"][1] += size
    else:
        offsets = parts["labels"]["data_offsets"]
        parts["labels"]["data_offsets"] = [place + by for place, by in zip(offsets, moved, strict=True)]
    header = json.dumps(parts).encode()
    (folder / LOGITS).write_bytes(len(header).to_bytes(8, "little") + header + content[start:])
    with pytest.raises(SafetensorError):
        load((folder / LOGITS).read_bytes())
    with pytest.raises(LskdError, match="is damaged"):
        read_results(plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_what_safetensors_reads(plan, folder, dtype):
    tensors = load(folder.joinpath(LOGITS).read_bytes())
    tensors["logits"] = tensors["logits"].to(dtype) / 3
    save_torch(tensors, folder / LOGITS, metadata={"made": "elsewhere"})
    expected, found = load(folder.joinpath(LOGITS).read_bytes()), read_stored(folder, plan.num_classes)
    assert found.logits.dtype == dtype
    assert torch.equal(found.logits, expected["logits"])
    assert torch.equal(found.labels, expected["labels"])
    assert "\n".join(found.keys).encode() == bytes(expected["keys"])


def test_a_sample_that_stands_twice_is_damage(plan, folder):
    names = bytes(load_file(folder / LOGITS)["keys"]).decode().split("\n")
    rewrite(folder, keys=np.frombuffer("\n".join([names[1], *names[1:]]).encode(), dtype=np.uint8))
    with pytest.raises(LskdError, match="is damaged"):
        read_results(plan)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.rpartition(",")[0], r"/curves.csv: row 5 has not as many cells as the header"),
        (lambda text: text[:-2], "curves.csv is cut short"),  # its last number is another one then
        (lambda text: "", "curves.csv has no epochs"),
        (None, r"/curves.csv cannot be read as a table \(No such file or directory\)"),
    ],
)
def test_curves_that_are_not_whole_name_the_run_to_remove(plan, folder, change, said):
    text = (folder / CURVES).read_text()
    (folder / CURVES).unlink()
    if change:
        (folder / CURVES).write_text(change(text))
    with pytest.raises(LskdError, match=rf"{said}\); remove it to run it again") as caught:
        read_results(plan)
    assert str(caught.value).startswith(f"run folder {folder} is damaged (")


def test_logits_stay_what_they_were_when_the_file_changes_later(plan, folder):
    rewrite(folder, logits=load_file(folder / LOGITS)["logits"].astype(np.float32))
    logits = read_stored(folder, plan.num_classes).logits
    with (folder / LOGITS).open("r+b") as file:
        file.write(bytes((folder / LOGITS).stat().st_size))
    assert logits.any(1).all()


def test_labels_that_are_none(plan, folder):
    labels = load_file(folder / LOGITS)["labels"]
    for wrong, message in (
        (
            np.where(np.arange(len(labels)) == 1, -1, labels),
            r"labels\[1\] is -1; with 4 classes they are 0 to 3",
        ),
        (np.where(np.arange(len(labels)) == 2, 4, labels), r"labels\[2\] is 4; with 4 classes"),
        (labels[:, None], "sizes do not match"),
    ):
        rewrite(folder, labels=wrong)
        with pytest.raises(ValueError, match=message):
            read(plan)


def test_classes_that_do_not_count_are_named(plan, folder):
    tensors = load_file(folder / LOGITS)
    rows = np.flatnonzero(tensors["labels"] != 2)[:-1]
    names = bytes(tensors["keys"]).decode().split("\n")
    keys = np.frombuffer("\n".join(names[i] for i in rows).encode(), dtype=np.uint8)
    rewrite(folder, logits=tensors["logits"][rows], labels=tensors["labels"][rows], keys=keys)
    with pytest.warns(UserWarning, match="leaves out classes without samples: 2$"):
        read(plan)


def test_missing_runs_are_listed(plan):
    (plan.folder(plan.runs[-1]) / JOB).unlink()
    assert read_results(plan).missing == [plan.runs[-1].id]


def test_students_of_several_teachers_are_told_apart(fake_study):
    """They have the same seeds: none may take another's place."""
    teachers = [("big", "teacher.yaml"), ("other", "teacher.yaml")]
    results = read_results(fake_study(teachers=teachers))
    for teacher, _ in teachers:
        found = results.students("small", teacher, 0.1, 1.0, 0.0)
        assert sorted(found) == [0, 1, 2]
        assert all(f"of-{teacher}-" in result.run.id for result in found.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda job: job.update(versions={"torch": ["2"]}),
        lambda job: job.update(hardware=None),
        lambda job: job.pop("versions"),
        lambda job: job.update(wall_time_s="12"),
        lambda job: job["data"].update(sha256=0),
        lambda job: job.update(git="abc"),
        lambda job: job["environment"].update(OMP_NUM_THREADS=1),
    ],
)
def test_a_record_of_other_types_or_of_an_older_version_is_one_line(plan, folder, change):
    job = json.loads((folder / JOB).read_text())
    change(job)
    (folder / JOB).write_text(json.dumps(job))
    with pytest.raises(LskdError, match=r"job.json is damaged or of another version \(") as caught:
        provenance_rows(read_results(plan))
    assert "\n" not in str(caught.value)
