"""Every recipe: it builds, and its schedule is the one that its text states."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import LinearLR

from mmcls_bnn.compat import MODELS
from mmcls_bnn.step1 import binarized_in

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = [ROOT / "reactnet_kd.py", *sorted((ROOT / "reactnet").glob("*.py"))]


def names(paths):
    return [path.stem for path in paths]


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_recipe_builds_and_decays_as_stated(path):
    recipe = Config.fromfile(str(path))
    model = MODELS.build({**recipe.model, "data_preprocessor": recipe.data_preprocessor})
    channels, size = len(recipe.data_preprocessor.mean), 32
    logits = model.eval()(torch.randn(2, channels, size, size), mode="tensor")
    assert logits.shape == (2, recipe.num_classes)

    epochs, top = recipe.train_cfg.max_epochs, recipe.optim_wrapper.optimizer.lr
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=top)
    (schedule,) = recipe.param_scheduler
    scheduler = LinearLR(optimizer, **{key: value for key, value in schedule.items() if key != "type"})
    for epoch in range(epochs):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(top * (1 - epoch / epochs))
        scheduler.step()

    text = path.read_text()
    for word in ("mim train mmcls", "Hardware", "hardware"):
        assert word in text or word.lower() in text.lower()
    assert recipe.default_hooks.checkpoint.max_keep_ckpts >= 2


@pytest.mark.parametrize(
    ("stem", "binarize", "decay"),
    [
        ("reactnet18_step1", ["activations"], 1e-5),
        ("reactnet18_step2", ["activations", "weights"], 0),
        ("reactnet_a_step1", ["activations"], 1e-5),
        ("reactnet_a_step2", ["activations", "weights"], 0),
        ("digits_step1", ["activations"], 1e-5),
        ("digits_step2", ["activations", "weights"], 0),
    ],
)
def test_two_steps(stem, binarize, decay):
    recipe = Config.fromfile(str(ROOT / "reactnet" / f"{stem}.py"))
    model = MODELS.build({**recipe.model, "data_preprocessor": recipe.data_preprocessor})
    assert binarized_in(model) == binarize
    assert recipe.optim_wrapper.optimizer.weight_decay == decay
    assert (model.step1_checkpoint is None) == stem.endswith("step1")
    if stem.endswith("step2"):
        epochs = recipe.train_cfg.max_epochs
        assert model.step1_checkpoint.endswith(f"{stem[:-1]}1/epoch_{epochs}.pth")


def test_the_papers_recipe():
    recipe = Config.fromfile(str(ROOT / "reactnet_kd.py"))
    assert (recipe.teacher_model, recipe.teacher_smoothing) == ("resnet50", 0.1)
    assert recipe.model.teacher.checkpoint == recipe.teacher_checkpoint
    assert recipe.optim_wrapper.optimizer.to_dict() == {"type": "Adam", "lr": 2.5e-3, "weight_decay": 0}
    assert (recipe.train_dataloader.batch_size, recipe.train_cfg.max_epochs) == (512, 128)
    recipe = Config.fromfile(str(ROOT / "reactnet" / "reactnet_a_kd.py"))
    assert (recipe.train_dataloader.batch_size, recipe.optim_wrapper.optimizer.lr) == (256, 1.25e-3)
