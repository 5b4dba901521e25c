"""Every recipe: it builds, and its schedule is the one that its text states."""

import functools
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, default_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from PIL import Image

from lskd import FrozenTeacher
from lskd.teachers.frozen import Normalisation
from mmcls_bnn.compat import DATASETS, MODELS
from mmcls_bnn.distil.classifier import binarized_in
from mmcls_bnn.distil.replay import KeyedImages, seed_pipeline
from mmcls_bnn.distil.teacher import normalisation_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = [
    ROOT / "reactnet_kd.py",
    *sorted((ROOT / "reactnet").glob("*.py")),
    ROOT / "digits_bnn" / "student.py",
    *sorted((ROOT / "fashion_mnist").glob("*.py")),
]


def names(paths):
    return [path.stem for path in paths]


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_recipe_builds_and_decays_as_stated(path):
    recipe = Config.fromfile(str(path))
    model = MODELS.build({**recipe.model, "data_preprocessor": recipe.data_preprocessor})
    channels, size = len(recipe.data_preprocessor.mean), 32
    logits = model.eval()(torch.randn(2, channels, size, size), mode="tensor")
    assert logits.shape == (2, recipe.num_classes)

    top, whole = recipe.optim_wrapper.optimizer.lr, recipe.train_cfg.max_epochs
    steps = [hook["epochs"] for hook in recipe.custom_hooks if hook["type"] == "TwoStepHook"]
    for schedule, (begin, end) in zip(recipe.param_scheduler, pairwise([0, *steps, whole]), strict=True):
        assert (schedule.get("begin", 0), schedule.get("end", whole)) == (begin, end)
        for epochs in (end - begin, 4, 1):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=top)
            own = {**schedule, "begin": 0, "end": epochs, "optimizer": optimizer}
            scheduler = PARAM_SCHEDULERS.build(own)
            for epoch in range(epochs):
                assert optimizer.param_groups[0]["lr"] == pytest.approx(top * (1 - epoch / epochs))
                scheduler.step()
    assert recipe.auto_scale_lr.base_batch_size == recipe.train_dataloader.batch_size

    assert "hardware" in path.read_text().lower()
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
    wrapper = build_optim_wrapper(model, recipe.optim_wrapper)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in wrapper.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            spared = any(word in name for word in ("norm", "slope", "head"))
            assert group["weight_decay"] == (0 if spared else decay), name
    assert (model.step1_checkpoint is None) == stem.endswith("step1")
    if stem.endswith("step2"):
        epochs = recipe.train_cfg.max_epochs
        assert model.step1_checkpoint.endswith(f"{stem[:-1]}1/epoch_{epochs}.pth")


def test_the_papers_recipe():
    recipe = Config.fromfile(str(ROOT / "reactnet_kd.py"))
    assert (recipe.model.teacher.model, recipe.model.teacher.smoothing) == ("resnet50", 0.1)
    assert recipe.optim_wrapper.optimizer.to_dict() == {"type": "Adam", "lr": 2.5e-3, "weight_decay": 0}
    assert (recipe.train_dataloader.batch_size, recipe.train_cfg.max_epochs) == (512, 128)
    recipe = Config.fromfile(str(ROOT / "reactnet" / "reactnet_a_kd.py"))
    assert (recipe.train_dataloader.batch_size, recipe.optim_wrapper.optimizer.lr) == (256, 1.25e-3)


COLOURS = ((200, 100, 20), (255, 255, 255))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """One image of each colour."""
    root = tmp_path_factory.mktemp("colours")
    for split in ("train", "val"):
        for label, colour in enumerate(COLOURS):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            Image.new("RGB", (300, 260), colour).save(folder / "flat.png")
    return root


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_colours_reach_student_teacher_and_store_as_they_are(path, colours):
    """Through the recipe's own pipelines and preprocessor, red first; lighting has a deviation of 3.2."""
    recipe = Config.fromfile(str(path))
    settings = {name: recipe[f"{name}_dataloader"].dataset.to_dict() for name in ("train", "val", "test")}
    show_colours(json.dumps(settings | {"data_preprocessor": recipe.data_preprocessor.to_dict()}), colours)


@functools.cache  # many recipes share these settings
def show_colours(settings, colours):
    recipe = Config(json.loads(settings))
    mean, std = recipe.data_preprocessor.mean, recipe.data_preprocessor.std
    preprocessor = MODELS.build(recipe.data_preprocessor)
    student = normalisation_of(preprocessor, len(mean))
    own = Normalisation((10.0, 20.0, 30.0)[: len(mean)], (2.0, 3.0, 4.0)[: len(mean)])
    teacher = FrozenTeacher(torch.nn.Identity(), own, student)
    expected = COLOURS
    if len(mean) == 1:  # luminance
        expected = [[0.299 * red + 0.587 * green + 0.114 * blue] for red, green, blue in COLOURS]

    def seen(items, training):
        batch = preprocessor(default_collate(items), training)["inputs"]
        for images, form in ((batch, (mean, std)), (teacher.prepare(batch), (own.mean, own.std))):
            middle = images[..., images.shape[-2] // 2, images.shape[-1] // 2]
            values = (middle * torch.tensor(form[1]) + torch.tensor(form[0])).view(-1, 2, len(mean))
            for label, colour in enumerate(expected):
                torch.testing.assert_close(
                    values[:, label],
                    torch.tensor(colour).float().expand(len(values), -1),
                    rtol=0,
                    atol=23 if training and len(mean) == 3 else 1,
                )

    for split in ("train", "val", "test"):
        settings = recipe[split].to_dict()
        settings.update({"data_root": str(colours), "num_classes": 2})
        dataset = DATASETS.build(settings)
        seen([dataset[index] for index in (0, 1) * 8], training=split == "train")
        if split == "train":
            seed_pipeline(SimpleNamespace(dataset=dataset, sampler=DefaultSampler(dataset)), 0)
            images = KeyedImages(dataset, range(2 * 8))
            seen([images[key] for key in range(len(images))], training=True)
