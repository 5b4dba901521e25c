"""The commands of all three ecosystems on a card, as a user types them, on real digits and number words."""

from pathlib import Path

import pytest
import torch
import yaml

from lskd.base.files import read_csv

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
TIMM = (
    *("-m", "timm_ls_kd", "train.py", "--model", "test_resnet", "--num-classes", 10, "--in-chans", 1),
    *("--img-size", 16, "--mean", 0.5, "--std", 0.5, "--batch-size", 64, "--workers", 2, "--lr", 0.05),
    *("--epochs", 2, "--cooldown-epochs", 0, "--warmup-epochs", 0, "--scale", 0.7, 1, "--hflip", 0),
    *("--color-jitter", 0),
)
BFLOAT16 = ("--amp", "--amp-dtype", "bfloat16")
SHAPE = (
    *("--arch", "transformer", "--encoder-layers", 1, "--decoder-layers", 1),
    *("--encoder-embed-dim", 64, "--decoder-embed-dim", 64, "--encoder-ffn-embed-dim", 128),
    *("--decoder-ffn-embed-dim", 128, "--encoder-attention-heads", 4, "--decoder-attention-heads", 4),
    *("--optimizer", "adam", "--lr", 3e-3, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 100),
    *("--max-tokens", 1000, "--max-epoch", 2, "--num-workers", 0, "--no-epoch-checkpoints"),
)


@pytest.fixture(scope="module")
def digits(run, tmp_path_factory):
    """Return a folder with the digits in `digits` and a teacher of timm's in `out/teacher`."""
    folder = tmp_path_factory.mktemp("digits")
    run("-m", "lskd_study", "data", "digits", "--output", "digits", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def train(run, digits, device):
    def call(name, *words):
        where = ("--data-dir", "digits", "--output", "out", "--experiment", name, "--device", device)
        printed = run(*TIMM, *where, *words, cwd=digits)
        return printed, read_csv(digits / "out" / name / "summary.csv")

    return call


@pytest.fixture(scope="module")
def teacher(train, digits):
    _, rows = train("teacher", "--smoothing", 0.1, "--epochs", 5)
    assert float(rows[-1]["eval_top1"]) > 60
    return digits / "out" / "teacher" / "last.pth.tar"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("scaled", ("--amp", "--amp-dtype", "float16")),
        # Not on 16 x 16: on a CPU torch leaves gradients of a bfloat16 3 x 3 convolution with stride 2 unset
        # where it sees a single pixel.
        ("fast", (*BFLOAT16, "--img-size", 32, "--kd-teacher-fast", "auto", "--channels-last")),
        ("stored", ("--kd-soft-labels", "store", "--kd-soft-labels-top-k", 5)),
    ],
)
def test_timm(train, teacher, name, flags):
    words = ("--kd-teacher", "test_resnet", "--kd-teacher-checkpoint", teacher, *flags)
    _, rows = train(name, *words)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    if name == "stored":  # the second reads what the first has written, and needs no teacher for it
        _, again = train("read", *words)
        first, second = ([float(row["train_loss"]) for row in each] for each in (rows, again))
        assert second == pytest.approx(first, rel=0.02)


def test_mmcls(run, digits, teacher, device):
    mmcls = pytest.importorskip("mmcls")
    recipe = digits / "recipe.py"
    recipe.write_text(
        f"""
_base_ = {str(ROOT / "recipes" / "reactnet" / "digits_kd.py")!r}
model = dict(teacher=dict(_delete_=True, model="test_resnet", checkpoint={str(teacher)!r}, smoothing=0.1))
train_dataloader = dict(dataset=dict(data_root="digits"))
val_dataloader = dict(dataset=dict(data_root="digits"))
test_dataloader = dict(dataset=dict(data_root="digits"))
train_cfg = dict(max_epochs=2)
"""
    )
    script = Path(mmcls.__file__).parent / ".mim" / "tools" / "train.py"
    amp = ("--amp",) if device.type == "cuda" else ()
    run(script, recipe, "--work-dir", "mmcls", *amp, cwd=digits)
    rows = read_csv(digits / "mmcls" / "epochs.csv")
    assert float(rows[-1]["train_ce"]) < float(rows[0]["train_ce"])


@pytest.fixture(scope="module")
def words(run, tmp_path_factory, device):
    """Return a folder with number words in `bin`, and what trains on them into a folder."""
    pytest.importorskip("fairseq")
    folder = tmp_path_factory.mktemp("words")
    run(
        *("-m", "lskd_study", "data", "number-words", "--output", "text"),
        *("--train", 1000, "--valid", 200, "--data-bin", "bin"),
        cwd=folder,
    )
    cpu = ("--cpu",) if device.type == "cpu" else ()

    def call(name, *arguments):
        plugin = ROOT / "plugins" / "fairseq_kd"
        given = (*("bin", "--user-dir", plugin, "--save-dir", name), *cpu, *SHAPE, *arguments)
        return run("-m", "fairseq_cli.train", *given, cwd=folder)

    call("teacher", "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1)
    return folder, call


@pytest.mark.parametrize("precision", ["", "--fp16", "--amp"])
def test_fairseq(words, device, precision):
    if precision and device.type == "cpu":
        pytest.skip("fairseq's half precision needs a card")
    folder, call = words
    name = precision.strip("-") or "full"
    teacher = folder / "teacher" / "checkpoint_last.pt"
    call(name, "--criterion", "ls_kd", "--kd-teacher", teacher, *filter(None, [precision]))
    weights = torch.load(folder / name / "checkpoint_last.pt", map_location="cpu", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_fairseq_store(words, run, device):
    folder, call = words
    cpu = ("--cpu",) if device.type == "cpu" else ()
    teacher = ("--path", "teacher/checkpoint_last.pt")
    run("-m", "fairseq_kd.soft_labels", "bin", *teacher, "--output", "store", *cpu, cwd=folder)
    stored = ("--task", "translation_ls_kd", "--kd-soft-labels", folder / "store")
    call("stored", "--criterion", "ls_kd", *stored)


def test_study_with_one_card_a_run(run, device, tmp_path):
    """The digits demo, one teacher of each kind and one student."""
    recipes = ROOT / "recipes" / "digits"
    study = yaml.safe_load((recipes / "study.yaml").read_text())
    study |= {"seeds": [0, 1], "output": "runs", "controls": [], "students": study["students"][:1]}
    study["data"] |= {"path": "digits"}
    study["resources"]["extra"] = {"gpu": 1} if device.type == "cuda" else {}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    for name in ("teacher.yaml", "student.yaml"):
        (tmp_path / name).write_text((recipes / name).read_text())
    run("-m", "lskd_study", "study", "study.yaml", "--cores", 4, cwd=tmp_path)
    assert (tmp_path / "runs" / "index.html").stat().st_size > 10_000
