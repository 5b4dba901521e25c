"""1-bit weights: what is in the file, that it gives the same logits to the bit, and counts of operations."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file, save_file

from lskd import LskdError
from mmcls_bnn import complexity, export, profile
from mmcls_bnn.binary.fast import FastBlock, PackedConv2d
from mmcls_bnn.binary.packed import FORMAT, build_student, deployable, load_packed, pack, save_packed

pytestmark = pytest.mark.unit


def description(**backbone):
    channels = 128 if backbone.get("type") == "ReActNetA" else 64
    return {
        "type": "ImageClassifier",
        "backbone": {"type": "ReActNet", "width": 0.125, "stem": "cifar", "in_channels": 1, **backbone},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 4, "in_channels": channels},
        "data_preprocessor": {"type": "ClsDataPreprocessor"},
    }


@pytest.fixture
def checkpoint(tmp_path):
    def make(values, binarize=("activations", "weights"), name="epoch_1.pth"):
        model = build_student(values)
        model.train()(torch.randn(8, 1, 16, 16), mode="tensor")  # statistics that are not 0 and 1
        note = {"binarize": list(binarize), "model": json.dumps(values)}
        torch.save({"state_dict": model.state_dict(), "meta": {"mmcls_bnn": note}}, tmp_path / name)
        return tmp_path / name, model.eval()

    return make


def test_export_holds_one_bit_a_weight_and_equal_logits(checkpoint, tmp_path, capsys):
    path, model = checkpoint(description())
    with torch.no_grad():
        model.backbone.blocks[0].conv.weight[0, 0, 0, 0] = 0.0  # counts as +1
        model.backbone.blocks[0].conv.weight[0, 0, 0, 1] = -0.0
    torch.save({**torch.load(path, weights_only=True), "state_dict": model.state_dict()}, path)
    output = tmp_path / "out.safetensors"
    assert export.main([str(path), str(output)]) == 0
    images = torch.randn(3, 1, 20, 20)
    with torch.no_grad():
        logits = model(images, mode="tensor")
        assert torch.equal(load_packed(output, fast=False)(images, mode="tensor"), logits)
        assert isinstance(load_packed(output).backbone.blocks[0], FastBlock)

    stored, weights = load_file(output), model.state_dict()
    latent = weights["backbone.blocks.0.conv.weight"].numpy()
    bits = stored["backbone.blocks.0.conv.signs"]
    assert (bits.dtype, bits.numel()) == (torch.uint8, -(-latent.size // 8))
    assert np.array_equal(np.unpackbits(bits.numpy())[: latent.size], (latent >= 0).flatten())
    np.testing.assert_allclose(
        stored["backbone.blocks.0.conv.scale"].flatten(), np.abs(latent).mean((1, 2, 3)), rtol=1e-6
    )
    assert torch.equal(stored["head.fc.weight"], weights["head.fc.weight"])
    binary = {name for name in weights if ".conv.weight" in name and "stem" not in name}
    binary = {name for name in binary if "shortcut" not in name}
    assert not binary & stored.keys()
    (line,) = capsys.readouterr().out.splitlines()
    full = sum(value.numel() * value.element_size() for value in weights.values())
    assert f"{output.stat().st_size:,} bytes, in float32 {full:,}" in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch_1.pth", "out.safetensors"]


@pytest.mark.parametrize("kind", ["ReActNet", "ReActNetA"])
def test_students_are_packed_and_pass_through_torch_export(kind):
    """For any batch, and in torch's core operators, which ONNX and others start from."""
    torch.manual_seed(0)
    student = build_student(description(type=kind))
    student.train()(torch.randn(8, 1, 16, 16))
    images, packed = torch.randn(3, 1, 16, 16), pack(student.eval())
    assert torch.equal(packed(images), student(images))
    assert not any(isinstance(module, PackedConv2d) for module in student.modules())
    for model in (student, packed):
        program = torch.export.export(
            model, (images[:2],), dynamic_shapes={"inputs": {0: torch.export.Dim("batch")}}
        )
        assert torch.equal(program.module()(images), model(images))
        for node in program.run_decompositions().graph.nodes:
            overload = node.target if isinstance(node.target, torch._ops.OpOverload) else None
            assert overload is None or torch.Tag.core in overload.tags or "assert" in str(overload), overload


