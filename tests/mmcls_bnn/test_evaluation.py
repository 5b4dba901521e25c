"""Stock models of mmcls, on a tiny image folder of real digits."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch.nn import functional

from lskd import CheckpointError, LskdError, load_teacher_weights
from lskd.teachers.outputs import Answers
from mmcls_bnn.binary.packed import build_student
from mmcls_bnn.evaluation import evaluate_config

pytestmark = pytest.mark.integration

CLASSES = 4
CONFIG = """
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=18, base_channels=8, stem_channels=8, num_stages=4,
                  out_indices=(3,), style='pytorch'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes={classes}, in_channels=64,
              loss=dict(type='CrossEntropyLoss'), topk=(1,)),
    data_preprocessor=dict(num_classes={classes}, mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=16),
    dict(type='PackClsInputs'),
]
train_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='{data}', data_prefix='train', pipeline=pipeline))
val_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root='{data}', data_prefix='val', pipeline=pipeline))
val_evaluator = dict(type='Accuracy', topk=(1,))
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
val_cfg = dict()
test_dataloader, test_evaluator, test_cfg = val_dataloader, val_evaluator, val_cfg
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
param_scheduler = dict(type='MultiStepLR', milestones=[1])
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
default_scope = 'mmcls'
randomness = dict(seed=0)
"""


@pytest.fixture
def write_config(tmp_path: Path, digits: Path) -> Callable[..., Path]:
    """Write a configuration; pairs of texts are replaced in it."""

    def write(*changes: tuple[str, str]) -> Path:
        text = CONFIG.format(classes=CLASSES, data=digits)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "config.py").write_text(text)
        return tmp_path / "config.py"

    return write


@pytest.fixture
def moved(digits: Path, tmp_path: Path) -> Path:
    """A copy of the images, which the test may change."""
    return Path(shutil.copytree(digits, tmp_path / "moved"))


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.py and a checkpoint that mmengine itself wrote, epoch_2.pth."""
    from mmcls.utils import register_all_modules
    from mmengine.runner import Runner

    folder = tmp_path_factory.mktemp("run")
    (folder / "config.py").write_text(CONFIG.format(classes=CLASSES, data=digits))
    register_all_modules()
    settings = Config.fromfile(folder / "config.py")
    settings.work_dir = str(folder)
    Runner.from_cfg(settings).train()
    return folder


@pytest.fixture
def evaluate(trained: Path) -> Callable[..., Answers]:
    """Ask what mmengine has trained."""
    return partial(evaluate_config, trained / "config.py", trained / "epoch_2.pth")


def gather(answers):
    """Logits, labels and features of one process, in the order of the data set."""
    numbers, *columns = zip(*answers.batches, strict=True)
    order = torch.cat(numbers).argsort()
    return [None if column[0] is None else torch.cat(column)[order].clone() for column in columns]


def test_logits_are_those_of_mmcls_own_prediction(trained, digits, evaluate):
    """The checkpoint is one that mmengine wrote, with its training log in it."""
    from mmcls.apis import init_model
    from mmengine.runner import Runner

    answers = evaluate(batch_size=4)
    logits, labels, _ = gather(answers)
    assert logits.shape == (48, 4)
    assert logits.dtype is torch.float32
    assert answers.class_names == ["digit0", "digit1", "digit2", "digit3"]
    # mmcls' own reader of checkpoints fails on what mmengine wrote.
    meta = {"dataset_meta": {"classes": answers.class_names}}
    weights = {"state_dict": load_teacher_weights(trained / "epoch_2.pth"), "meta": meta}
    torch.save(weights, trained / "weights.pth")
    model = init_model(str(trained / "config.py"), str(trained / "weights.pth"), device="cpu")
    loader = Runner.build_dataloader(model.cfg.val_dataloader)
    with torch.no_grad():
        expected = [sample for batch in loader for sample in model.val_step(batch)]
    for key, row, label, sample in zip(answers.keys, logits, labels, expected, strict=True):
        assert key.startswith(f"val/digit{int(label)}/")
        assert sample.img_path == str(digits / key)
        assert int(sample.gt_label.label) == int(label)
        torch.testing.assert_close(row.softmax(-1), sample.pred_label.score, atol=1e-6, rtol=1e-5)
    logits.requires_grad_()  # no inference tensors


def test_features_and_templates_give_the_logits(trained, evaluate):
    answers = evaluate(features=True)
    logits, _, features = gather(answers)
    weights = load_teacher_weights(trained / "epoch_2.pth")
    assert torch.equal(answers.templates, weights["head.fc.weight"])
    assert features.shape == (48, 64)
    expected = functional.linear(features, answers.templates, weights["head.fc.bias"])
    torch.testing.assert_close(logits, expected)
    assert torch.equal(gather(evaluate())[0], logits)


def test_shares_of_three_processes_are_the_whole(evaluate):
    whole = gather(evaluate())
    shares = [evaluate(rank=r, world_size=3, batch_size=2) for r in range(3)]
    numbers, logits, labels, _ = zip(*(batch for share in shares for batch in share.batches), strict=True)
    order = torch.cat(numbers)
    assert sorted(order.tolist()) == list(range(48))
    torch.testing.assert_close(torch.cat(logits), whole[0][order], atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat(labels), whole[1][order])


def test_data_in_another_folder(evaluate, moved):
    expected = gather(evaluate())[0]
    shutil.rmtree(moved / "train")
    for name in ("val", "validation"):
        (moved / "val").rename(moved / name)
        answers = evaluate(moved)
        assert torch.equal(gather(answers)[0], expected)
        assert answers.keys[0].startswith(f"{name}/digit0/")


