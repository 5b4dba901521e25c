"""Training from stored soft labels in mmengine's Runner: exactness, what is refused, what goes on."""

import copy
import json
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmcls.registry import TRANSFORMS
from mmengine.dataset import default_collate
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from lskd import DistillationLoss, FrozenTeacher, LskdError, SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.soft_labels.shards import merge_shards
from lskd.teachers.replay import MixingPolicy, augmentation_seed, mixed_image, mixed_targets
from mmcls_bnn import soft_labels
from mmcls_bnn.compat import MODELS
from mmcls_bnn.distil.replay import SeededPipeline, mix_by_image, seed_pipeline
from mmcls_bnn.distil.store import StoredTeacher

pytestmark = pytest.mark.unit

FORMAT = {"type": "ClsDataPreprocessor", "num_classes": 4, "mean": [127.5], "std": [127.5]}
AUGMENTED = [
    {"type": "RandomResizedCrop", "scale": 16, "crop_ratio_range": (0.5, 1.0)},
    {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
    {"type": "Rotate", "angle": 30.0, "prob": 0.5, "random_negative_prob": 0.5},
]


@pytest.fixture
def config(make_config, tmp_path):
    """A recipe that trains from a store of all classes in float32."""
    made = make_config(["SafeCheckpoint", "EpochSeed", "Curves", "SoftLabels"], *AUGMENTED)
    made["data_preprocessor"] = made["model"].pop("data_preprocessor")
    made["model"]["distillation"] = {"soft_labels": {"path": str(tmp_path / "labels"), "top_k": 0}}
    made["train_cfg"]["val_interval"] = 2
    return made


def epochs(number):
    return {"train_cfg": {"by_epoch": True, "max_epochs": number, "val_interval": 9}}


def command(config, folder, *words):
    """Run `python -m mmcls_bnn.soft_labels` on the config as a file; return the exit status."""
    path = folder / "recipe.py"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in config.items()))
    return soft_labels.main([str(path), "--cpu", *words])


def settings(config):
    return config["model"]["distillation"]["soft_labels"]


def assert_same_weights(one, other):
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)


def store(config):
    labels = SoftLabels(settings(config)["path"])
    labels.verify()
    return labels


# --- exactness ---


def test_from_the_store_as_online_weight_for_weight(config, train):
    """All classes in float32, and images that need no seed: as without any store."""
    config["train_dataloader"]["dataset"]["pipeline"] = config["val_dataloader"]["dataset"]["pipeline"]
    writing = train(config)
    reading = train(config)
    assert writing.model.teacher is not None
    assert reading.model.teacher is None
    del config["model"]["distillation"]["soft_labels"]
    online = train(config)
    assert_same_weights(online, writing)
    assert_same_weights(online, reading)