def test_a_folder_to_take_away_has_the_packed_weights_and_the_configuration(checkpoint, tmp_path):
    path, model = checkpoint(description())
    packed, images = export.export_run(path, tmp_path, list("abcd"))
    with torch.no_grad():
        assert torch.equal(packed(images), model(images, mode="tensor"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == description() | {"label_names": list("abcd")}
    assert build_student({k: v for k, v in config.items() if k != "label_names"})


@pytest.mark.parametrize("kind", ["ReActNet", "ReActNetA"])
def test_a_fast_student_as_onnx_is_of_plain_operators_and_equal(kind, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    values = description(type=kind)
    save_packed(pack(build_student(values)), values, tmp_path / "student.safetensors")
    model = load_packed(tmp_path / "student.safetensors")
    batch = {"inputs": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.zeros(2, 1, 16, 16),), dynamic_shapes=batch)
    torch.onnx.export(program, f=tmp_path / "student.onnx", verbose=False)
    written = onnx.load(tmp_path / "student.onnx")
    assert {node.domain for node in written.graph.node} == {""}
    assert not written.functions
    session = runtime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = torch.randn(count, 1, 16, 16)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.inference_mode():
            expected = model(images, mode="tensor").numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_export_errors_are_one_line(checkpoint, tmp_path, capsys):
    output = tmp_path / "out.safetensors"

    def refused(*arguments):
        assert export.main([str(each) for each in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mmcls_bnn: error: ")
        assert not output.exists()
        return line

    path, _ = checkpoint(description())
    assert "nosuch.pth does not exist" in refused("nosuch.pth", output)
    assert "must end in .safetensors" in refused(path, tmp_path / "out.pth")
    assert "cannot write" in refused(path, path / "out.safetensors")
    first, _ = checkpoint(description(binarize=("activations",)), ("activations",), "step1.pth")
    assert "no binary weights" in refused(first, output)
    torch.save({"state_dict": torch.load(path, weights_only=True)["state_dict"]}, tmp_path / "bare.pth")
    assert "add --config RECIPE" in refused(tmp_path / "bare.pth", output)
    assert "config nosuch.py does not exist" in refused(
        tmp_path / "bare.pth", output, "--config", "nosuch.py"
    )
    torch.save({"model": [1, 2, 3]}, tmp_path / "none.pth")
    assert "contains no weights by name; save model.state_dict()" in refused(tmp_path / "none.pth", output)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"model = {description(width=0.25)!r}".replace("'in_channels': 64", "'in_channels': 128")
    )
    assert "does not fit its config" in refused(tmp_path / "bare.pth", output, "--config", recipe)
    recipe.write_text(f"model = {description(depth=34)!r}")
    line = refused(tmp_path / "bare.pth", output, "--config", recipe)
    assert line.endswith("; give the recipe that it was trained with.")
    recipe.write_text(f"model = {description()!r}")
    assert export.main([str(tmp_path / "bare.pth"), str(output), "--config", str(recipe)]) == 0


def test_only_files_of_ours_are_loaded(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"damaged")
    for name, words in (("a", "not written by"), ("b", "cannot be read"), ("c", "cannot be read")):
        with pytest.raises(LskdError, match=words):
            load_packed(tmp_path / f"{name}.safetensors")


def test_a_file_that_is_not_whole_or_another_networks_is_one_line(tmp_path):
    path = tmp_path / "student.safetensors"
    packed = pack(build_student(description()))
    save_packed(packed, description(), path)
    whole, tensors = path.read_bytes(), load_file(path)

    def refused(words, changed=None, format=FORMAT, model=None):
        if changed is not None:
            save_file(changed, path, {"format": format, "model": json.dumps(model or description())})
        with pytest.raises(LskdError, match=words) as found:
            load_packed(path)
        assert "\n" not in str(found.value)

    path.write_bytes(whole[:-100])
    refused("cannot be read as safetensors")
    refused(
        "has the format 'mmcls_bnn packed 2', not 'mmcls_bnn packed 1'; export", tensors, "mmcls_bnn packed 2"
    )
    signs = "backbone.blocks.3.conv.signs"
    refused(f"its '{signs}' is not", {**tensors, signs: tensors[signs][:-1]})
    refused(f"its '{signs}' is not", {name: value for name, value in tensors.items() if name != signs})
    refused("'more' is not", {**tensors, "more": torch.zeros(1)})
    # 10 TB in float32, of which nothing may be asked for.
    refused("damaged: its 'backbone", tensors, model=description(width=1000))


def test_deployable_drops_what_training_needs():
    model = {"type": "LsKdClassifier", "backbone": {}, "teacher": {}, "distillation": {}}
    student = {"type": "ImageClassifier", "backbone": {}, "data_preprocessor": {"mean": [1]}}
    assert deployable(Config({"model": model, "data_preprocessor": {"mean": [1]}})) == student


def convolutions(channels, size, count, kernel=3):
    return count * channels * channels * kernel * kernel * size * size


def imagenet_student(kind, channels, **backbone):
    values = description(**{"type": kind, "width": 1, "stem": "imagenet", "in_channels": 3, **backbone})
    values["head"] = {"type": "LinearClsHead", "num_classes": 1000, "in_channels": channels}
    return build_student(values)


def test_reactnet18_at_224_as_counted_by_hand():
    found = complexity.count(imagenet_student("ReActNet", 512), 3, 224)
    plan = ((64, 56), (128, 28), (256, 14), (512, 7))
    # Four 3 x 3 convolutions in a stage; the first of a later stage reads half as many channels.
    bops = sum(convolutions(c, s, 4 if c == 64 else 3.5) for c, s in plan)
    shortcuts = sum(c * c // 2 * s * s for c, s in plan[1:])
    assert found.bops == bops == 1_676_279_808
    assert found.flops == 3 * 64 * 49 * 112**2 + shortcuts + 512 * 1000 == 137_793_536
    weights = sum(convolutions(c, 1, 4 if c == 64 else 3.5) for c, _ in plan)
    assert found.binary_parameters == weights == 10_985_472
    # Stem, shortcuts, classifier with bias; two numbers a channel for each BatchNorm (stem, blocks,
    # shortcuts); one for each RSign, which sees the block's input; three for each RPReLU.
    real = 3 * 64 * 49 + sum(c * c // 2 for c, _ in plan[1:]) + 512_000 + 1000
    real += 2 * (64 + 4 * (64 + 128 + 256 + 512) + 128 + 256 + 512)
    real += 4 * 64 + sum(c // 2 + 3 * c for c, _ in plan[1:]) + 3 * 4 * (64 + 128 + 256 + 512)
    assert found.real_parameters == real


def test_reactnet_a_at_224_as_counted_by_hand():
    found = complexity.count(imagenet_student("ReActNetA", 1024), 3, 224)
    widths = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    sizes = [112, 56, 56, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7]  # after each block's first convolution
    bops = 0
    for i, size in enumerate(sizes):
        bops += widths[i] ** 2 * 9 * size**2 + widths[i] * widths[i + 1] * size**2
    assert found.bops == bops == 4_816_896_000
    assert found.flops == 3 * 32 * 9 * 112**2 + 1024 * 1000
    assert found.ops == pytest.approx(0.87e8, rel=0.01)  # what ReActNet's paper reports


def test_step_1_has_no_binary_operations():
    step1 = imagenet_student("ReActNet", 512, binarize=("activations",))
    found = complexity.count(step1, 3, 64)
    assert (found.bops, found.binary_parameters) == (0, 0)


def test_a_profile_has_a_row_for_each_layer_that_runs(tmp_path, capsys):
    path = tmp_path / "student.safetensors"
    for kind, units in (("ReActNet", 1), ("ReActNetA", 2)):
        values = description(type=kind)
        save_packed(pack(build_student(values)), values, path)
        assert profile.main([str(path), "--size", "16", "--batch", "2", "--rounds", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("2 x 16 x 16, ")
        names = [line.split()[0] for line in lines[3:-2]]
        blocks = {"ReActNet": 16, "ReActNetA": 13}[kind]
        assert sum(".units." in name for name in names) == units * blocks
        first = next(line.split() for line in lines if "blocks.0.units.0" in line)
        channels = {"ReActNet": 8, "ReActNetA": 4}[kind]
        assert int(first[3].replace(",", "")) == 2 * convolutions(channels, 16, 1)
        shares = [float(line[50:58].strip(" %")) for line in lines[3:-1]]
        assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    beyond = 1 << 64
    for arguments, words in (
        (["--size", "0"], "--size is 0"),
        *((["--" + name, str(beyond)], f"--{name} is {beyond}") for name in ("size", "batch", "rounds")),
        (["--size", "2147483647"], "cannot process images of"),
        (["--build", "mmx"], "no build 'mmx'"),
    ):
        assert profile.main([str(path), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_complexity_command(capsys):
    assert complexity.main(["nosuch.py"]) == 2
    assert capsys.readouterr().err == (
        "mmcls_bnn: error: config nosuch.py does not exist; give the path of a recipe.\n"
    )


@pytest.mark.parametrize(
    ("where", "kind"),
    [("type", "subprocess.getoutput"), ("head", "shutil.rmtree"), ("backbone", "mmcls.TimmClassifier")],
)
def test_a_forged_description_calls_nothing(tmp_path, capsys, where, kind):
    """mmengine would import and call what is not registered; in a packed file and in a checkpoint."""
    forged = {"type": kind, "cmd": f"touch {tmp_path / 'called'}"}
    values = forged if where == "type" else {**description(), where: {"loss": [forged], **forged}}
    metadata = {"format": FORMAT, "model": json.dumps(values)}
    save_file({"weight": torch.zeros(1)}, tmp_path / "forged.safetensors", metadata)
    with pytest.raises(LskdError, match=f"'{kind}' is no registered layer or loss"):
        load_packed(tmp_path / "forged.safetensors")
    note = {"model": json.dumps(values)}
    torch.save({"state_dict": {"w": torch.zeros(1)}, "meta": {"mmcls_bnn": note}}, tmp_path / "f.pth")
    assert export.main([str(tmp_path / "f.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert "is no registered" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.pth", "forged.safetensors"]


def test_what_a_description_may_name_beside_layers():
    """Augmentations of the preprocessor, initial values, and names with their scope."""
    values = description()
    values["neck"]["type"] = "mmcls.GlobalAveragePooling"
    values["backbone"]["init_cfg"] = {"type": "Kaiming", "layer": "Conv2d"}
    mixed = {"augments": {"type": "Mixup", "alpha": 0.8}}
    values["data_preprocessor"] = {"type": "ClsDataPreprocessor", "batch_augments": mixed}
    assert build_student(values).neck is not None


@pytest.mark.parametrize("model", [None, "[" * 100_000, "{", '{"type": 1e999}', "[]"])
def test_a_file_with_a_forged_description_is_one_line(tmp_path, model):
    metadata = {"format": FORMAT} | ({} if model is None else {"model": model})
    save_file({"weight": torch.zeros(1)}, tmp_path / "forged.safetensors", metadata)
    with pytest.raises(LskdError) as found:
        load_packed(tmp_path / "forged.safetensors")
    assert "\n" not in str(found.value)