def test_annotation_files(trained, write_config, moved):
    config = write_config(
        ("data_prefix='val'", "data_prefix='val', ann_file='meta.txt', classes=list('abcd')")
    )
    images = [path.relative_to(moved / "val") for path in sorted((moved / "val").rglob("*.png"))][:7]
    (moved / "meta.txt").write_text("".join(f"{path} {str(path)[5]}\n" for path in images))
    listed = evaluate_config(config, trained / "epoch_2.pth", moved)
    assert listed.samples == 7
    assert listed.class_names == ["a", "b", "c", "d"]
    (moved / "meta.txt").unlink()
    assert evaluate_config(config, trained / "epoch_2.pth", moved).samples == 48


def test_a_timm_model_in_mmcls_downloads_nothing(write_config, tmp_path):
    import timm

    config = write_config(
        ("model = dict(", "unused = dict("),
        (
            "pipeline = [",
            "model = dict(type='TimmClassifier', model_name='test_resnet', pretrained=True, num_classes=4,"
            " data_preprocessor=dict(mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True))\npipeline = [",
        ),
    )
    model = timm.create_model("test_resnet", num_classes=4)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    answers = evaluate_config(config, tmp_path / "a.pth", features=True)
    logits, _, features = gather(answers)
    torch.testing.assert_close(logits, functional.linear(features, model.fc.weight, model.fc.bias))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("type='ResNet_CIFAR'", "type='NoSuchNet'")], ["NoSuchNet", "custom_imports"]),
        ([("type='CustomDataset'", "type='NoSuchData'")], ["NoSuchData", "custom_imports"]),
        ([("depth=18", "depth=19")], ["model of", "cannot be made"]),
        (
            [("default_scope", "custom_imports = dict(imports='nosuchmodule')\ndefault_scope")],
            ["nosuchmodule"],
        ),
        ([("pipeline = [", "pipeline = [[")], ["cannot be read"]),
        ([("model = dict(", "other = dict(")], ["has no model"]),
        (
            [("val_dataloader = dict(", "val_dataloader = None or dict(dataset=None) if True else dict(")],
            ["no val_dataloader"],
        ),
        ([("data_prefix='val'", "data_prefix='nosuch'")], ["nosuch", "--data-dir"]),
        ([("num_classes=4", "num_classes=5")], ["does not fit", "head.fc.weight"]),
        ([("mean=[127.5] * 3, std=[64.0] * 3", "mean=[1] * 2, std=[1] * 2")], ["cannot process", "pipeline"]),
        ([("base_channels=8", "base_channels=16"), ("in_channels=64", "in_channels=128")], ["does not fit"]),
    ],
)
def test_a_config_that_cannot_be_used(trained, write_config, changes, words):
    with pytest.raises(LskdError) as error:
        gather(evaluate_config(write_config(*changes), trained / "epoch_2.pth"))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_vision_transformer_at_another_image_size(write_config, tmp_path):
    """mmcls resizes the position embeddings when it loads them, before shapes are compared."""
    start, end = CONFIG.index("    backbone="), CONFIG.index("    data_preprocessor=")
    network = """    backbone=dict(type='VisionTransformer', img_size=16, patch_size=8, arch=dict(
        embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16)),
    head=dict(type='VisionTransformerClsHead', num_classes=4, in_channels=16),
"""
    change = (CONFIG[start:end].format(classes=CLASSES), network)
    model = Config.fromfile(write_config(change)).model
    torch.save(build_student(model.to_dict()).state_dict(), tmp_path / "vit.pth")
    larger = write_config(change, ("img_size=16", "img_size=32"), ("scale=16", "scale=32"))
    assert gather(evaluate_config(larger, tmp_path / "vit.pth"))[0].isfinite().all()


def test_other_things_that_are_not_there(trained, moved, tmp_path):
    config, checkpoint = trained / "config.py", trained / "epoch_2.pth"
    shutil.rmtree(moved / "val" / "digit2")
    for arguments, word in (
        ((tmp_path / "nosuch.py", checkpoint), "does not exist"),
        ((config, None), "no weights"),
        ((config, tmp_path / "nosuch.pth"), "does not exist"),
        ((config, checkpoint, tmp_path / "nosuch"), "does not exist"),
        ((config, checkpoint, tmp_path), "has no folder"),
        ((config, checkpoint, moved), "3 classes, the model 4"),
    ):
        with pytest.raises(LskdError, match=word) as error:
            evaluate_config(*arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(evaluate, moved, workers):
    next((moved / "val" / "digit1").iterdir()).write_bytes(b"no image")
    with pytest.raises(LskdError, match="cannot be read") as error:
        gather(evaluate(moved, workers=workers))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_would_run_code(trained, trap):
    with pytest.raises(CheckpointError, match="refused"):
        evaluate_config(trained / "config.py", trap)


def test_what_mmengine_wrote_is_read_without_mmengine(trained):
    code = (
        "import sys; sys.modules['mmengine'] = None; import lskd; "
        "print(len(lskd.load_teacher_weights(sys.argv[1])))"
    )
    path = trained / "epoch_2.pth"
    done = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)
    assert int(done.stdout) == len(load_teacher_weights(path))


def test_a_preprocessor_beside_the_model_is_the_models(trained, evaluate, write_config):
    """mmengine's Runner hands it on; most of mmcls' own configurations have it there."""
    preprocessor = "dict(num_classes=4, mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True)"
    beside = write_config(
        (f",\n    data_preprocessor={preprocessor})", f")\ndata_preprocessor = {preprocessor}")
    )
    found, _, _ = gather(evaluate_config(beside, trained / "epoch_2.pth"))
    torch.testing.assert_close(found, gather(evaluate())[0])
