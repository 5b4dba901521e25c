"""Every mistake: one line on stderr that names it, status 2, no run folder."""

import argparse
import importlib.util
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from lskd import CheckpointError, LskdError, load_teacher_weights
from timm_ls_kd import loader, upstream
from timm_ls_kd.trainer import main as trainer

pytestmark = pytest.mark.integration


PLAIN = [
    ("--model resnet5O", ["resnet5O", "did you mean", "resnet50"]),
    ("--model resnet50.nosuch", ["resnet50.nosuch", "a1_in1k"]),
    ("--smoothing 1", ["--smoothing", "[0, 1)", "1.0"]),
    ("--smoothing -0.1", ["--smoothing", "-0.1"]),
    ("--smoothing nan", ["--smoothing", "nan"]),
    ("--batch-size 0", ["--batch-size", "at least 1"]),
    (f"--img-size {1 << 64}", ["--img-size", "at most 2147483647"]),
    (f"--seed {10**400}", ["--seed", "at most 4294967295"]),
    ("--batch-size 15 --mixup 0.5", ["--batch-size", "even"]),
    ("--batch-size 1000", ["96 training images", "lower --batch-size"]),
    ("--lr fast", ["--lr", "fast"]),
    ("--opt sgdd", ["optimiser 'sgdd'"]),
    ("--sched plateau", ["--sched", "cosine"]),
    ("--sched wsd --decay-epochs 400", ["--sched wsd cannot be created", "0 < decay_epochs"]),
    ("--lr-decay-fn linear", ["--lr-decay-fn belongs to --sched wsd and rsqrt, not cosine"]),
    ("--resume auto --experiment=", ["--resume auto", "--experiment NAME"]),
    ("--loss poly", ["--loss", "'poly'", "'bce'"]),
    ("--task multilabel", ["--task", "upstream train.py only"]),
    ("--loss ce --bce-loss", ["--bce-loss is --loss bce", "--loss ce"]),
    ("--epochs 3 --cooldown-epochs 1 --stop-epoch 5", ["--stop-epoch 5 is beyond the run's 4 epochs"]),
    ("--epochs 3 --save-epochs 4 1", ["--save-epochs 4 is beyond the run's 3 epochs"]),
    ("--stop-epoch 0", ["--stop-epoch", "at least 1"]),
    ("--save-epochs 1 0", ["--save-epochs", "at least 1"]),
    ("--device cuda:77", ["--device", "cpu"]),
    ("--device nonsense", ["--device nonsense"]),
    ("--torchcompile nosuch", ["--torchcompile nosuch"]),
    ("--smooting 0.1", ["unknown flag --smooting", "did you mean --smoothing"]),
    ("--naflex-loader", ["--naflex-loader", "upstream train.py only", "/path/to/train.py"]),
    ("--wandb-resume-id abc", ["--wandb-resume-id", "--resume"]),
    ("--num-classes 5", ["4 classes", "5", "--num-classes 4"]),
    ("--mean 0.5 0.5", ["--mean", "2 values for 3 channels"]),
    ("--in-chans 4", ["1 or 3 channels"]),
    ("--initial-checkpoint nosuch.pth", ["--initial-checkpoint nosuch.pth", "no such file"]),
    ("--resume nosuch.pth", ["--resume nosuch.pth", "no such file"]),
    ("--config nosuch.yaml", ["nosuch.yaml cannot be read as a config file"]),
    ("--model-kwargs depth", ["key=value", "depth"]),
    ("--model-kwargs nosuch=3", ["model 'test_resnet' cannot be created", "nosuch"]),
    ("--model test_vit --img-size 30", ["30"]),
    ("--kd-temperature-squared", ["--kd-temperature-squared needs --kd-teacher"]),
    ("--kd-teacher-checkpoint x.pth", ["needs --kd-teacher"]),
    ("--kd-temperature 1", ["--kd-temperature needs --kd-teacher"]),
    ("--kd-preflight-samples 9", ["--kd-preflight-samples needs --kd-teacher"]),
    ("extra", ["extra"]),
    ("--conf nosuch.yaml", ["unknown flag --conf", "--config"]),
    ("--aa garbage", ["--aa garbage", "training transform"]),
    ("--interpolation foo", ["--interpolation", "foo", "bicubic"]),
    ("--train-interpolation foo", ["--train-interpolation", "foo", "random"]),
    ("--train-crop-mode foo", ["--train-crop-mode", "foo", "rrc"]),
    ("--torchcompile eager --torchcompile-mode foo", ["--torchcompile-mode", "foo", "max-autotune"]),
    ("--scale -1 0.5", ["--scale", "greater than 0", "got -1"]),
    ("--scale 0.5 0.2", ["--scale", "lower and an upper"]),
    ("--ratio 0 0", ["--ratio", "greater than 0"]),
    ("--ratio 1", ["--ratio", "lower and an upper"]),
    ("--decay-epochs 0 --sched step", ["--decay-epochs", "greater than 0"]),
    ("--start-epoch -5", ["--start-epoch", "-5"]),
    ("--lr nan", ["--lr", "finite", "nan"]),
    ("--std 0", ["--std", "greater than 0"]),
    ("--hflip 2", ["--hflip", "[0, 1]"]),
    ("--lr-base-size 0", ["--lr-base-size", "at least 1"]),
    ("--model torchvision:resnet18", ["torchvision:resnet18", "timm's own is called resnet18"]),
    ("--model nosuch:x", ["unknown model 'nosuch:x'"]),
    ("--input-size 3 0 32", ["--input-size", "greater than 0"]),
    ("--train-only head", ["--train-only head: model 'test_resnet' has no such module"]),
    ("--train-only layer4.0.bn22", ["did you mean layer4.0.bn2?"]),
    ("--train-only fc --train-statistics bn9", ["--train-statistics bn9: model"]),
    ("--train-statistics bn1", ["--train-statistics needs --train-only MODULE"]),
    ("--kd-teacher-fast auto", ["--kd-teacher-fast needs --kd-teacher MODEL"]),
    ("--output /proc/nothing", ["/proc", "--output"]),
]
DISTILLING = [
    ("--kd-temperature 0", ["--kd-temperature", "greater than 0"]),
    ("--kd-temperature -2", ["--kd-temperature"]),
    ("--kd-temperature inf", ["--kd-temperature"]),
    ("--kd-hard-weight 1.5", ["--kd-hard-weight", "[0, 1]", "1.5"]),
    ("--kd-hard-weight -0.1", ["--kd-hard-weight"]),
    ("--kd-hard-weight nan", ["--kd-hard-weight"]),
    ("--kd-teacher-dtype float8", ["--kd-teacher-dtype", "float8"]),
    ("--kd-teacher-img-size 0", ["--kd-teacher-img-size"]),
    ("--kd-preflight-samples -1", ["--kd-preflight-samples"]),
    ("--bce-loss", ["--bce-loss", "--kd-teacher"]),
    ("--loss bce", ["--loss bce changes", "--kd-teacher"]),
    ("--kd-model-name resnet50", ["--kd-model-name", "upstream"]),
    ("--kd-teacher nosuch_model", ["unknown teacher 'nosuch_model'"]),
    ("--kd-teacher torchvision:resnet18", ["unknown teacher 'torchvision:resnet18'"]),
    ("--kd-teacher-checkpoint nosuch.pth", ["--kd-teacher-checkpoint nosuch.pth", "no such file"]),
    ("--kd-teacher resnet10t", ["another architecture", "name the model it was saved from"]),
    ("--kd-teacher-kwargs in_chans=1", ["in_chans"]),
    ("--in-chans 1", ["3 input channels", "the student 1"]),
    ("--kd-teacher-fast bfloat16 --kd-teacher-fast-bound 1e-30", ["too far", "1e-30"]),
    ("--kd-teacher-fast float32 --kd-teacher-fast-bound 0", ["--kd-teacher-fast-bound"]),
    ("--kd-teacher-fast float32 --kd-teacher-dtype bfloat16", ["drop --kd-teacher-dtype"]),
    ("--kd-teacher-fast float32 --kd-preflight-samples 0", ["--kd-preflight-samples"]),
    ("--kd-teacher-compile", ["add --kd-teacher-fast"]),
    ("--kd-soft-labels x --kd-teacher-fast bfloat16 --kd-teacher-fast-bound 1e-30", ["1e-30"]),
    ("--kd-soft-labels x --mixup-mode pair", ["--mixup-mode pair"]),
    ("--kd-soft-labels x --kd-soft-labels-top-k -1", ["--kd-soft-labels-top-k"]),
    ("--kd-soft-labels x --kd-soft-labels-top-k 5", ["top-K must be 1 to 4"]),
    ("--kd-soft-labels-verify 3", ["needs --kd-soft-labels"]),
    ("--kd-soft-labels-together 2", ["needs --kd-soft-labels"]),
    ("--kd-rest renormalise", ["needs --kd-soft-labels"]),
]


