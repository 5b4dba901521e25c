"""Any timm or torchvision model over any image folder."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.nn import functional

from lskd import DivergedError, LskdError, load_teacher_weights
from timm_ls_kd.evaluation import collect_logits, evaluate_model
from timm_ls_kd.models import create_for_run, create_torchvision

pytestmark = pytest.mark.integration


def logits_of(*arguments, **options):
    return evaluate_model(*arguments, **options).evaluation().logits


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of random weights, away from any run."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), path)
    return path


def test_a_run_is_asked_as_it_was_trained(teacher_run, digits):
    """Image size, normalisation and class count come from args.yaml."""
    expected = collect_logits(teacher_run)
    answers = evaluate_model("test_resnet", teacher_run / "last.pth.tar", digits)
    found = answers.evaluation()
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.labels, expected.labels)
    assert found.keys == expected.keys
    assert (answers.samples, answers.num_classes, answers.templates) == (48, 4, None)
    assert answers.class_names == ["digit0", "digit1", "digit2", "digit3"]


def test_what_is_given_comes_before_the_run(teacher_run, digits, tmp_path):
    checkpoint = teacher_run / "last.pth.tar"
    alone = Path(shutil.copy(checkpoint, tmp_path / "last.pth.tar"))
    other = {"img_size": 48, "crop_pct": 0.5}
    of_run = logits_of("test_resnet", checkpoint, digits, **other)
    assert torch.equal(of_run, logits_of("test_resnet", alone, digits, **other))
    for name in other:
        without = {key: value for key, value in other.items() if key != name}
        found = logits_of("test_resnet", checkpoint, digits, **without)
        assert not torch.allclose(found, of_run, atol=1e-3), name


def test_a_size_that_is_given_comes_before_input_size(teacher_run, digits, tmp_path):
    folder = Path(shutil.copytree(teacher_run, tmp_path / "run"))
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    settings |= {"img_size": None, "input_size": [3, 64, 64]}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    at64 = logits_of("test_resnet", folder / "last.pth.tar", digits)
    at32 = logits_of("test_resnet", folder / "last.pth.tar", digits, img_size=32)
    torch.testing.assert_close(at32, collect_logits(teacher_run).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(at32, at64, atol=1e-3)


def test_without_a_run_the_models_own_transform(weights, digits):
    """Against timm's own pieces, one image at a time; the class count is the checkpoint's."""
    found = evaluate_model("test_resnet", weights, digits, batch_size=5).evaluation()
    model = timm.create_model("test_resnet", num_classes=4).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.inference_mode():
        for key, row, label in list(zip(found.keys, found.logits, found.labels, strict=True))[::7]:
            image = transform(Image.open(digits / key).convert("RGB"))[None]
            torch.testing.assert_close(row, model(image)[0], atol=1e-5, rtol=1e-4)
            assert key.startswith(f"val/digit{int(label)}/")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_features_and_templates_give_the_logits(digits, tmp_path, name):
    model = timm.create_model(name, num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    answers = evaluate_model(name, tmp_path / "weights.pth", digits, features=True, batch_size=48)
    ((_, logits, _, features),) = answers.batches
    classifier = model.get_classifier()
    assert torch.equal(answers.templates, classifier.weight)
    torch.testing.assert_close(functional.linear(features, answers.templates, classifier.bias), logits)
    # timm's name for them.
    transform = create_transform(**resolve_data_config({}, model=model))
    images = torch.stack([transform(Image.open(digits / key).convert("RGB")) for key in answers.keys[:4]])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features[:4], expected, atol=1e-4, rtol=1e-4)


def test_shares_of_three_processes_are_the_whole(weights, digits):
    ((*_, all_features),) = evaluate_model("test_resnet", weights, digits, features=True).batches
    whole = evaluate_model("test_resnet", weights, digits).evaluation()
    shares = [
        evaluate_model("test_resnet", weights, digits, features=True, rank=r, world_size=3, batch_size=7)
        for r in range(3)
    ]
    numbers, logits, labels, features = zip(*(b for share in shares for b in share.batches), strict=True)
    order = torch.cat(numbers)
    assert sorted(order.tolist()) == list(range(48))
    torch.testing.assert_close(torch.cat(logits), whole.logits[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat(labels), whole.labels[order])
    torch.testing.assert_close(torch.cat(features), all_features[order], atol=1e-5, rtol=1e-5)


def test_mixed_precision_is_near(weights, digits):
    exact = logits_of("test_resnet", weights, digits)
    mixed = logits_of("test_resnet", weights, digits, amp=True)
    assert mixed.dtype is torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, atol=0.05, rtol=0.05)


def test_grey_images(digits, tmp_path):
    torch.save(
        timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict(), tmp_path / "last.pth"
    )
    (tmp_path / "args.yaml").write_text("model: test_resnet\nin_chans: 1\nimg_size: 32\n")
    assert logits_of("test_resnet", tmp_path / "last.pth", digits).shape == (48, 4)
    (tmp_path / "args.yaml").unlink()
    with pytest.raises(LskdError, match="input channels"):
        evaluate_model("test_resnet", tmp_path / "last.pth", digits)


def refused(*arguments, **options):
    with pytest.raises(LskdError) as error:
        logits_of(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_asked(weights, digits, tmp_path):
    assert "did you mean" in refused("test_resnetz", weights, digits)
    assert "does not exist" in refused("test_resnet", tmp_path / "nosuch.pth", digits)
    assert "another architecture" in refused("test_vit", weights, digits)
    assert "does not exist" in refused("test_resnet", weights, tmp_path / "nosuch")
    assert "--data-dir" in refused("test_resnet", weights, None)
    assert "no folder for the split 'test'" in refused("test_resnet", weights, digits, "test")


def test_pretrained_weights_that_cannot_be_had(digits):
    assert "--checkpoint FILE" in refused("test_resnet.r160_in1k", None, digits)
    assert "--checkpoint FILE" in refused("resnet10t", None, digits)


def test_other_classes_than_the_models(weights, digits, tmp_path):
    """Fewer folders than classes would be numbered otherwise than the model's classes."""
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    shutil.rmtree(data / "val" / "digit1")
    assert "has 3 classes, model 'test_resnet' 4" in refused("test_resnet", weights, data)
    for name in ("digit1", "digit4"):
        shutil.copytree(digits / "val" / "digit2", data / "val" / name)
    assert "has 5 classes, model 'test_resnet' 4" in refused("test_resnet", weights, data)
    shutil.rmtree(data / "val" / "digit4")
    (data / "val" / "digit05").mkdir()
    assert "has no images" in refused("test_resnet", weights, data)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(weights, own_digits, workers):
    image = next((own_digits / "val" / "digit1").iterdir())
    image.write_bytes(b"no image")
    message = refused("test_resnet", weights, own_digits, workers=workers)
    assert f"image {image} cannot be read" in message


