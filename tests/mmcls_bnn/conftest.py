"""A tiny image folder of real digits, and stock models of mmcls."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = 3
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


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    found = load_digits()
    for label in range(CLASSES):
        for i, index in enumerate(np.flatnonzero(found.target == label)[:15]):
            folder = root / ("val" if i % 3 == 0 else "train") / f"digit{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((found.images[index] * 15.9).astype(np.uint8)).save(folder / f"{index:04d}.png")
    return root


@pytest.fixture
def write_config(tmp_path: Path, digits: Path) -> Callable[..., Path]:
    """Write a configuration; pairs of texts are replaced in it."""

    def write(*changes: tuple[str, str], name: str = "config.py", data: Path | None = None) -> Path:
        text = CONFIG.format(classes=CLASSES, data=data or digits)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.py and a checkpoint that mmengine itself wrote, epoch_2.pth."""
    from mmcls.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.runner import Runner

    folder = tmp_path_factory.mktemp("run")
    (folder / "config.py").write_text(CONFIG.format(classes=CLASSES, data=digits))
    register_all_modules()
    settings = Config.fromfile(folder / "config.py")
    settings.work_dir = str(folder)
    Runner.from_cfg(settings).train()
    return folder