@pytest.mark.parametrize(
    ("distils", "arguments", "words"),
    [*((False, *case) for case in PLAIN), *((True, *case) for case in DISTILLING)],
)
def test_arguments(train, tmp_path, kd, monkeypatch, distils, arguments, words):
    monkeypatch.chdir(tmp_path)
    train("bad", *(kd if distils else ()), *arguments.split()).assert_one_clear_line(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_tracker_that_is_not_installed(train, tmp_path, name, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else real(module))
    train("run", f"--log-{name}").assert_one_clear_line(f"pip install {name}")
    assert not (tmp_path / "runs").exists()


def test_pretrained_teacher_that_cannot_be_had(train, tmp_path):
    result = train("bad", "--kd-teacher", "test_resnet")
    result.assert_one_clear_line("1000 classes", "the student 4", "--kd-teacher-checkpoint")
    train("bad", "--kd-teacher", "resnetv2_18").assert_one_clear_line("--kd-teacher-checkpoint")
    assert not (tmp_path / "runs").exists()


def test_pretrained_teacher_offline():
    from timm_ls_kd.models import create

    with pytest.raises(LskdError, match=r"weights of teacher 'test_resnet.r160_in1k' cannot be had"):
        create("test_resnet.r160_in1k", "teacher", pretrained=True)


class _RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_teacher_from_a_folder_like_the_hubs(train, runs, tmp_path, teacher, summary):
    folder = tmp_path / "hub"
    model = timm.create_model("test_resnet", num_classes=4)
    model.load_state_dict(load_teacher_weights(teacher))
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}  # which it was trained on
    save_for_hf(model, folder)
    from_hub = ["--kd-teacher", f"local-dir:{folder}", "--epochs", 1]
    from_file = ["--kd-teacher", "test_resnet", "--kd-teacher-checkpoint", teacher, "--epochs", 1]
    assert train("hub", *from_hub).status == train("file", *from_file).status == 0
    assert summary(runs / "hub") == summary(runs / "file")

    for name, content in (
        ("pytorch_model.bin", pickle.dumps({"fc.weight": _RunsCode(tmp_path / "owned")}, protocol=2)),
        ("pytorch_model.bin", b"cut off"),
        ("config.json", b"{}"),
    ):
        (folder / name).write_bytes(content)
        train("bad", *from_hub).assert_one_clear_line(f"local-dir:{folder}", "--kd-teacher-checkpoint FILE")
    train("bad", "--kd-teacher", f"local-dir:{tmp_path}/no").assert_one_clear_line("Config file not found")
    assert not (tmp_path / "owned").exists()
    assert not (runs / "bad").exists()


