"""`lskd study --own` up to the first run: what is looked at, chosen, refused, asked and written."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from PIL import Image

from lskd import LskdError
from lskd.base.files import write_text
from lskd_study.claims.outlook import assumed, before
from lskd_study.cli import main as cli
from lskd_study.plan.json_schema import study_schema
from lskd_study.study import own as command
from lskd_study.study import own_time as timing
from lskd_study.study.engine import make_plan
from lskd_study.study.own_choice import SEEDS, Asked, candidates, shorter
from lskd_study.study.own_files import study_files
from lskd_study.study.own_images import OwnImages, look_at

pytestmark = pytest.mark.unit


def fill(
    folder: Path, splits=("train", "val"), labels=("cat", "dog"), count=2, size=(8, 6), mode="RGB"
) -> Path:
    for split in splits:
        for label in labels:
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.new(mode, size).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture
def here(scene):
    fill(scene.folder / "pets")
    return scene


def test_a_folder_is_looked_at(here):
    Path("pets/train/cat/.DS_Store").touch()
    found = look_at("pets")
    assert found.classes == ["cat", "dog"]
    assert (found.train, found.validation, found.smallest_class) == (4, 4, 2)
    assert (found.width, found.height, found.grey) == (8, 6, False)
    assert found.strangers == []
    assert found.usual_names
    fill(Path("grey"), mode="L", splits=("training", "validation"))
    other = look_at("grey")
    assert other.grey
    assert not other.usual_names
    assert [path.name for path in other.splits.values()] == ["training", "validation"]


def test_test_images_do_where_there_are_no_validation_images(here):
    fill(Path("x"), splits=("train", "test"))
    assert look_at("x").splits["val"].name == "test"
    fill(Path("x"), splits=("valid",))
    assert look_at("x").splits["val"].name == "valid"


def no_classes(pets: Path) -> None:
    for path in (pets / "train").iterdir():
        path.rename(pets / path.name)


BROKEN = {
    "missing": (
        lambda pets: pets.rename(pets.parent / "cats"),
        r"pets is not there; it must contain train/<class>/",
    ),
    "no split": (
        lambda pets: (pets / "val").rename(pets / "rest"),
        r"no val folder \(it has rest, train; looked",
    ),
    "no classes": (no_classes, "pets/train has no class folders"),
    "two validation sets": (lambda pets: fill(pets, ("eval",)), "has val and eval; keep one to validate on"),
    "one class": (
        lambda pets: [shutil.rmtree(pets / split / "dog") for split in ("train", "val")],
        "one class only, cat",
    ),
    "other classes": (
        lambda pets: (pets / "val" / "dog").rename(pets / "val" / "cow"),
        r"class cow \(and 1 more\) is in pets/val and not in pets/train",
    ),
    "no images": (
        lambda pets: [path.unlink() for path in (pets / "val" / "dog").iterdir()],
        "pets/val/dog has no images",
    ),
    "other files": (
        lambda pets: [path.rename(path.with_suffix(".heic")) for path in (pets / "val" / "dog").iterdir()],
        r"pets/val/dog has 2 files, none with a name of an image; images end in \.jpeg, \.jpg, \.png",
    ),
    "folders in classes": (
        lambda pets: fill(pets / "train" / "cat", ("more",), ("x",)),
        "class folder pets/train/cat has a folder in it, more",
    ),
    "outside": (
        lambda pets: (pets / "train" / "cat" / "0.png").rename(pets / "train" / "0.png"),
        r"image pets/train/0\.png lies outside of any class",
    ),
    "damaged": (
        lambda pets: (pets / "val" / "cat" / "1.png").write_bytes(b"\x89PNG"),
        r"image pets/val/cat/1\.png cannot be read",
    ),
    "several damaged": (
        lambda pets: [path.write_bytes(b"\x89PNG") for path in (pets / "val" / "cat").iterdir()],
        r"2 of \d+ images looked at cannot be used: pets/val/cat/0\.png cannot .* also pets/val/cat/1",
    ),
    "deep": (
        lambda pets: Image.new("I;16", (8, 8), 4095).save(pets / "val" / "cat" / "1.png"),
        r"image pets/val/cat/1\.png has grey values of more than 8 bits",
    ),
    "a file": (lambda pets: (pets.rename(pets.parent / "x"), pets.touch()), "pets is no folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_of_something_else_is_one_line(here, name):
    break_it, message = BROKEN[name]
    break_it(Path("pets"))
    with pytest.raises(LskdError, match=message):
        look_at("pets")
    assert re.search(message, here.refused("study", "--own", "pets", "--dry-run"))


def images(train=1_200, validation=600, side=28, grey=False, smallest=100) -> OwnImages:
    splits = {"train": Path("x/train"), "val": Path("x/val")}
    names = ["a", "b", "c"]
    return OwnImages("x", splits, names, train, validation, smallest, side, side + 2, grey, [])


def test_settings_follow_the_images():
    small = candidates(images(), gpu=False, cores=2)
    assert [choice.teacher for choice in small] == ["resnet10t", "test_resnet"]
    assert {(choice.img_size, choice.batch_size, choice.epochs) for choice in small} == {(32, 64, 30)}
    many = candidates(images(train=1_000_000, side=400), gpu=True, cores=4)
    assert (many[0].teacher, many[0].students) == ("resnet50", ("resnet18", "resnet50"))
    assert (many[0].img_size, many[0].batch_size, many[0].epochs, many[0].workers) == (224, 256, 10, 4)
    assert many[0].lr == 0.1
    assert candidates(images(side=400), gpu=False, cores=2)[0].img_size == 96
    assert candidates(images(train=20), gpu=False, cores=2)[0].batch_size == 8
    assert candidates(images(train=5), gpu=False, cores=2)[0].batch_size == 5
    assert shorter(small[0], 0.5).epochs == 15
    assert shorter(small[0], 0.001).epochs == 5


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("grey", [False, True])
def test_the_files_are_a_study_in_order(tmp_path, monkeypatch, gpu, grey):
    monkeypatch.chdir(tmp_path)
    for choice in candidates(images(train=100_000, grey=grey), gpu=gpu, cores=2):
        for name, text in study_files(images(grey=grey), choice, "runs/x", "It takes long.").items():
            (tmp_path / name).write_text(text)
            assert max(map(len, text.splitlines())) <= 120
        jsonschema.validate(yaml.safe_load((tmp_path / "study.yaml").read_text()), study_schema())
        plan = make_plan("study.yaml", None)  # the trainer's own parser reads the files
        assert (plan.data, plan.output, plan.num_classes) == ("x", "runs/x", 3)
        assert len(plan.runs) == 50
        assert plan.seeds == [0, 1, 2, 3, 4]
        assert {run.model for run in plan.runs if run.role == "student"} == set(choice.students)
        config = yaml.safe_load((tmp_path / "student.yaml").read_text())
        assert "pretrained" not in config
        assert config["epochs"] == choice.epochs
        assert config.get("in_chans", 3) == (1 if grey else 3)


def run_time(name: str, count: int, **changes: float) -> timing.RunTime:
    times = {"start": 5.0, "step": 0.1, "steps": 10, "evaluation": 0.5, "epochs": 30}
    return timing.RunTime(name, count, **(times | changes))


ROWS = [
    run_time("teacher test_resnet", 10),
    run_time("student test_byobnet of test_resnet", 20),
    run_time("control test_byobnet", 20),
]


@pytest.fixture
def untrained(monkeypatch) -> list[tuple[str, int]]:
    """Nothing is timed and nothing trained; returns what would have been."""
    started: list[tuple[str, int]] = []
    monkeypatch.setattr(command, "estimate_time", lambda plan, cores: timing.TimeEstimate(ROWS, 50, cores))
    monkeypatch.setattr(
        command,
        "run_study",
        lambda file, output, cores, dry_run, options, **more: started.append((file, cores)) or 0,
    )
    return started


def test_a_dry_run_shows_the_time_and_leaves_nothing(here, untrained):
    before = here.listing()
    out = here.run("study", "--own", "pets", "--dry-run", "--cores", "2")
    assert (
        "10 x teacher test_resnet, 30 epochs of 10 steps (100 ms) and an evaluation (0.5 s): 50 s each" in out
    )
    assert "20 x student test_byobnet of test_resnet, 30 epochs of 10 steps (100 ms)" in out
    assert "50 runs, 2 at a time, and the page" in out
    assert "would write runs/own-pets/study.yaml" in out
    assert here.listing() == before
    assert untrained == []


def test_a_teacher_that_is_asked_once_is_counted_once(here, untrained, monkeypatch):
    """With real steps, few of them."""
    here.run("study", "--own", "pets", "--yes", "--output", "out")
    for path in (Path("out/student.yaml"), Path("out/teacher.yaml")):
        path.write_text(path.read_text().replace("epochs: 30", "epochs: 7"))
    with Path("out/study.yaml").open("a") as file:
        file.write("soft_labels: {mode: always}\n")
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    expected = timing.estimate_time(make_plan("out/study.yaml", None), cores=2)
    assert [(row.name, row.count, row.epochs) for row in expected.rows] == [
        ("teacher test_resnet", 10, 7),
        ("soft labels of test_resnet", 10, 7),
        ("student test_byobnet of test_resnet", 10, 7),
        ("student test_resnet of test_resnet", 10, 7),
        ("control test_byobnet", 10, 7),
        ("control test_resnet", 10, 7),
    ]
    assert [row.evaluation > 0 for row in expected.rows] == [True, False, True, True, True, True]
    assert all(row.step > 0 and row.steps == 1 for row in expected.rows)


def test_without_a_terminal_nothing_starts_unasked(here, untrained, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert "--yes goes on without asking" in here.refused("study", "--own", "pets")
    assert untrained == []


def test_at_a_terminal_it_asks(here, untrained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    before = here.listing()
    monkeypatch.setattr("typer.confirm", lambda *words, **options: False)
    assert cli.main(["study", "--own", "pets"]) == 0
    assert "nothing was written" in capsys.readouterr().err
    assert here.listing() == before
    monkeypatch.setattr("typer.confirm", lambda *words, **options: True)
    here.run("study", "--own", "pets")
    assert untrained == [("runs/own-pets/study.yaml", 1)]


def test_changed_files_are_gone_on_with(here, untrained, capsys):
    Path("pets/val").rename("pets/test")
    again = ("study", "--own", "pets", "--yes", "--output", "out")
    here.run(*again)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "images", "student.yaml", "study.yaml", "teacher.yaml"
    ]  # fmt: skip
    assert Path("out/images/val").resolve() == Path("pets/test").resolve()
    changed = Path("out/student.yaml")
    changed.write_text(changed.read_text().replace("epochs: 30", "epochs: 7"))
    text = changed.read_text()
    assert cli.main([*again]) == 0
    assert "out/study.yaml is there; this goes on with it as it is" in capsys.readouterr().err
    assert changed.read_text() == text
    fill(Path("others"))
    assert cli.main(["study", "--own", "others", *again[3:]]) == 2
    assert "out/study.yaml is a study of out/images" in capsys.readouterr().err


def test_a_kill_between_the_files_is_gone_on_from(here, untrained, monkeypatch):
    class Killed(BaseException):
        pass

    def write_one(path, text):
        if list(Path("out").glob("*.yaml")):
            raise Killed
        write_text(path, text)

    again = ("study", "--own", "pets", "--yes", "--output", "out")
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_text", write_one)
        with pytest.raises(Killed):
            cli.main([*again])
    assert list(Path("out").glob("*.yaml"))
    here.run(*again)


def test_settings_that_fit_the_time(monkeypatch):
    """Costs by model and epochs; the largest that fits is taken, else the smallest with fewer epochs."""
    costs = {"resnet18": 400.0, "resnet10t": 200.0, "test_resnet": 20.0}

    def pretend(images, choice, cores):
        step = costs[choice.teacher]
        row = run_time("x", 1, start=0, step=step, steps=1, evaluation=0, epochs=choice.epochs)
        return timing.TimeEstimate([row], 18, 1)

    monkeypatch.setattr(command, "_try", pretend)
    monkeypatch.setattr(timing, "_AROUND_RUNS", 0.0)
    many = images(train=10_000)
    first = command._choose(many, 1, 4)[0]
    assert (first.teacher, first.cut) == ("resnet18", "")
    assert command._choose(many, 1, 2)[0].teacher == "resnet10t"
    assert command._choose(many, 1, 0.5)[0].teacher == "test_resnet"
    choice, expected = command._choose(many, 1, 0.1)
    assert (choice.teacher, choice.epochs) == ("test_resnet", 18)
    said = (
        "Cut to fit --hours 0.1 and the memory of the machine: 18 epochs instead of 30, teacher test_resnet "
    )
    assert choice.cut == f"{said}instead of resnet18."
    assert choice.describe()[-1] == choice.cut
    study = yaml.safe_load(study_files(many, choice, "out", "")["study.yaml"])
    assert study["note"] == choice.cut
    jsonschema.validate(study, study_schema())
    assert expected.total == 360
    assert {row.epochs for row in expected.rows} == {choice.epochs}
    with pytest.raises(
        LskdError,
        match=r"^--hours 0.01 cannot be met: 5 epochs of test_resnet on 5 seeds need at least 1.7 min; "
        r"give --hours 0.04$",
    ):
        command._choose(many, 1, 0.01)
    assert command._choose(many, 1, 0.04)[0].epochs >= 5


def test_a_step_that_fails_is_one_line(here, untrained, monkeypatch):
    here.run("study", "--own", "pets", "--yes", "--output", "out")

    def dies(*arguments, **options):
        raise RuntimeError("worker (pid 7) is killed by signal: Bus error. ")

    monkeypatch.setattr(timing, "train_on", dies)
    with pytest.raises(LskdError, match=r"cannot be measured \(RuntimeError: worker .* by its file$"):
        timing.estimate_time(make_plan("out/study.yaml", None), cores=1)


def test_what_does_not_fit_in_memory_is_not_chosen(monkeypatch):
    def pretend(images, choice, cores):
        return timing.TimeEstimate([], 18, 1) if choice.teacher == "test_resnet" else None

    monkeypatch.setattr(command, "_try", pretend)
    assert command._choose(images(), 1, 1)[0].teacher == "test_resnet"
    monkeypatch.setattr(command, "_try", lambda images, choice, cores: None)
    with pytest.raises(LskdError, match="more memory than the GPU has"):
        command._choose(images(), 1, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--own", "pets", "study.yaml", "--yes"], "--own needs no study file; leave out study.yaml"),
        (["--own", "pets", "--yes", "--coers", "2"], "unrecognized arguments: --coers"),
        (["--own", "pets", "--yes", "--hours", "0"], "--hours"),
        (["--own", "pets", "--yes", "--seeds", "1"], "--seeds"),
        (["--own", "pets", "--yes", "--smoothing", "0"], "--smoothing must be two different numbers or more"),
        (["--own", "pets", "--yes", "--smoothing", "0,1"], "from 0 to below 1, such as 0,0.1; got '0,1'"),
        (["--own", "pets", "--yes", "--smoothing", "0,nan"], "got '0,nan'"),
        (["--own", "pets", "--yes", "--smoothing", "0;0.1"], "got '0;0.1'"),
        (
            ["--own", "pets", "--yes", "--models", "resnt18"],
            "unknown model 'resnt18': timm has no such model; did",
        ),
        (["--own", "pets", "--yes", "--models", "resnet18,"], "unknown model ''"),
        (["--own", "pets", "--yes", "--models", "resnet18,vgg11,vgg11"], "--models names a student twice"),
        (["--own", "pets", "--yes", "--max-seeds", "9"], "--max-seeds is for --until-decided"),
        (["--own", "pets", "--yes", "--until-decided", "--max-seeds", "5"], "the study has 5 seeds already"),
        (["--own", "pets", "--yes", "--variance-from", "pets"], "pets contains no study"),
        (["study.yaml", "--seeds", "7"], "--seeds is for --own; what a study does stands in its file"),
        (["study.yaml", "--models", "resnet18"], "--models is for --own"),
        ([], "name a study file, or a folder of images of your own by --own DIR"),
    ],
)
def test_arguments_that_do_not_go_together(here, untrained, words, message):
    assert message in here.refused("study", *words)
    assert untrained == []


def test_seeds_until_it_is_decided_are_told_of_and_timed_to_the_last(here, untrained, capsys):
    words = ["study", "--own", "pets", "--output", "out", "--until-decided", "--max-seeds", "12"]
    out = here.run(*words, "--dry-run")
    assert "until it is decided more seeds follow, up to 12 in at most 1" in out
    assert "points with 12 seeds (" in out
    here.run(*words, "--yes")
    plan = make_plan("out/study.yaml", None, 12)
    assert (plan.looks, len(plan.seeds)) == ([5, 8, 12], 5)
    capsys.readouterr()
    assert cli.main([*words, "--yes", "--hours", "0.1"]) == 0
    assert "warning: this takes longer than --hours 0.1" in capsys.readouterr().err
    # Nothing of its own is written beside the results of others.
    Path("out/study.yaml").unlink()
    plan.write()
    assert "out contains results and no study.yaml of --own" in here.refused(*words, "--yes")


def test_what_is_odd_but_possible_is_said(here, untrained, capsys):
    Path("pets/train/cat/notes.txt").touch()
    assert cli.main(["study", "--own", "pets", "--dry-run", "--until-decided", "--max-seeds", "9"]) == 0
    out, err = capsys.readouterr()
    assert "until it is decided more seeds follow, up to 9" in out
    assert "warning: 1 file is no image and is passed over, e.g. pets/train/cat/notes.txt" in err
    assert "warning: less than an even chance (" in err
    assert "the smallest class has 2 training images" in err


def test_the_times_of_runs_add_up():
    row = run_time("x", 6)
    assert row.each == pytest.approx(5 + 30 * 1.5 + 0.5)
    around = timing.TimeEstimate([], 0, 1).total
    expected = timing.TimeEstimate([row, run_time("y", 2, epochs=10)], 8, 2)
    assert expected.of_runs == pytest.approx(6 * 50.5 + 2 * 20.5)
    assert expected.total == pytest.approx(around + (6 * 50.5 + 2 * 20.5) / 2)
    assert expected.shorter(10).total == pytest.approx(around + 8 * 20.5 / 2)


@pytest.mark.parametrize("spelling", ["./pets/", "pets//", "{here}/pets"])
def test_a_folder_in_another_spelling_is_the_same_folder(here, untrained, spelling):
    first = here.run("study", "--own", "pets", "--yes", "--dry-run").splitlines()[0]
    name = spelling.replace("{here}", str(here.folder))
    assert here.run("study", "--own", name, "--yes", "--dry-run").splitlines()[0] == first


def test_what_is_asked_for_is_in_the_files(here, untrained, capsys):
    words = ["study", "--own", "pets", "--yes", "--output", "out", "--seeds", "7"]
    words += ["--smoothing", "0.2,0,0.05", "--models", "resnet10t,test_vit,test_resnet"]
    out = here.run(*words, "--dry-run")
    assert "teacher resnet10t, students test_vit, test_resnet, without pretrained weights" in out
    assert "smoothing 0.2, 0, 0.05; 7 seeds" in out
    here.run(*words)
    plan = make_plan("out/study.yaml", None)
    assert plan.seeds == list(range(7))
    assert plan.smoothing == [0, 0.05, 0.2]
    networks = {(run.role, run.model) for run in plan.runs}
    assert networks == {("teacher", "resnet10t")} | {
        (role, model) for role in ("student", "control") for model in ("test_vit", "test_resnet")
    }
    # The same command goes on; another one would be another study.
    assert cli.main(words) == 0
    capsys.readouterr()
    for option, value in (("--seeds", "5"), ("--smoothing", "0,0.1"), ("--models", "resnet10t")):
        assert cli.main(["study", "--own", "pets", "--yes", "--output", "out", option, value]) == 2
        assert f"out/study.yaml is there and says otherwise than {option}" in capsys.readouterr().err
    assert cli.main(["study", "--own", "pets", "--yes", "--output", "out"]) == 0


def test_a_teacher_alone_is_its_own_student():
    choices = candidates(images(), gpu=False, cores=2, asked=Asked(models=("resnet10t",)))
    assert {(choice.teacher, choice.students) for choice in choices} == {("resnet10t", ("resnet10t",))}
    assert choices[0].seeds == SEEDS


def test_it_says_what_it_can_tell_and_how_long_more_would_take(here, untrained, capsys, monkeypatch):
    """Of 50 runs of 50.5 seconds, ten a seed; the numbers are those of the study's own statistics."""
    for number in range(2_000):
        Image.new("RGB", (1, 1)).save(f"pets/val/{'cat' if number % 2 else 'dog'}/{number}.png")
    here.run("study", "--own", "pets", "--yes", "--output", "out")
    plan = make_plan("out/study.yaml", None)
    expected = before(plan, [replace(one, seconds=10 * 50.5) for one in assumed(plan, 2_002)])
    assert cli.main(["study", "--own", "pets", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert f"lskd: warning: {expected[0]}\n" in err
    assert [line for line in out.splitlines() if line.startswith("power: ")] == [
        f"power: {line}" for line in expected[1:]
    ]
    assert any("5 % of 2,002 images" in line for line in expected)
    # The warning is the first line of all, and what runs then does not say it once more.
    said = []
    monkeypatch.setattr(command, "run_study", lambda *words, **more: said.append(more["told"]) or 0)
    assert cli.main(["study", "--own", "pets", "--yes", "--output", "out"]) == 0
    assert capsys.readouterr().err.startswith(f"lskd: warning: {expected[0]}\n")
    assert said == [True]


def test_a_folder_without_a_split_gets_the_commands_that_make_one(here, monkeypatch):
    """And they are as good as they look."""
    no_classes(Path("pets"))
    shutil.rmtree("pets/train"), shutil.rmtree("pets/val")
    for label in ("cat", "dog"):
        for number in range(3):
            Image.new("RGB", (8, 6), 9 * number + 99 * (label == "cat")).save(f"pets/{label}/{number}.png")
    error = here.refused("study", "--own", "pets", "--yes")
    assert "make one: lskd data split pets --output pets_split && lskd study --own pets_split" in error
    first, second = (line.split() for line in error.strip().partition("make one: ")[2].split(" && "))
    here.run(*first[1:])
    assert look_at(second[-1]).classes == ["cat", "dog"]
    monkeypatch.chdir("pets")
    assert "data split . --output ../pets_split" in here.refused("study", "--own", ".", "--yes")


def test_training_images_alone_can_be_split(here):
    shutil.rmtree("pets/val")
    error = here.refused("study", "--own", "pets", "--yes")
    assert "lskd data split pets/train --output pets_split && lskd study --own pets_split" in error


def test_formats_that_trainers_pass_over_are_named(here, untrained, capsys):
    Image.new("RGB", (8, 6)).save("pets/train/cat/x.webp")
    assert cli.main(["study", "--own", "pets", "--dry-run"]) == 0
    assert (
        "passed over, e.g. pets/train/cat/x.webp; convert WebP, BMP and TIFF to PNG"
        in capsys.readouterr().err
    )
    for path in Path("pets/val/dog").iterdir():
        path.rename(path.with_suffix(".bmp"))
    assert "convert WebP, BMP and TIFF to PNG, as `lskd data split`" in here.refused(
        "study", "--own", "pets", "-n"
    )
