"""mmpretrain, mmcls' successor, and its maintained fork: the same run gives the same numbers."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lskd.base.files import read_csv
from mmcls_bnn.compat import CHOICES

pytestmark = pytest.mark.integration

RECIPES = Path(__file__).parents[2] / "recipes" / "reactnet"


@pytest.mark.skipif(
    find_spec("mmpretrain") is None, reason="mmpretrain is not installed; it is no dependency"
)
def test_the_same_curve_in_each_framework(digits, teacher_file, tmp_path):
    recipe = tmp_path / "recipe.py"
    where = f"dataset=dict(data_root={str(digits)!r}, num_classes=4)"
    recipe.write_text(
        f"_base_ = {str(RECIPES / 'digits_kd.py')!r}\n"
        "data_preprocessor = dict(num_classes=4)\n"
        "model = dict(backbone=dict(width=0.125), head=dict(num_classes=4, in_channels=64),\n"
        f"    teacher=dict(_delete_=True, model='test_resnet', checkpoint={str(teacher_file)!r}))\n"
        f"train_dataloader = dict({where})\nval_dataloader = dict({where})\ntest_dataloader = dict({where})\n"
        "val_evaluator = [dict(type='Accuracy', topk=(1,)), dict(type='DistillationMetric')]\n"
        "train_cfg = dict(max_epochs=2)\n"
        "custom_hooks = [dict(type=name + 'Hook') for name in ('SafeCheckpoint', 'EpochSeed', 'Curves')]\n"
    )
    curves = []
    for name in CHOICES:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MMCLS_BNN_FRAMEWORK": name}
        words = [sys.executable, "-c", "from mmcls_bnn import compat; print(compat.FRAMEWORK)"]
        result = subprocess.run(words, capture_output=True, text=True, env=environment)
        if result.returncode != 0:  # the fork and mmcls shut each other out
            continue
        scope = result.stdout.split()[-1]
        script = Path(find_spec(scope).origin).parent / ".mim" / "tools" / "train.py"
        words = [sys.executable, script, recipe, "--work-dir", tmp_path / name]
        words += ["--cfg-options", f"default_scope={scope}"]
        result = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        curves.append(read_csv(tmp_path / name / "epochs.csv"))
    assert all(curve == curves[0] for curve in curves)
    assert len(curves[0]) == 2
