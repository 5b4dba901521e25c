"""``lskd figure``: files written, choices said, and one line for bad input before anything is written."""

from pathlib import Path

import numpy as np
import pytest

from lskd_study.cli import main as cli
from simulated import rows

pytestmark = pytest.mark.unit
NAMES = ["tench", "toy poodle", "miniature poodle", "hen"]


def save_teacher(path: Path, seed: int = 0, width: int = 8, per_class: int = 12, **changes: object) -> None:
    """Outputs of a made-up network of four classes, two of them alike; ``None`` leaves an array out."""
    own = np.random.default_rng(99)  # one network of each width, whatever the samples
    weight = own.normal(size=(4, width))
    weight[2] = weight[1] + 0.2 * own.normal(size=width)
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), per_class)
    features = weight[labels] + 0.5 * rng.normal(size=(len(labels), width))
    arrays = {
        "logits": features @ weight.T,
        "labels": labels,
        "features": features,
        "weight": weight,
        "class_names": np.array(NAMES),
    } | changes
    kept = {name: array for name, array in arrays.items() if array is not None}
    np.savez(
        path,
        **{
            name: np.asarray(array, np.float32) if np.asarray(array).dtype == float else array
            for name, array in kept.items()
        },
    )


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "a.npz", 0)
    save_teacher(tmp_path / "b.npz", 1)
    save_teacher(tmp_path / "a-train.npz", 2, per_class=20)
    save_teacher(tmp_path / "b-train.npz", 3, per_class=20)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def drawn(capsys, here: Path, *words: str) -> tuple[str, set[str]]:
    """Run ``lskd figure``; return what it printed and which files are new."""
    before = set(listing(here))
    status = cli.main(["figure", *words])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    new = set(listing(here)) - before - {"figures"}
    for name in new:
        assert name in out
    return out, new