@pytest.mark.parametrize("flag", ["--kd-teacher-checkpoint", "--initial-checkpoint", "--resume"])
def test_checkpoint_files(train, tmp_path, teacher, flag):
    kd = ["--kd-teacher", "test_resnet"] if flag.startswith("--kd") else []
    marker, archive = tmp_path / "owned", tmp_path / "archive"
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}, "x": _RunsCode(marker)}, archive)
    state = load_teacher_weights(teacher)
    other = {key: value for key, value in state.items() if not key.startswith("layer4")}
    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    classes = {"fc.weight": torch.zeros(7, state["fc.weight"].shape[1]), "fc.bias": torch.zeros(7)}
    for name, content, words in (
        ("malicious", pickle.dumps({"state_dict": _RunsCode(marker)}), []),
        ("archive", archive.read_bytes(), []),
        ("truncated", teacher.read_bytes()[: teacher.stat().st_size // 2], []),
        ("empty", b"", []),
        ("other", other, ["another architecture", "layer4"]),
        ("headless", headless, ["fc."]),
        ("classes", state | classes, ["7 classes", "this run has 4"]),
    ):
        path = tmp_path / f"{name}.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        train("bad", *kd, flag, path).assert_one_clear_line(path.name, *words)
    assert not marker.exists()
    assert not (tmp_path / "runs").exists()


def test_teacher_at_chance(train, tmp_path, kd, teacher):
    state = load_teacher_weights(teacher)
    state["fc.weight"] = torch.zeros_like(state["fc.weight"])  # says the same class for every image
    torch.save(state, tmp_path / "chance.pth")
    chance = [*kd[:3], str(tmp_path / "chance.pth")]
    result = train("bad", *chance)
    result.assert_one_clear_line("at chance", "25.0 %", "--kd-preflight-samples 0")
    assert not (tmp_path / "runs").exists()
    assert train("asked", *chance, "--kd-preflight-samples", 0, "--epochs", 1).status == 0


def test_data_folders(train, tmp_path, own_digits):
    def refused(*words, data=own_digits):
        train("bad", data=data).assert_one_clear_line(*words)

    refused("does not exist", data=tmp_path / "nosuch")
    (tmp_path / "hollow").mkdir()
    refused("is empty", data=tmp_path / "hollow")
    refused("no folder for the split 'train'", data=own_digits / "train")
    shutil.copytree(own_digits / "train", tmp_path / "half" / "train")
    refused("no folder for the split 'validation'", "--val-split", data=tmp_path / "half")

    hidden = own_digits / "train" / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(next((own_digits / "train" / "digit0").iterdir()), hidden)
    # timm would count it, and shift every label.
    assert train("hidden", "--epochs", 1, data=own_digits).status == 0
    shutil.rmtree(hidden)
    shutil.rmtree(tmp_path / "runs")

    (own_digits / "train" / "digit9").mkdir()
    refused("digit9", "no images")
    shutil.copy(next((own_digits / "train" / "digit0").iterdir()), own_digits / "train" / "digit9")
    refused("'digit9'", "not in 'validation'")
    shutil.rmtree(own_digits / "train" / "digit9")

    stray = own_digits / "val" / "stray.png"
    shutil.copy(next((own_digits / "val" / "digit0").iterdir()), stray)
    refused("stray.png", "outside any class folder")
    stray.unlink()

    image = sorted((own_digits / "val" / "digit2").iterdir())[3]
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    refused(str(image), "cannot be read")
    image.write_bytes(b"")
    refused(str(image), "cannot be read")
    image.write_bytes(content)
    assert not (tmp_path / "runs").exists()
    assert train("good", "--epochs", 1, data=own_digits).status == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_breaks_during_training(train, tmp_path, own_digits, monkeypatch, workers):
    """The check before training looks at a sample of large data sets; timm would take the next image."""
    from timm_ls_kd import data

    monkeypatch.setattr(data, "check_images", lambda paths: None)
    image = sorted((own_digits / "train" / "digit1").iterdir())[5]
    image.write_bytes(image.read_bytes()[:60])
    train("bad", "--workers", workers, data=own_digits).assert_one_clear_line(str(image), "cannot be read")
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(image)
    deep = train("bad", "--workers", workers, data=own_digits)
    deep.assert_one_clear_line(str(image), "more than 8 bits", "convert it to 8 bits")


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_vanishes_between_two_epochs(train, tmp_path, own_digits, monkeypatch, workers):
    image = sorted((own_digits / "train" / "digit1").iterdir())[5]
    train_one_epoch = trainer.train_one_epoch

    def remove_and_train(epoch, *rest, **named):
        if epoch == 1:
            image.unlink()
        return train_one_epoch(epoch, *rest, **named)

    monkeypatch.setattr(trainer, "train_one_epoch", remove_and_train)
    result = train("r", "--workers", workers, "--epochs", 2, data=own_digits)
    result.assert_one_clear_line(str(image), "cannot be read ([Errno 2] No such file or directory")
    assert (tmp_path / "runs" / "r" / "last.pth.tar").exists()


def test_a_loading_process_that_dies(train, monkeypatch):
    monkeypatch.setattr(loader, "generator_seeds", lambda seeds: os.kill(os.getpid(), signal.SIGKILL))
    result = train("r", "--workers", 1)
    result.assert_one_clear_line(
        "a process that loads data has died (DataLoader worker (pid", "memory was short"
    )


def test_output_folders(train, tmp_path):
    (tmp_path / "file").touch()
    train("bad", "--output", tmp_path / "file").assert_one_clear_line("is no folder", "--output")
    train("n" * 256).assert_one_clear_line("name too long", "--experiment")
    assert train("run", "--epochs", 1).status == 0
    before = (tmp_path / "runs" / "run" / "summary.csv").read_bytes()
    train("run", "--epochs", 1).assert_one_clear_line("contains a run already", "--resume")
    assert (tmp_path / "runs" / "run" / "summary.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: fast", ["c.yaml: lr must be a number, got 'fast'"]),
        ("lr: [0.1]", ["lr must be one value"]),
        ("lr: true", ["lr must be one value"]),
        ("epochs: 1.5", ["epochs must be a whole number"]),
        ("amp: 1", ["amp must be true or false"]),
        ("scale: 0.5", ["scale must be a list"]),
        ("sched: plateau", ["c.yaml", "--sched: invalid choice: 'plateau'"]),
        ("kd_hard_weight: 3", ["c.yaml: kd_hard_weight must lie in [0, 1], got 3"]),
        ("jsd_loss: true", ["jsd_loss", "upstream train.py only"]),
        ("- a list", ["must map"]),
        ("lr: [0.1", ["not valid YAML"]),
        ("amp: 0", ["amp must be true or false"]),
        ("scale: [null, 1]", ["scale must be a list, each one value, got [None, 1]"]),
        ("input_size: [3, 2]", ["input_size must be a list of 3, got [3, 2]"]),
        ("workers: .inf", ["workers must be a whole number"]),
        ("interpolation: foo", ["--interpolation: invalid choice: 'foo'"]),
        ("model_kwargs: " + "[" * 5000, ["nested too deeply"]),
    ],
)
def test_config_files(train, tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    train("bad", "--config", tmp_path / "c.yaml").assert_one_clear_line(*words)
    assert not (tmp_path / "runs").exists()


def test_commands(timm_command, kd):
    timm_command("soft-labels", *kd).assert_one_clear_line("--kd-soft-labels DIR")
    timm_command("validate.py").assert_one_clear_line("validate.py", "does not exist")
    timm_command("trian").assert_one_clear_line("unknown command 'trian'")
    assert timm_command().status == 2
    assert "train.py" in timm_command("--help").out
    assert timm_command("--help").status == 0


def test_message_of_another_process_names_its_rank(timm_command, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    timm_command("trian").assert_one_clear_line("[rank 3]")


@pytest.mark.parametrize(
    ("rate", "batch_size"),
    [
        ("1e20", "16"),  # seen in the training loss
        ("1e38", "96"),  # one step, whose loss is that of the weights before it
    ],
)
def test_a_run_that_diverged(train, tmp_path, rate, batch_size):
    result = train("bad", "--lr", rate, "--epochs", 1, "--batch-size", batch_size)
    result.assert_one_clear_line("epoch 0: ", "the run diverged", status=3)
    assert "best" not in result.out
    assert not [path for path in (tmp_path / "runs" / "bad").iterdir() if path.suffix in (".tar", ".csv")]


def test_pretrained_weights_within_reach(monkeypatch):
    """Here, or on the other side of the network: nothing is downloaded to know it."""
    import huggingface_hub

    from timm_ls_kd.models import check_pretrained

    with pytest.raises(LskdError, match="no weights for 'botnet50ts_256'"):
        check_pretrained("botnet50ts_256", reach=False)
    with pytest.raises(LskdError, match="not on this machine and cannot be had"):
        check_pretrained("test_resnet")
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: asked.append(url))
        check_pretrained("test_resnet")
    assert "test_resnet" in asked[0]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: "/a/file")
    check_pretrained("test_resnet")


def test_schedule_that_cannot_be_had_leaves_no_folder(train, tmp_path, monkeypatch):
    from timm_ls_kd.trainer import session

    def fail(*args, **kwargs):
        raise AssertionError("no such schedule")

    monkeypatch.setattr(session, "create_scheduler_v2", fail)
    train("bad").assert_one_clear_line("--sched cosine", "no such schedule")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["resume", "initial_checkpoint"])
def test_the_script_goes_by_a_files_name_so_another_name_is_refused(tmp_path, flag):
    mine, named = tmp_path / "safetensors.pth", tmp_path / "pickle.safetensors"
    save_file({"fc.weight": torch.zeros(1)}, mine)
    torch.save({"fc.weight": torch.zeros(1)}, named)
    for path, what in ((mine, "is a safetensors file"), (named, "is no safetensors file")):
        args = argparse.Namespace(**{"resume": "", "initial_checkpoint": "", flag: str(path)})
        with pytest.raises(CheckpointError, match=f"{what}.*rename it"):
            upstream._check_checkpoints(args)
        setattr(args, flag, str(path.rename(path.with_suffix(named.suffix if path == mine else mine.suffix))))
        upstream._check_checkpoints(args)
