"""`lskd recipe list`, `show` and `check`; what a check of a broken recipe says."""

import shutil

import pytest

from lskd_study.cli import main as cli
from lskd_study.plan.recipes import catalogue, recipes_folder
from lskd_study.recipe_check.cost import SUSTAINED, corner_points, gpu_hours

pytestmark = pytest.mark.unit


def test_list_names_every_recipe_with_its_table(capsys):
    assert cli.main(["recipe", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {recipe.name for recipe in catalogue()} | {"NAME"}
    assert lines["imagenet/table9"].split()[1:] == ["Table", "9", "timm", "8", "data/imagenet"]


def test_show_prints_a_recipes_files(capsys):
    assert cli.main(["recipe", "show", "cub200/table2"]) == 0
    out = capsys.readouterr().out
    for name in ("table2.yaml", "teacher.yaml", "student.yaml"):
        assert (recipes_folder() / "cub200" / name).read_text() in out


@pytest.mark.parametrize("command", ["show", "check"])
def test_an_unknown_name_is_one_line_with_the_nearest(capsys, command):
    assert cli.main(["recipe", command, "imagenet/tabel2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "unknown recipe 'imagenet/tabel2'; did you mean imagenet/table2?" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("teacher.yaml", "epochs:", "epcohs:", "unknown key 'epcohs'; did you mean 'epochs'?"),
        ("study.yaml", "test_byobnet", "test_byobnett", "unknown model 'test_byobnett'"),
        ("study.yaml", "num_classes: 10", "num_classes: 11", "`lskd data digits` makes 10 classes; fix one"),
    ],
)
def test_a_broken_recipe_fails_in_one_line(capsys, tmp_path, file, old, new, message):
    folder = shutil.copytree(recipes_folder() / "digits", tmp_path / "digits")
    path = folder / file
    path.write_text(path.read_text().replace(old, new))
    assert cli.main(["recipe", "check", str(folder / "study.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("lskd: error: ")
    assert err.count("\n") == 1


def test_corner_points():
    assert corner_points([1, 1, 1, 0.1, 0.1]) == [(0, 1), (3, 0.1)]
    assert corner_points([1.0, 0.75, 0.5, 0.25]) == [(0, 1.0), (3, 0.25)]
    assert corner_points([0.1, 1, 1, 1]) == [(0, 0.1), (1, 1)]
    assert corner_points([2.0]) == [(0, 2.0)]


def test_gpu_hours():
    """2 epochs of 10 images at 3 x 5 + 7 operations, and 4 validation images at 5."""
    assert gpu_hours(2, 10, 4, 5, 7) == pytest.approx(2 * (10 * 22 + 4 * 5) / SUSTAINED / 3600)
    assert gpu_hours(1, 10, 0, 5, 7, backward=0) == pytest.approx(10 * 12 / SUSTAINED / 3600)