def test_no_features_without_a_linear_classifier(digits, tmp_path):
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "a.pth")
    message = refused("torchvision:squeezenet1_1", tmp_path / "a.pth", digits, features=True)
    assert "no single linear classifier" in message


# torchvision


def test_torchvision_model(digits, tmp_path):
    """Against torchvision's own transform, and a state dict that an old torchvision wrote."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=4)
    preset = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    paths = [tmp_path / path.relative_to(digits) for path in sorted((digits / "val").rglob("*.png"))[::4]]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(digits / path.relative_to(tmp_path), path)
    images = torch.stack([preset(Image.open(path).convert("RGB")) for path in paths])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.inference_mode():
        model.train()(images)  # so that untrained logits differ between images
        expected = model.eval()(images)
    assert float(expected.std(0).mean()) > 0.01
    old = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save(old, tmp_path / "a.pth")
    name = "torchvision:mobilenet_v2"
    answers = evaluate_model(name, tmp_path / "a.pth", tmp_path, batch_size=48, features=True)
    ((_, logits, _, features),) = answers.batches
    assert [tmp_path / key for key in answers.keys] == paths
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    classifier = model.classifier[1]
    assert torch.equal(answers.templates, classifier.weight)
    torch.testing.assert_close(functional.linear(features, answers.templates, classifier.bias), logits)


def test_old_names_of_densenet(tmp_path):
    model = torchvision.models.densenet121(num_classes=4)
    state = model.state_dict()
    old = {}
    for key, value in state.items():
        if "num_batches" in key:
            continue
        if ".denselayer" in key:
            for part in ("norm", "conv"):
                for number in "12":
                    key = key.replace(f".{part}{number}.", f".{part}.{number}.")
        old[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "a.pth")
    found, _ = create_torchvision("densenet121", tmp_path / "a.pth")
    assert found.num_classes == 4
    for key, value in found.state_dict().items():
        assert torch.equal(value, state[key] if "num_batches" not in key else torch.tensor(0)), key


def test_torchvisions_own_files_get_torchvisions_own_transform():
    """The pixels of each published preset, by timm's transform."""
    from timm_ls_kd.models import _published

    image = Image.effect_mandelbrot((300, 260), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    names = torchvision.models.list_models(module=torchvision.models)
    seen = set()
    entries = [(name, entry) for name in names for entry in torchvision.models.get_model_weights(name)]
    for name, entry in entries:
        found = _published(name, Path("weights") / entry.url.rpartition("/")[2])
        key = tuple(map(str, found.values()))
        if key in seen:
            continue
        seen.add(key)
        transform = create_transform(
            (3, found["img_size"], found["img_size"]),
            interpolation=found["interpolation"],
            crop_pct=found["crop_pct"],
            mean=found["mean"],
            std=found["std"],
        )
        ours, theirs = transform(image), entry.transforms()(image)
        assert ours.shape == theirs.shape, (name, entry)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=f"{name} {entry}")
    assert len(seen) > 5


