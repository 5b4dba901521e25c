"""Training from stored soft labels in mmengine's Runner: exactness, what is refused, what goes on."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmcls.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.runner import Runner

from lskd import DistillationLoss, LskdError, SoftLabels, SoftLabelsError, SoftLabelsWriter
from lskd.teachers.replay import MixingPolicy, augmentation_seed
from mmcls_bnn import soft_labels
from mmcls_bnn.compat import MODELS
from mmcls_bnn.distil.replay import SeededPipeline, mix_by_image, seed_pipeline
from mmcls_bnn.distil.store import StoredTeacher

pytestmark = pytest.mark.unit

EPOCHS = 2
FORMAT = {"type": "ClsDataPreprocessor", "num_classes": 4, "mean": [127.5], "std": [127.5]}
AUGMENTED = [
    {"type": "RandomResizedCrop", "scale": 16, "crop_ratio_range": (0.5, 1.0)},
    {"type": "RandomFlip", "prob": 0.5, "direction": "horizontal"},
    {"type": "Rotate", "angle": 30.0, "prob": 0.5, "random_negative_prob": 0.5},
]


@pytest.fixture(scope="module")
def teacher_file(taught):
    return taught


@pytest.fixture
def config(make_config, tmp_path):
    """A recipe that trains from a store of all classes in float32."""
    made = make_config(["SafeCheckpoint", "EpochSeed", "Curves", "SoftLabels"], *AUGMENTED)
    made["data_preprocessor"] = made["model"].pop("data_preprocessor")
    made["model"]["distillation"] = {"soft_labels": {"path": str(tmp_path / "labels"), "top_k": 0}}
    made["train_cfg"]["val_interval"] = 2
    return made


count = iter(range(10**6))


def runner_of(config, **changes):
    config = copy.deepcopy(config)
    name = f"run{next(count)}"
    config |= {"experiment_name": name, "work_dir": f"{config['work_dir']}/{name}"} | changes
    return Runner.from_cfg(Config(config))


def train(config, **changes):
    """Train, and return the runner; it must leave the store to others."""
    runner = runner_of(config, **changes)
    runner.train()
    return runner


def command(config, folder, *words):
    """Run `python -m mmcls_bnn.soft_labels` on the config as a file; return the exit status."""
    path = folder / "recipe.py"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in config.items()))
    return soft_labels.main([str(path), "--cpu", *words])


def settings(config):
    return config["model"]["distillation"]["soft_labels"]


def assert_same_weights(one, other):
    one, other = one.model.state_dict(), other.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def store(config):
    labels = SoftLabels(settings(config)["path"])
    labels.verify()
    return labels


# --- exactness ---


def test_from_the_store_as_online_weight_for_weight(config):
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


def test_stored_ahead_and_verified_weight_for_weight(config, tmp_path):
    """As in a study: the teacher is there too, for the validation images."""
    writing = train(config)
    shutil.rmtree(settings(config)["path"])
    assert command(config, tmp_path) == 0
    settings(config)["verify"] = 16
    reading = train(config)
    assert reading.model.teacher is not None
    assert_same_weights(writing, reading)


@pytest.mark.parametrize(("top_k", "values"), [(0, "float32"), (2, "float16")])
def test_later_students_learn_what_the_first_one_did(config, top_k, values):
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


def test_other_students_share_it_in_another_order_with_workers(config):
    train(config)
    config["train_dataloader"].update(batch_size=20, num_workers=2, persistent_workers=True)
    config["randomness"] = {"seed": 5}
    config["model"]["backbone"]["width"] = 0.25
    config["model"]["head"]["in_channels"] = 128
    asked = []
    runner = runner_of(config)
    original = StoredTeacher.answer

    def answer(self, inputs, data_samples):
        with torch.inference_mode():
            asked.append((original(self, inputs, data_samples), TEACHER(inputs)))
        return asked[-1][0].clone()

    TEACHER = runner_of(config).model.load_teacher()
    StoredTeacher.answer = answer
    try:
        runner.train()
    finally:
        StoredTeacher.answer = original
    assert len(asked) == 2 * 5
    for stored, said in asked:  # the teacher, asked about these very images
        torch.testing.assert_close(stored, said, atol=1e-4, rtol=1e-4)


def test_written_ahead_by_the_command(config, tmp_path, capsys):
    train(config)
    trained = store(config)
    settings(config)["path"] = str(tmp_path / "ahead")
    weights = torch.load(config["model"]["teacher"]["checkpoint"], weights_only=True)["state_dict"]
    weights["fc.weight"].zero_()
    torch.save(weights, tmp_path / "ignorant.pth")
    ignorant = f"model.teacher.checkpoint={tmp_path / 'ignorant.pth'}"
    assert command(config, tmp_path, "--cfg-options", ignorant) == 2
    assert "is at chance" in capsys.readouterr().err
    assert not (tmp_path / "ahead").exists()
    assert command(config, tmp_path, "--epochs", "1", "--workers", "0") == 0
    assert "1 epoch(s) of 96 images are stored" in capsys.readouterr().out
    assert command(config, tmp_path, "--batch-size", "17") == 0
    ahead = store(config)
    assert ahead.complete
    assert ahead.identity == trained.identity
    keys = np.arange(len(ahead))
    np.testing.assert_allclose(ahead.take(keys).values, trained.take(keys).values, atol=1e-4)
    np.testing.assert_array_equal(ahead.take(keys).seeds, trained.take(keys).seeds)


# --- mixup and CutMix ---

MIXED = {"augments": [{"type": "Mixup", "alpha": 0.8}, {"type": "CutMix", "alpha": 1.0}], "probs": [0.3, 0.5]}


def test_mixed_images_are_the_same_for_all_students(config, tmp_path):
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


def test_a_mixed_image_is_two_seeded_ones(config):
    """Against the images of a run that does not mix, put together by NumPy."""
    plain = runner_of(config).build_dataloader(config["train_dataloader"]).dataset
    config["data_preprocessor"]["batch_augments"] = copy.deepcopy(MIXED)
    config["model"]["distillation"].update(alpha=0.1, convention="uniform")
    runner = runner_of(config)
    loader = runner.build_dataloader(runner.cfg.train_dataloader)
    seed_pipeline(loader, 42, mix_by_image(runner.model))
    mixed = loader.dataset
    plain.pipeline = SeededPipeline(plain, 42)
    for dataset in (plain, mixed):
        dataset.pipeline.set_epoch(3)
    kinds = {"mixup": 0, "cutmix": 0, "none": 0}
    for sample in range(0, 96, 2):
        seed = augmentation_seed(42, 3, sample)
        mixing = MixingPolicy(0.8, 1.0, 0.8, 0.625).draw(seed, sample, 96)
        first = plain[sample]
        image, weight, labels = first["inputs"].numpy(), 1.0, [first["data_samples"].gt_label.label]
        labels.append(labels[0])
        if mixing is not None:
            second = plain[mixing.partner]
            labels[1] = second["data_samples"].gt_label.label
            other = second["inputs"].numpy()
            if mixing.kind == "mixup":
                weight = mixing.weight
                image = np.round(image * np.float32(weight) + other * np.float32(1 - weight))
            else:
                top, bottom, left, right = mixing.box(16, 16)
                image = image.copy()
                image[:, top:bottom, left:right] = other[:, top:bottom, left:right]
                weight = 1 - (bottom - top) * (right - left) / 256
        kinds["none" if mixing is None else mixing.kind] += 1
        target = np.full(4, 0.1 / 4)
        target[int(labels[0])] += 0.9 * weight
        target[int(labels[1])] += 0.9 * (1 - weight)
        found = mixed[sample]
        np.testing.assert_allclose(found["inputs"].numpy(), image, atol=1)
        np.testing.assert_allclose(found["data_samples"].gt_label.score, target, atol=1e-6)
        assert found["data_samples"].get("soft_label_key") == 3 * 96 + sample
    assert min(kinds.values()) >= 5


# --- goes on ---


def test_an_epoch_that_was_left_out_in_part_is_completed(config):
    """The last, smaller batch is dropped; without drop_last the same images come to the student."""
    config["train_dataloader"].update(batch_size=36, drop_last=True)
    train(config)
    assert store(config).complete
    assert not (SoftLabels(settings(config)["path"]).path / "scratch").exists() or not list(
        (SoftLabels(settings(config)["path"]).path / "scratch").iterdir()
    )


def test_more_epochs_follow_and_a_resumed_run_is_the_unbroken_one(config):
    whole = train(config, train_cfg={"by_epoch": True, "max_epochs": 3, "val_interval": 9})
    settings(config)["path"] += "-resumed"
    first = train(config, train_cfg={"by_epoch": True, "max_epochs": 1, "val_interval": 9})
    assert len(store(config)) == 96
    resumed = runner_of(config, train_cfg={"by_epoch": True, "max_epochs": 3, "val_interval": 9})
    resumed._resume, resumed._load_from = True, f"{first.work_dir}/epoch_1.pth"
    resumed.train()
    assert len(store(config)) == 3 * 96
    assert_same_weights(whole, resumed)


def test_epochs_that_are_missing_when_a_run_is_resumed_are_asked_for(config):
    first = train(config)
    settings(config)["path"] += "-new"
    resumed = runner_of(config, train_cfg={"by_epoch": True, "max_epochs": 3, "val_interval": 9})
    resumed._resume, resumed._load_from = True, f"{first.work_dir}/epoch_2.pth"
    resumed.train()
    assert len(store(config)) == 3 * 96


def test_a_disk_that_fails_stops_the_run_or_not_as_asked(config, monkeypatch):
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


def test_verify_asks_the_teacher_again(config, caplog):
    settings(config)["top_k"] = 2
    train(config)
    settings(config)["verify"] = 30
    train(config, log_level="INFO")
    path = SoftLabels(settings(config)["path"]).path
    labels = store(config)
    rows = labels.take(np.arange(len(labels)))
    with SoftLabelsWriter(path.with_name("wrong"), labels.layout, labels.identity) as writer:
        writer.append(rows.values, (rows.ids + 1) % 4, seeds=rows.seeds)
    settings(config)["path"] = str(path.with_name("wrong"))
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
        (lambda config: settings(config).update(seed=43), "augmentation.seed is 42 there and 43 here"),
        (lambda config: settings(config).update(top_k=3), "stored.top_k is 4 there and 3 here"),
        (
            lambda config: config["train_dataloader"]["dataset"].update(data_prefix="val"),
            "data.images is 96 there and 48 here",
        ),
    ],
)
def test_a_store_of_another_run_is_refused_by_name(config, change, named, teacher_store):
    settings(config)["path"] = str(teacher_store(config))
    change(config)
    with pytest.raises(LskdError, match=re.escape(named)) as caught:
        train(config)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def teacher_store(tmp_path_factory):
    """One store for all the ways in which it does not belong."""
    made = []

    def get(config):
        if not made:
            config = copy.deepcopy(config)
            settings(config)["path"] = str(tmp_path_factory.mktemp("store") / "labels")
            train(config, train_cfg={"by_epoch": True, "max_epochs": 1, "val_interval": 9})
            made.append(settings(config)["path"])
        return made[0]

    return get


def test_what_cannot_be_repeated_is_refused_by_name(config):
    for augments, name in (
        ([{"type": "ResizeMix", "alpha": 0.2}], "ResizeMix"),
        ([{"type": "CutMix", "alpha": 1.0, "cutmix_minmax": [0.2, 0.8]}], "CutMix"),
        ([{"type": "CutMix", "alpha": 1.0, "correct_lam": False}], "CutMix"),
        ([{"type": "Mixup", "alpha": 0.2}, {"type": "Mixup", "alpha": 0.8}], "Mixup"),
    ):
        model = SimpleNamespace(
            data_preprocessor=MODELS.build({**FORMAT, "batch_augments": {"augments": augments}}),
            distillation=DistillationLoss(),
        )
        with pytest.raises(LskdError, match=f"cannot be stored with {name} of data_preprocessor"):
            mix_by_image(model)
    sizes = copy.deepcopy(config)
    sizes["data_preprocessor"]["batch_augments"] = {"augments": [{"type": "Mixup", "alpha": 0.2}]}
    del sizes["train_dataloader"]["dataset"]["pipeline"][1]  # the crop
    sizes["train_dataloader"]["dataset"]["pipeline"].insert(1, {"type": "RandomCrop", "crop_size": 8})
    sizes["train_dataloader"]["dataset"]["pipeline"].insert(2, {"type": "OddSizes"})
    with pytest.raises(LskdError, match="cannot be mixed; let the pipeline crop or resize"):
        train(sizes)
    repeated = copy.deepcopy(config)
    repeated["train_dataloader"]["sampler"] = {"type": "RepeatAugSampler"}
    with pytest.raises(LskdError, match="RepeatAugSampler"):
        train(repeated)
    joined = copy.deepcopy(config)
    dataset = joined["train_dataloader"]["dataset"]
    joined["train_dataloader"]["dataset"] = {"type": "RepeatDataset", "dataset": dataset, "times": 2}
    with pytest.raises(LskdError, match="RepeatDataset"):
        train(joined)
    unseeded = runner_of(config)
    loader = unseeded.build_dataloader(unseeded.cfg.train_dataloader)
    loader.dataset.pipeline.transforms.insert(2, OwnGenerator())
    with pytest.raises(LskdError, match="cannot be stored with OwnGenerator"):
        seed_pipeline(loader, 42)
    without = copy.deepcopy(config)
    without["custom_hooks"] = without["custom_hooks"][:-1]
    with pytest.raises(LskdError, match="SoftLabelsHook"):
        train(without)


@TRANSFORMS.register_module()
class OddSizes:
    """Images of many sizes."""

    def __call__(self, data):
        data["img"] = data["img"][: np.random.randint(4, 9)]
        return data


class OwnGenerator:
    """A transform with randomness of its own."""

    def __init__(self):
        self.generator = np.random.default_rng()

    def __call__(self, data):
        data["img"] = np.clip(data["img"] + self.generator.integers(0, 9, data["img"].shape), 0, 255)
        return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, "names no folder"),
        ({"topk": 3}, "unknown key 'topk'"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 5}, "top-K must be 1 to 4"),
        ({"values": "int8"}, "values is 'int8'; it must be float16 or float32"),
        ({"rest": "no"}, "rest is 'no'"),
        ({"on_error": "no"}, "on_error is 'no'"),
    ],
)
def test_settings_that_cannot_be_used(config, change, message):
    settings(config).update(change)
    with pytest.raises(LskdError, match=message):
        train(config)


def test_a_command_without_settings_is_one_line(config, tmp_path, capsys):
    del config["model"]["distillation"]["soft_labels"]
    assert command(config, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmcls_bnn: error: ")
    assert "has no model.distillation.soft_labels" in error
    assert json.dumps(error).count("\\n") == 1
    assert soft_labels.main([str(tmp_path / "nosuch.py")]) == 2
    assert "does not exist" in capsys.readouterr().err