@pytest.mark.parametrize(("top_k", "values"), [(0, "float32"), (2, "float16")])
def test_later_students_learn_what_the_first_one_did(config, train, top_k, values):
    settings(config).update(top_k=top_k, values=values)
    config["model"]["distillation"]["hard_weight"] = 0.3
    writing = train(config)
    labels = store(config)
    assert labels.complete
    assert labels.layout.rows_per_sample == 1
    assert labels.layout.seeds
    assert (labels.layout.k, labels.layout.values) == (top_k or 4, values)
    keys = np.arange(len(labels))
    wanted = [augmentation_seed(42, int(key) // 96, int(key) % 96) for key in keys]
    np.testing.assert_array_equal(labels.take(keys).seeds, wanted)
    assert not np.array_equal(labels.take(keys[:96]).values, labels.take(keys[96:]).values)  # augmented
    assert_same_weights(writing, train(config))


def test_two_views_serve_five_epochs(config, train, tmp_path):
    """One that stores them and a later one learn the same; written ahead, they are the same rows."""
    config["train_cfg"]["max_epochs"] = 5
    settings(config).update(views=2, sampled=2, top_k=None)
    writing = train(config)
    labels = store(config)
    assert (len(labels), labels.layout.views, labels.layout.sampled) == (2 * 96, True, True)
    reading = train(config)
    assert reading.model.teacher is None
    assert_same_weights(writing, reading)
    settings(config)["path"] = str(tmp_path / "ahead")
    assert command(config, tmp_path, "--workers", "0") == 0
    np.testing.assert_array_equal(
        store(config).take(np.arange(2 * 96)).seeds, labels.take(np.arange(2 * 96)).seeds
    )


def test_other_students_share_it_in_another_order_with_workers(config, train, runner_of, monkeypatch):
    train(config)
    config["train_dataloader"].update(batch_size=20, num_workers=2, persistent_workers=True)
    config["randomness"] = {"seed": 5}
    config["model"]["backbone"]["width"] = 0.25
    config["model"]["head"]["in_channels"] = 128
    asked, original, teacher = [], StoredTeacher.answer, runner_of(config).model.load_teacher()

    def answer(self, inputs, data_samples):
        asked.append((original(self, inputs, data_samples), teacher(inputs)))
        return asked[-1][0]

    monkeypatch.setattr(StoredTeacher, "answer", answer)
    train(config)
    assert len(asked) == 2 * 5
    for stored, said in asked:  # the teacher, asked about these very images
        torch.testing.assert_close(stored, said, atol=1e-4, rtol=1e-4)


def test_written_ahead_by_the_command(config, train, tmp_path, capsys):
    """As in a study: the teacher is there too, for the validation images."""
    writing, trained = train(config), store(config)
    settings(config)["path"] = str(tmp_path / "ahead")
    teacher = config["model"]["teacher"]
    weights = torch.load(teacher["checkpoint"], weights_only=True)["state_dict"]
    weights["fc.weight"].zero_()
    torch.save(weights, tmp_path / "ignorant.pth")
    config["model"]["teacher"] = teacher | {"checkpoint": str(tmp_path / "ignorant.pth")}
    assert command(config, tmp_path) == 2
    assert "is at chance" in capsys.readouterr().err
    config["model"]["teacher"] = teacher
    assert not (tmp_path / "ahead").exists()
    assert command(config, tmp_path, "--epochs", "1", "--workers", "0") == 0
    assert "1 epoch(s) of 96 images are stored" in capsys.readouterr().out
    assert command(config, tmp_path) == 0
    ahead = store(config)
    assert ahead.complete
    assert ahead.identity == trained.identity
    keys = np.arange(len(ahead))
    np.testing.assert_array_equal(ahead.take(keys).seeds, trained.take(keys).seeds)
    settings(config)["path"] = str(tmp_path / "shards")
    for shard in ("2/2", "1/2"):
        assert command(config, tmp_path, "--workers", "0", "--shard", shard) == 0
    merged = merge_shards(tmp_path / "shards")
    assert (merged.complete, merged.identity) == (True, trained.identity)
    for part in ("values", "seeds"):
        found, wanted = (getattr(labels.take(keys), part) for labels in (merged, trained))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    settings(config).update(path=f"file://{tmp_path}/shards", cache=str(tmp_path / "cache"))
    with pytest.raises(LskdError, match="a copy of soft labels that are elsewhere"):
        train(config | epochs(3))
    settings(config)["verify"] = 16
    reading = train(config)
    assert reading.model.teacher is not None
    assert_same_weights(writing, reading)


# --- mixup and CutMix ---

MIXED = {"augments": [{"type": "Mixup", "alpha": 0.8}, {"type": "CutMix", "alpha": 1.0}], "probs": [0.3, 0.5]}


def test_mixed_images_are_the_same_for_all_students(config, train, tmp_path):
    """In another order, in batches of other sizes, with loading processes, and ahead of training."""
    config["data_preprocessor"]["batch_augments"] = MIXED
    config["model"]["distillation"]["hard_weight"] = 0.3
    writing = train(config)
    assert writing.model.data_preprocessor.batch_augments.policy == MixingPolicy(0.8, 1.0, 0.8, 0.625)
    assert_same_weights(writing, train(config))
    settings(config)["verify"] = 96
    config["train_dataloader"].update(batch_size=20, num_workers=1)
    train(config)
    trained = store(config)
    plain = copy.deepcopy(config)
    del plain["data_preprocessor"]["batch_augments"]
    with pytest.raises(LskdError, match=re.escape("augmentation.mixup_alpha is 0.8 there and off here")):
        train(plain)
    settings(config).update(path=str(tmp_path / "ahead"), verify=0)
    assert command(config, tmp_path, "--batch-size", "17", "--epochs", "1", "--workers", "0") == 0
    keys = np.arange(96)
    ahead = store(config).take(keys).values
    np.testing.assert_allclose(ahead, trained.take(keys).values, atol=1e-4)


def test_a_mixed_image_is_two_seeded_ones(config, runner_of):
    """Images of a run that does not mix, mixed as the core does."""
    plain = runner_of(config).build_dataloader(config["train_dataloader"]).dataset
    config["data_preprocessor"]["batch_augments"] = copy.deepcopy(MIXED)
    config["model"]["distillation"].update(alpha=0.1, convention="uniform")
    runner = runner_of(config)
    loader = runner.build_dataloader(runner.cfg.train_dataloader)
    seed_pipeline(loader, 42, mix_by_image(runner.model))
    plain.pipeline = SeededPipeline(plain, 42)
    for dataset in (plain, loader.dataset):
        dataset.pipeline.set_epoch(3)
    kinds = Counter()
    for sample in range(0, 96, 2):
        mixing = MixingPolicy(0.8, 1.0, 0.8, 0.625).draw(augmentation_seed(42, 3, sample), sample, 96)
        (image, label), weight = image_and_label(plain[sample]), 1.0
        partner = label
        if mixing is not None:
            other, partner = image_and_label(plain[mixing.partner])
            image, weight = mixed_image(image, other, mixing)
        kinds[mixing and mixing.kind] += 1
        found = loader.dataset[sample]
        assert torch.equal(found["inputs"], image)
        scores = mixed_targets(label, partner, torch.tensor([weight]), 4)[0]
        torch.testing.assert_close(found["data_samples"].gt_label.score, scores)
        assert found["data_samples"].get("soft_label_key") == 3 * 96 + sample
    assert len(kinds) == 3
    assert min(kinds.values()) >= 5
    model = runner.model.eval()
    batch = model.data_preprocessor(default_collate([loader.dataset[i] for i in range(9)]), True)
    model.stored = SimpleNamespace(answer=lambda *_: torch.zeros(9, 4))
    found = model.loss(**batch)["loss_hard"]
    labels = torch.stack([sample.gt_label.score for sample in batch["data_samples"]]).double()
    log_q = model.head(model.extract_feat(batch["inputs"])).double().log_softmax(-1)
    smoothed = 0.9 * labels + 0.1 / 4  # here alone, not before mixing too
    torch.testing.assert_close(found.double(), -(smoothed * log_q).sum(-1).mean(), rtol=1e-5, atol=0)


def image_and_label(item):
    return item["inputs"], item["data_samples"].gt_label.label


# --- mixed precision ---


@OPTIM_WRAPPERS.register_module(name="AmpOnCpu")
class AmpOptimWrapper(OptimWrapper):
    """mmengine's on a CPU, for which it has none: forward passes under autocast of a type."""

    def __init__(self, dtype=None, **settings):
        super().__init__(**settings)
        self.cast_dtype = None if dtype is None else getattr(torch, dtype)

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast("cpu", self.cast_dtype):
            yield


@pytest.mark.parametrize(
    ("dtype", "used", "written"),
    [
        (None, torch.bfloat16, "autocast"),  # torch's default on a CPU
        ("float16", torch.float16, "autocast"),  # that of the GPUs, on which mmengine trains so
        ("bfloat16", torch.bfloat16, "autocast bfloat16"),
    ],
)
def test_the_teacher_always_answers_in_the_precision_of_training(
    config, train, tmp_path, monkeypatch, dtype, used, written
):
    """In steps and outside: made fast, about images that an epoch left out, verified, ahead of training."""
    for name in ("val_dataloader", "val_evaluator", "val_cfg"):
        del config[name]
    config["custom_hooks"].insert(0, {"type": "TeacherHook", "samples": 0})
    config["train_dataloader"].update(batch_size=36, drop_last=True)
    config["model"]["distillation"]["teacher_fast"] = {"mode": "float32", "bound": 1.0}
    config["optim_wrapper"].update(type="AmpOnCpu", dtype=dtype)
    seen, answer = Counter(), FrozenTeacher.answer

    def spy(teacher, images):
        seen[torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")] += 1
        return answer(teacher, images)

    monkeypatch.setattr(FrozenTeacher, "answer", spy)
    train(config, **epochs(1))
    trained = store(config)
    assert trained.identity["teacher"]["precision"] == written
    settings(config)["verify"] = 30
    train(config, **epochs(1))
    other = "float16" if written == "autocast bfloat16" else "bfloat16"
    with pytest.raises(LskdError, match=r"teacher\.precision is autocast.* there and autocast.* here"):
        train(config, **epochs(1), optim_wrapper=config["optim_wrapper"] | {"dtype": other})
    settings(config)["path"] = str(tmp_path / "ahead")
    config["optim_wrapper"]["type"] = "AmpOptimWrapper"
    assert command(config, tmp_path, "--epochs", "1", "--workers", "0") == 0
    assert store(config).identity["teacher"] == trained.identity["teacher"]
    assert set(seen) == {used}


# --- goes on ---


def test_an_epoch_that_was_left_out_in_part_is_completed(config, train):
    """The last, smaller batch is dropped; without drop_last the same images come to the student."""
    config["train_dataloader"].update(batch_size=36, drop_last=True)
    train(config)
    assert store(config).complete
    assert not list(store(config).path.glob("scratch/*"))


def test_more_epochs_follow_and_a_resumed_run_is_the_unbroken_one(config, train):
    whole = train(config, **epochs(3))
    settings(config)["path"] += "-resumed"
    first = train(config, **epochs(1))
    assert len(store(config)) == 96
    resumed = train(config, **epochs(3), resume=True, load_from=f"{first.work_dir}/epoch_1.pth")
    assert len(store(config)) == 3 * 96
    assert_same_weights(whole, resumed)


def test_epochs_that_are_missing_when_a_run_is_resumed_are_asked_for(config, train):
    first = train(config)
    settings(config)["path"] += "-new"
    train(config, **epochs(3), resume=True, load_from=f"{first.work_dir}/epoch_2.pth")
    assert len(store(config)) == 3 * 96


def test_a_disk_that_fails_stops_the_run_or_not_as_asked(config, train, monkeypatch):
    def full(*arguments, **named):
        raise SoftLabelsError("labels cannot be written (No space left on device)")

    expected = train(config)
    settings(config)["path"] += "-full"
    monkeypatch.setattr(SoftLabelsWriter, "append", full)
    with pytest.raises(LskdError, match="No space left"):
        train(config)
    settings(config)["on_error"] = "continue"
    assert_same_weights(expected, train(config))
    assert len(store(config)) == 0


# --- verified and refused ---


@pytest.mark.parametrize("values", ["float16", "packed"])
def test_verify_asks_the_teacher_again(config, train, values):
    settings(config).update(top_k=2, values=values)
    train(config)
    settings(config)["verify"] = 30
    train(config)
    labels = store(config)
    rows = labels.take(np.arange(len(labels)))
    settings(config)["path"] += "-wrong"
    with SoftLabelsWriter(settings(config)["path"], labels.layout, labels.identity) as writer:
        writer.append(rows.values, (rows.ids + 1) % 4, seeds=rows.seeds)
    with pytest.raises(LskdError, match="are not what the teacher says: of image"):
        train(config)


def pipeline(config):
    return config["train_dataloader"]["dataset"]["pipeline"]


def another_teacher(config):
    teacher = config["model"]["teacher"]
    weights = torch.load(teacher["checkpoint"], weights_only=True)
    next(iter(weights["state_dict"].values())).add_(1)
    teacher["checkpoint"] = teacher["checkpoint"].replace(".pth", "-other.pth")
    torch.save(weights, teacher["checkpoint"])


@pytest.fixture(scope="module")
def one_store(tmp_path_factory):
    """The folder of one store for all the ways in which it does not belong."""
    return str(tmp_path_factory.mktemp("store") / "labels")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_teacher, "teacher.weights"),
        (lambda config: config["data_preprocessor"].update(std=[100.0]), "batches.std"),
        (
            lambda config: pipeline(config)[1].update(scale=24),
            "augmentation.step1 RandomResizedCrop.scale is 16 there and 24 here",
        ),
        (
            lambda config: pipeline(config).insert(3, {"type": "RandomFlip", "prob": 0.5}),
            "augmentation.steps is 5 there and 6 here",
        ),
        (
            lambda config: settings(config).update(seed=2**63 - 1),
            f"augmentation.seed is 42 there and {2**63 - 1} here",
        ),
        (lambda config: settings(config).update(top_k=3), "stored.top_k is 4 there and 3 here"),
        (
            lambda config: config["train_dataloader"]["dataset"].update(data_prefix="val"),
            "data.images is 96 there and 48 here",
        ),
    ],
)
def test_a_store_of_another_run_is_refused_by_name(config, train, change, named, one_store):
    settings(config)["path"] = one_store
    if not Path(one_store).exists():
        train(config, **epochs(1))
    change(config)
    with pytest.raises(LskdError, match=re.escape(named)) as caught:
        train(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("augments", "name"),
    [
        ([{"type": "ResizeMix", "alpha": 0.2}], "ResizeMix"),
        ([{"type": "CutMix", "alpha": 1.0, "cutmix_minmax": [0.2, 0.8]}], "CutMix"),
        ([{"type": "CutMix", "alpha": 1.0, "correct_lam": False}], "CutMix"),
        ([{"type": "Mixup", "alpha": 0.2}, {"type": "Mixup", "alpha": 0.8}], "Mixup"),
    ],
)
def test_mixing_that_cannot_be_repeated_is_refused_by_name(augments, name):
    preprocessor = MODELS.build({**FORMAT, "batch_augments": {"augments": augments}})
    with pytest.raises(LskdError, match=f"cannot be stored with {name} of data_preprocessor"):
        mix_by_image(SimpleNamespace(data_preprocessor=preprocessor, distillation=DistillationLoss()))


