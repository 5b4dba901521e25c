"""Binary layers by xor and popcount, on each kind of processor: integers to the bit, and networks."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from lskd import LskdError
from lskd.kernel.native import why_not_compiled
from mmcls_bnn import export, profile
from mmcls_bnn.binary import bits
from mmcls_bnn.binary.fast import FastBlock, FastConv2d, make_fast
from mmcls_bnn.binary.layers import RSign, binary_layers
from mmcls_bnn.binary.packed import build_student, load_packed, pack, save_packed
from mmcls_bnn.complexity import count
from mmcls_bnn.profile import deployed

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
SANITIZED = os.environ.get("ASAN_OPTIONS")  # this file runs itself once more, see below


@pytest.fixture(scope="module")
def library(tmp_path_factory, compile_source):
    """The library as the build compiles it, whatever the installation contains."""
    path = tmp_path_factory.mktemp("compiled") / "xnor.so"
    with pytest.MonkeyPatch.context() as patch:
        if SANITIZED:
            patch.setenv("CC", "cc -g -fsanitize=address,undefined -fno-sanitize-recover=undefined")
        assert not compile_source(ROOT / "plugins" / "mmcls_bnn" / "binary" / "xnor.c", path)
    return bits.load(path)


@pytest.fixture(autouse=True)
def use_compiled(monkeypatch, library):
    monkeypatch.setattr(bits, "library", lambda: library)
    monkeypatch.setattr(bits, "_SMALLEST_SHARE", 1)  # so that small layers have threads, too


@pytest.fixture(params=bits.BUILDS)
def build(request):
    if request.param not in bits.builds():
        pytest.skip(f"this processor cannot run {request.param}")
    with bits.forced(request.param):
        yield request.param


def integers(x, threshold, weight, stride, padding):
    """The definition, tap by tap, in int64: signs are -1 and +1, and 0 outside the image."""
    signs = np.where(x + threshold[:, None, None] >= 0, 1, -1)
    signs = np.pad(signs, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    size = weight.shape[2]
    rows, columns = ((side - size) // stride + 1 for side in signs.shape[2:])
    result = np.zeros((len(x), len(weight), rows, columns), np.int64)
    for ky in range(size):
        for kx in range(size):
            seen = signs[:, :, ky : ky + stride * rows : stride, kx : kx + stride * columns : stride]
            result += np.einsum(
                "bihw,oi->bohw", seen[:, :, :rows, :columns], np.where(weight[..., ky, kx] >= 0, 1, -1)
            )
    return result


sizes = st.integers(1, 12)


@settings(max_examples=5 if SANITIZED else 40, deadline=None)
@given(
    channels=st.integers(1, 70),
    out=st.integers(1, 70),
    height=sizes,
    width=sizes,
    batch=st.integers(1, 3),
    kernel=st.sampled_from([(1, 0), (3, 1), (5, 2), (3, 0)]),
    stride=st.sampled_from([1, 2]),
    threads=st.integers(1, 3),
    last=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(64, 64, 56, 56, 1, (3, 1), 1, 2, True, 0)  # several bands of rows
@example(300, 40, 3, 2, 1, (5, 2), 2, 1, False, 1)  # more words than a byte can count
@example(32, 33, 1, 1, 2, (3, 1), 1, 1, True, 2)  # all taps but one outside the image
def test_integers_of_the_definition(channels, out, height, width, batch, kernel, stride, threads, last, seed):
    generator = np.random.default_rng(seed)
    size, padding = kernel
    if min(height, width) + 2 * padding < size:
        return
    x = generator.standard_normal((batch, channels, height, width)).astype(np.float32)
    threshold = generator.standard_normal(channels).astype(np.float32)
    some = generator.integers(0, 5, x.shape)
    x = np.where(some == 0, -threshold[:, None, None], np.where(some == 1, np.float32(-0.0), x))  # sums of 0
    weight = generator.standard_normal((out, channels, size, size))
    expected = integers(x, threshold, weight, stride, padding)
    images = torch.from_numpy(x)
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in bits.builds():
            with bits.forced(name):
                weights = bits.weights_of(weight >= 0)
                found = bits.convolve(
                    images, torch.from_numpy(threshold), weights, torch.ones(out), stride, padding
                )
            assert np.array_equal(found.numpy(), expected), name
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinity_have_the_sign_that_torch_gives_them(build):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, -1e-45] * 11).view(1, 66, 1, 1)
    weights = bits.weights_of(np.eye(66, dtype=bool)[:, :, None, None])
    found = bits.convolve(x, torch.zeros(66), weights, torch.ones(66), 1, 0)
    signs = torch.where(x >= 0, 1.0, -1.0)
    expected = functional.conv2d(signs, torch.eye(66)[:, :, None, None] * 2 - 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("out", "repeated"), [(64, 64), (80, 40), (24, 8), (64, 32)])
def test_what_follows_rounds_as_torch_does(build, out, repeated):
    x, threshold, scale = torch.randn(2, 40, 9, 7), torch.randn(40), torch.rand(out) / 7
    following = bits.Following(*torch.randn(3, out))
    residual = torch.randn(2, repeated, 5, 4)
    weight = torch.randn(out, 40, 3, 3)
    weights = bits.weights_of((weight >= 0).numpy())
    found = bits.convolve(x, threshold, weights, scale, 2, 1, following, residual)
    signs = torch.where(x + threshold[:, None, None] >= 0, 1.0, -1.0)
    counted = functional.conv2d(signs, torch.where(weight >= 0, 1.0, -1.0), stride=2, padding=1)
    shift, slope, after = (each[:, None, None] for each in following)
    total = counted * scale[:, None, None] + shift + torch.cat([residual] * (out // repeated), 1)
    assert torch.equal(found, torch.where(total > 0, total, total * slope) + after)


def network(kind, **backbone):
    channels = {"ReActNet": 512, "ReActNetA": 1024}[kind] // 8
    torch.manual_seed(0)
    student = build_student(
        {
            "type": "ImageClassifier",
            "backbone": {"type": kind, "width": 0.125, **backbone},
            "neck": {"type": "GlobalAveragePooling"},
            "head": {"type": "LinearClsHead", "num_classes": 10, "in_channels": channels},
            "data_preprocessor": {"type": "ClsDataPreprocessor"},
        }
    )
    with torch.no_grad():
        for parameter in student.parameters():  # thresholds and slopes that are not the first ones
            parameter.add_(0.1 * torch.randn_like(parameter))
        student.train()(torch.randn(16, 3, 64, 64), mode="tensor")
    return student.eval()


def far_from_every_threshold(student, shape):
    """Images none of whose activations lies so near to its threshold that rounding could turn its sign."""
    nearest = []
    for module in student.modules():
        if isinstance(module, RSign):
            module.register_forward_hook(lambda m, x, y: nearest.append(float((x[0] + m.bias).abs().min())))
    for _ in range(100):
        images = torch.randn(shape)
        nearest.clear()
        student(images, mode="tensor")
        if min(nearest) > 1e-5:
            return images
    raise AssertionError("no such images")


@pytest.mark.parametrize("kind", ["ReActNet", "ReActNetA"])
@pytest.mark.parametrize(("stem", "shape"), [("imagenet", (1, 3, 35, 47)), ("cifar", (2, 3, 16, 9))])
def test_a_network_gives_the_logits_of_its_student(kind, stem, shape):
    """Within the real layers' rounding, and to the bit the same on each build and by torch's operations."""
    student = network(kind, stem=stem)
    fast = make_fast(pack(student))
    assert all(isinstance(block, FastBlock) for block in fast.backbone.blocks)
    with torch.inference_mode():
        images = far_from_every_threshold(student, shape)
        logits = student(images, mode="tensor")
        with bits.forced(None):
            by_torch = fast(images, mode="tensor")
        torch.testing.assert_close(by_torch, logits, rtol=0, atol=1e-5)
        for name in bits.builds():
            with bits.forced(name):
                assert torch.equal(fast(images, mode="tensor"), by_torch), name
        with bits.forced(None):
            half = fast.bfloat16()(images.bfloat16(), mode="tensor")  # what compiled code does not take
    assert half.isfinite().all()


@pytest.mark.parametrize(
    "backbone",
    [
        {"type": "ResNet", "depth": 18, "stem_channels": 16, "base_channels": 16},
        {"type": "MobileNetV2", "widen_factor": 0.25, "act_cfg": {"type": "RPReLU"}},
    ],
)
def test_any_backbone_is_binarised_by_conv_cfg(backbone, tmp_path, capsys):
    torch.manual_seed(0)
    description = {
        "type": "ImageClassifier",
        "backbone": {**backbone, "conv_cfg": {"type": "BinaryConv2d"}},
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 4, "in_channels": 128},
        "data_preprocessor": {"type": "ClsDataPreprocessor"},
    }
    if backbone["type"] == "MobileNetV2":
        description["head"]["in_channels"] = 1280
    student = build_student(description)
    if backbone["type"] == "ResNet":  # two convolutions in each of eight blocks, and three shortcuts
        assert len(binary_layers(student)) == 19
    assert type(student.backbone.conv1) is nn.Conv2d or type(student.backbone.conv1.conv) is nn.Conv2d
    student.train()(torch.randn(4, 3, 64, 64), mode="tensor")[0].sum().backward()
    if backbone["type"] == "MobileNetV2":
        assert all(p.grad is not None for p in student.parameters() if p.shape == (1, 1, 1, 1))
    meta = {"mmcls_bnn": {"model": json.dumps(description)}}
    torch.save({"state_dict": student.eval().state_dict(), "meta": meta}, tmp_path / "student.pth")
    assert export.main([str(tmp_path / "student.pth"), str(tmp_path / "student.safetensors")]) == 0
    fast = load_packed(tmp_path / "student.safetensors")
    assert sum(isinstance(m, FastConv2d) for m in fast.modules()) == len(binary_layers(student))
    images = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        logits = student(images, mode="tensor")
        assert torch.equal(
            load_packed(tmp_path / "student.safetensors", fast=False)(images, mode="tensor"), logits
        )
        for module in fast.modules():  # each of them alone: a sign near its threshold may turn in the whole
            if isinstance(module, FastConv2d):
                x = torch.randn(2, module.packed.shape[1], 9, 8)
                torch.testing.assert_close(module(x), module.packed(x), rtol=1e-5, atol=1e-5)
        assert fast(images, mode="tensor").shape == logits.shape
    capsys.readouterr()
    assert profile.main([str(tmp_path / "student.safetensors"), "--size", "64", "--rounds", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:-2]]
    products = {row[0]: int(row[3].replace(",", "")) for row in rows if len(row) == 5}
    assert products.keys() == binary_layers(student).keys()
    assert sum(products.values()) == count(student, 3, 64).bops
    assert profile.main([str(tmp_path / "student.safetensors"), "--size", "10000000"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_deployed_student_is_as_large_as_its_file(tmp_path):
    student = network("ReActNet")
    save_packed(pack(student), {}, tmp_path / "student.safetensors")
    stored = load_file(tmp_path / "student.safetensors").values()
    size, milliseconds = deployed(student, (1, 3, 32, 32))
    assert size == sum(value.numel() * value.element_size() for value in stored)
    assert milliseconds > 0
    real = network("ReActNet", binarize=())
    assert deployed(real, (1, 3, 32, 32))[0] == sum(value.nbytes for value in real.state_dict().values())


def test_real_activations_stay_with_torch_and_gradients_flow_to_images():
    student = network("ReActNet", binarize=("weights",))
    images = torch.randn(2, 3, 32, 32)
    fast = make_fast(pack(student))
    assert not any(isinstance(block, FastBlock) for block in fast.backbone.blocks)
    torch.testing.assert_close(
        fast(images, mode="tensor"), student(images, mode="tensor"), rtol=1e-5, atol=1e-5
    )
    images.requires_grad_()
    make_fast(pack(network("ReActNetA")))(images, mode="tensor").sum().backward()
    assert images.grad.abs().sum() > 0


def test_sizes_that_do_not_fit_are_refused_before_any_memory_is_touched(build):
    weights = bits.weights_of(np.ones((32, 32, 3, 3), bool))
    rest = torch.zeros(32), weights, torch.ones(32), 1
    with pytest.raises(ValueError, match="33 channels"):
        bits.convolve(torch.zeros(1, 33, 8, 8), *rest, 1)
    with pytest.raises(RuntimeError, match="smaller than the kernel"):
        bits.convolve(torch.zeros(1, 32, 2, 8), *rest, 0)
    with pytest.raises(RuntimeError, match="too large"):
        bits.convolve(torch.zeros(1, 32, 8, 8), *rest, 1 << 15)
    with pytest.raises(ValueError, match="does not fit 32 and 32 channels"):
        bits.convolve(torch.zeros(1, 32, 8, 8), torch.zeros(31), *rest[1:], 1)
    following = bits.Following(*torch.zeros(3, 32))
    with pytest.raises(ValueError, match="does not fit"):
        bits.convolve(torch.zeros(1, 32, 8, 8), *rest, 1, following, torch.zeros(1, 32, 8, 7))


def test_a_processor_without_the_instructions_takes_the_plain_build(monkeypatch):
    plain = type("Library", (), {"lskd_xnor_builds": staticmethod(lambda: 1)})
    monkeypatch.setattr(bits, "library", lambda: plain)
    assert bits.build() == "plain"
    with pytest.raises(LskdError, match=r"there is no build 'avx2' here; this processor can run plain\."):
        bits.forced("avx2").__enter__()


WITHOUT = """
import torch
from mmcls_bnn.binary import bits
bits.load = lambda path: None
print(bits.build(), bits.takes(torch.zeros(1)), bits.builds())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one build alone")
@pytest.mark.parametrize("compiler", ["cc -DLSKD_ONE_TARGET", "clang"])
def test_other_compilers_have_what_they_can_build(compiler, compile_source, tmp_path, monkeypatch):
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip("no clang")
    monkeypatch.setenv("CC", compiler)
    assert not compile_source(ROOT / "plugins" / "mmcls_bnn" / "binary" / "xnor.c", tmp_path / "xnor.so")
    built = bits.load(tmp_path / "xnor.so").lskd_xnor_builds()
    assert built == (len(bits.builds()) if compiler == "clang" else 1)