def refused(capsys, here: Path, *words: str) -> str:
    before = listing(here)
    assert cli.main(["figure", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lskd: error: ")
    assert err.count("\n") == 1
    assert listing(here) == before
    return err


BOTH = ("--outputs", "a.npz", "--outputs", "b.npz")
TRAIN = ("--train-outputs", "a-train.npz", "--train-outputs", "b-train.npz")


def test_projection(capsys, here):
    words = ("--classes", "toy poodle,miniature poodle,0", "--name", "hard", "--name", "smoothed")
    _, new = drawn(capsys, here, "projection", *BOTH, *TRAIN, *words, "--replicates", "100")
    assert new == {f"figures/projection{end}" for end in (".png", ".svg", ".csv", "-distances.csv")}
    points, distances = (
        rows(here / "figures/projection.csv"),
        rows(here / "figures/projection-distances.csv"),
    )
    assert {(r["teacher"], r["split"]) for r in points} == {
        (name, split) for name in ("hard", "smoothed") for split in ("train", "val")
    }
    assert len(points) == 2 * 3 * (12 + 20)
    assert len(distances) == 4 * 2 * 5
    assert [r["class"] for r in points[::20][:3]] == ["toy poodle", "miniature poodle", "tench"]


@pytest.mark.parametrize("words", [(), ("--propose",)])
def test_classes_are_proposed_and_said(capsys, here, words):
    out, _ = drawn(capsys, here, "projection", *BOTH, *words, "--replicates", "100", "--output", "fig.png")
    assert out.startswith("classes: toy poodle and miniature poodle, which 2 teachers confuse most")
    assert {r["split"] for r in rows(here / "fig.csv")} == {"val"}


def test_same_command_same_files(capsys, here):
    words = ("projection", *BOTH, "--replicates", "100", "--output", "f")
    drawn(capsys, here, *words)
    first = {end: (here / f"f{end}").read_bytes() for end in (".svg", ".csv", "-distances.csv", ".png")}
    drawn(capsys, here, *words)
    assert first == {end: (here / f"f{end}").read_bytes() for end in first}


def test_class_means(capsys, here):
    _, new = drawn(capsys, here, "class-probabilities", *BOTH)
    assert new == {f"figures/class-probabilities.{end}" for end in ("png", "svg", "csv")}
    assert [r["class"] for r in rows(here / "figures/class-probabilities.csv")] == NAMES
    drawn(capsys, here, "class-probabilities", *BOTH, "--first", "2", "--output", "two")
    assert [r["class"] for r in rows(here / "two.csv")] == NAMES[:2]
    drawn(capsys, here, "minor-probabilities", *BOTH, "--classes", "hen,1", "--log", "--output", "x/minor")
    assert [r["class"] for r in rows(here / "x/minor.csv")] == ["hen"] * 3 + ["toy poodle"] * 3


def test_figures_without_teachers(capsys, here):
    drawn(capsys, here, "smoothing-loss", "--alphas", "0, 0.2", "--convention", "uniform", "--output", "v1.0")
    assert [r["alpha"] for r in rows(here / "v1.0-minima.csv")] == ["0", "0.2"]
    drawn(capsys, here, "teacher-student", "--paper")
    drawn(capsys, here, "class-count", "--paper")
    assert len(rows(here / "figures/class-count.csv")) == 9
    (here / "t.csv").write_text("n,k,acc,ls\nr,10,80,no\nr,10,81,yes\nr,99,70,no\nr,99,72,yes\n")
    columns = (
        "--network-column",
        "n",
        "--classes-column",
        "k",
        "--accuracy-column",
        "acc",
        "--smoothing-column",
    )
    drawn(capsys, here, "class-count", "--table", "t.csv", *columns, "ls", "--output", "cc")
    assert [float(r["gain_points"]) for r in rows(here / "cc.csv")] == [1, 2]
    columns = (
        "--teacher-column",
        "k",
        "--student-column",
        "acc",
        "--name-column",
        "n",
        "--group-column",
        "ls",
    )
    drawn(capsys, here, "teacher-student", "--table", "t.csv", *columns, "--output", "ts")
    assert [int(r["n"]) for r in rows(here / "ts-correlations.csv")] == [2, 2]


PROJECTION = ("projection", *BOTH, "--replicates", "100")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PROJECTION, "--classes", "tench,hen,toy poodel"), "'toy poodel'; did you mean 'toy poodle'?"),
        ((*PROJECTION, "--classes", "tench,hen"), "--classes names 2 classes; the projection takes 3"),
        ((*PROJECTION, "--classes", "tench,hen,0"), "names a class twice"),
        ((*PROJECTION, "--classes", "0,1,4"), "ids go from 0 to 3"),
        ((*PROJECTION, "--classes", "0,1,2", "--propose"), "leave out one"),
        ((*PROJECTION, "--train-outputs", "a-train.npz"), "2 --outputs and 1 --train-outputs"),
        ((*PROJECTION, "--name", "x"), "1 --name for 2 teachers"),
        ((*PROJECTION, "--name", "x", "--name", "x"), "two teachers are called x"),
        ((*PROJECTION, "--model", "resnet18"), "take one kind"),
        (("projection",), "no teacher; name files with --outputs"),
        (("projection", "--checkpoint", "a.npz"), "no teacher; name files with --outputs"),
        (("projection", *["--outputs", "a.npz"] * 2), "two teachers are called a; give each"),
        (("projection", *["--model", "resnet18"] * 2, "--data-dir", "."), "two teachers are called resnet18"),
        (("projection", *["--model", "resnet18"] * 2, "--checkpoint", "a.npz"), "1 --checkpoint"),
        (("projection", "--model", "resnet18", "--checkpoint", "no.pth", "--data-dir", "."), "no.pth"),
        (("projection", "--model", "resnet18", "--checkpoint", "a.npz"), "--data-dir"),
        (("projection", *BOTH, "--checkpoint", "a.npz"), "1 --checkpoint for 0 models"),
        (("projection", "--outputs", "nothing.npz"), "nothing.npz does not exist"),
        ((*PROJECTION, "--output", "a.npz/fig"), "a.npz is no folder"),
        ((*PROJECTION, "--output", "full"), "full.csv: it is a folder"),
        ((*PROJECTION, "--output", "n" * 300), "File name too long"),
        (("class-count", "--paper", "--output", "full"), "full.csv: it is a folder"),
        (("teacher-student", "--paper", "--output", "half"), "half-correlations.csv: it is a folder"),
        (("projection", "--outputs", "bare.npz", "--classes", "0,1,2"), "bare (val) has no features"),
        (("projection", "--outputs", "noweight.npz", "--classes", "0,1,2"), "no classifier's weight"),
        (("projection", "--outputs", "narrow.npz"), "features have 5 columns, weight 8"),
        (("projection", "--outputs", "nologits.npz"), "no logits to choose classes by"),
        (("projection", "--outputs", "nan.npz", "--classes", "0,1,2"), "sample 7"),
        (("projection", "--outputs", "line.npz", "--classes", "0,1,2"), "on one line"),
        (("projection", "--outputs", "few.npz", "--classes", "0,1,2"), "0 samples of class miniature poodle"),
        (("class-probabilities", "--outputs", "few.npz"), "few has no sample of class miniature poodle, hen"),
        (("projection", "--outputs", "a.npz", "--train-outputs", "wide.npz"), "11 wide on train and 8"),
        (("projection", "--outputs", "a.npz", "--outputs", "other.npz"), "a and other have different labels"),
        (("class-probabilities", "--outputs", "a.npz", "--outputs", "three.npz"), "have 4 and 3 classes"),
        (("class-probabilities", "--outputs", "nologits.npz"), "nologits has no logits"),
        (("minor-probabilities", "--outputs", "nanlogits.npz"), "nanlogits: the logits of sample 7"),
        (("minor-probabilities", *BOTH, "--classes", "cat"), "no class is called 'cat'"),
        (("smoothing-loss", "--alphas", "0,1"), "'1' is no smoothing"),
        (("smoothing-loss", "--alphas", "0,,"), "'' is no smoothing"),
        (("smoothing-loss", "--alphas", "0.1,0.10"), "names 0.1 twice"),
        (("smoothing-loss", "--margin", "nan"), "--margin is nan"),
        (("smoothing-loss", "--convention", "mine"), "convention"),
        (("teacher-student",), "--table"),
        (("teacher-student", "--table", "t.csv", "--paper"), "--table"),
        (("teacher-student", "--table", "nothing.csv"), "nothing.csv cannot be read"),
        (("teacher-student", "--table", "a.npz"), "no CSV table"),
        (("class-count", "--table", "t.csv", "--classes-column", "clas"), "did you mean 'class'?"),
    ],
)  # fmt: skip
def test_bad_input(capsys, here, words, message):
    save_teacher(here / "bare.npz", features=None, weight=None)
    save_teacher(here / "noweight.npz", weight=None)
    save_teacher(here / "nologits.npz", logits=None)
    save_teacher(here / "narrow.npz", features=np.zeros((48, 5)))
    save_teacher(here / "wide.npz", width=11)
    save_teacher(here / "other.npz", per_class=13)
    save_teacher(here / "line.npz", weight=np.outer(np.arange(4.0), np.ones(8)))
    save_teacher(here / "few.npz", labels=np.repeat([0, 1], 24))
    nan = np.zeros((48, 8))
    nan[7] = np.nan
    save_teacher(here / "nan.npz", features=nan)
    save_teacher(here / "nanlogits.npz", logits=nan[:, :4])
    three = {"features": None, "weight": None, "class_names": None}
    save_teacher(here / "three.npz", logits=np.zeros((48, 3)), labels=np.repeat(np.arange(3), 16), **three)
    (here / "t.csv").write_text("class,teacher,smoothing,teacher_top1_mean\n10,a,0,80\n")
    (here / "full.csv").mkdir()
    (here / "half-correlations.csv").mkdir()
    assert message in refused(capsys, here, *words)


def test_a_folder_that_cannot_be_written_while_writing(capsys, here, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert "No space left" in refused(capsys, here, "class-count", "--paper", "--output", "cc")