def odd_sizes(config):
    config["data_preprocessor"]["batch_augments"] = {"augments": [{"type": "Mixup", "alpha": 0.2}]}
    pipeline(config)[1:2] = [{"type": "RandomCrop", "crop_size": 8}, {"type": "OddSizes"}]


def joined(config):
    loader = config["train_dataloader"]
    loader["dataset"] = {"type": "RepeatDataset", "dataset": loader["dataset"], "times": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (odd_sizes, "cannot be mixed; let the pipeline crop or resize"),
        (joined, "RepeatDataset"),
        (lambda config: config["train_dataloader"]["sampler"].update(type="RepeatAugSampler"), "RepeatAug"),
        (lambda config: pipeline(config).insert(3, {"type": "OwnGenerator"}), "stored with OwnGenerator"),
        (lambda config: config["custom_hooks"].pop(), "soft labels need dict.*SoftLabelsHook"),
        (lambda config: settings(config).update(top_k=5), "top-K must be 1 to 4"),
        (
            lambda config: settings(config).update(top_k=None, sampled=2, rest="lump"),
            "sampled leaves no rest",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(config, train, change, words):
    change(config)
    with pytest.raises(LskdError, match=words):
        train(config)


@TRANSFORMS.register_module()
class OddSizes:
    """Images of many sizes."""

    def __call__(self, data):
        data["img"] = data["img"][: np.random.randint(4, 9)]
        return data


@TRANSFORMS.register_module()
class OwnGenerator:
    """A transform with randomness of its own."""

    def __init__(self):
        self.generator = np.random.default_rng()

    def __call__(self, data):
        data["img"] = np.clip(data["img"] + self.generator.integers(0, 9, data["img"].shape), 0, 255)
        return data


def test_a_precision_that_mmengine_has_not_is_one_line(config, tmp_path, capsys):
    config["optim_wrapper"].update(type="AmpOptimWrapper", dtype="half")
    assert command(config, tmp_path) == 2
    assert "optim_wrapper.dtype is 'half'; it must be float16 or bfloat16" in capsys.readouterr().err


def test_a_command_without_settings_is_one_line(config, tmp_path, capsys):
    del config["model"]["distillation"]["soft_labels"]
    assert command(config, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmcls_bnn: error: ")
    assert "has no model.distillation.soft_labels" in error
    assert json.dumps(error).count("\\n") == 1
    assert soft_labels.main([str(tmp_path / "nosuch.py")]) == 2
    assert "does not exist" in capsys.readouterr().err