def test_without_a_compiler_torch_computes_and_it_is_said_once(tmp_path, compile_source, monkeypatch):
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout == "None False ()\n"
    assert done.stderr.count("binary layers run by torch, several times slower: ") == 1
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF")
    assert bits.load(other) is None
    assert why_not_compiled(other) == "it was compiled for another kind of machine"
    source = ROOT / "plugins" / "mmcls_bnn" / "binary" / "xnor.c"
    for compiler, words in (
        ("/no/cc", r"there was no C compiler \(/no/cc\)"),
        ("false", r"the C compiler \(false\) failed: status 1"),
    ):
        monkeypatch.setenv("CC", compiler)
        other.with_suffix(".txt").write_text(compile_source(source, other))
        assert re.fullmatch(words, why_not_compiled(other))


@pytest.mark.skipif(bool(SANITIZED), reason="this is the run with the sanitizers")
def test_no_build_reads_or_writes_beside_its_memory():
    """The tests above once more, under the address and undefined behaviour sanitizers."""
    asan = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(asan.stdout.strip())
    if not path.is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    # torch's allocator is not what is tested; gcc's runtime comes first, and needs C++'s for its exceptions.
    environment = os.environ | {
        "LD_PRELOAD": f"{path} {path.with_name('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__]
    command += ["-k", "integers or follows or infinity or refused"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