def test_what_torchvision_does_not_have(digits, weights):
    assert "unknown model 'torchvision:nosuch'" in refused("torchvision:nosuch", weights, digits)
    assert "unknown model" in refused("torchvision:fasterrcnn_resnet50_fpn", weights, digits)
    assert "--checkpoint" in refused("torchvision:resnet18", None, digits)
    assert "another architecture" in refused("torchvision:resnet18", weights, digits)


def test_what_diverged_is_not_evaluated(teacher, digits, tmp_path):
    state = load_teacher_weights(teacher)
    for value, words in ((float("nan"), "fc.weight in"), (3e38, "the logits")):
        changed = {**state, "fc.bias": torch.full((4,), value), "fc.weight": state["fc.weight"] + value}
        torch.save(changed, tmp_path / "bad.pth")
        with pytest.raises(DivergedError, match=words):
            logits_of("test_resnet", tmp_path / "bad.pth", digits)


# a run's own folder


def test_logits_are_those_of_the_summary(teacher_run, digits, summary):
    found = collect_logits(teacher_run)
    last = summary(teacher_run)[-1]
    assert (found.logits.shape, found.logits.dtype, found.labels.dtype) == (
        (48, 4),
        torch.float32,
        torch.int64,
    )
    assert float(functional.cross_entropy(found.logits, found.labels)) == pytest.approx(
        last["eval_loss"], rel=1e-5
    )
    top1 = 100 * float((found.logits.argmax(-1) == found.labels).float().mean())
    assert top1 == pytest.approx(last["eval_top1"])
    assert len(set(found.keys)) == 48
    for key, label in zip(found.keys, found.labels, strict=True):
        assert key.startswith(f"val/digit{label}/")
        assert (digits / key).is_file()
    found.logits.requires_grad_()  # no inference tensors


def test_another_checkpoint_and_place(teacher_run, digits, tmp_path):
    moved = Path(shutil.copytree(digits, tmp_path / "moved"))
    found = collect_logits(teacher_run, data_dir=moved, checkpoint="model_best.pth.tar")
    assert found.keys[0].startswith("val/digit0/")


def test_arguments_of_an_upstream_run(teacher_run, tmp_path):
    """The positional data folder is under another name there."""
    folder = Path(shutil.copytree(teacher_run, tmp_path / "run"))
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    settings |= {"data": settings["data_dir"], "data_dir": None, "gp": None, "bn_eps": None}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    assert torch.equal(collect_logits(folder).logits, collect_logits(teacher_run).logits)
    # The weights fit any.
    assert create_for_run("test_efficientnet", "model", settings | {"bn_eps": 0.5}, 10).bn1.eps == 0.5


def test_averaged_weights_are_used_where_there_are_some(train, tmp_path, summary):
    train("run", "--model-ema", "--model-ema-decay", 0.99, "--epochs", 2)
    folder = tmp_path / "runs" / "run"
    found = collect_logits(folder)
    expected = summary(folder)[-1]["eval_loss"]
    assert float(functional.cross_entropy(found.logits, found.labels)) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_evaluated(teacher_run, tmp_path):
    with pytest.raises(LskdError, match=r"args\.yaml"):
        collect_logits(tmp_path)
    with pytest.raises(LskdError, match=r"nosuch"):
        collect_logits(teacher_run, checkpoint="nosuch.pth.tar")
    with pytest.raises(LskdError, match="does not exist"):
        collect_logits(teacher_run, data_dir=tmp_path / "nosuch")
