"""The bundled trainer's command line and its YAML, without a run."""

import pytest
import yaml

from lskd import LskdError
from timm_ls_kd.run_settings import UPSTREAM_ONLY
from timm_ls_kd.trainer.arguments import create_parser, parse_arguments

pytestmark = pytest.mark.unit


@pytest.fixture
def with_config(tmp_path):
    def parse(text, *argv):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return parse_arguments(["--config", str(path), *argv])

    return parse


def test_null_is_as_if_the_key_were_not_there(with_config):
    names = [action.dest for action in create_parser()._actions if action.dest not in ("help", "config")]
    found = with_config("\n".join(f"{name}: null" for name in names))
    assert vars(found) == vars(parse_arguments([]))


def test_what_only_upstreams_script_knows_may_be_named_as_it_is_by_default(with_config, capsys):
    assert vars(with_config(yaml.safe_dump(UPSTREAM_ONLY))) == vars(parse_arguments([]))
    assert capsys.readouterr().err == ""
    for text in ("task: multilabel", "class_stats: counts.json", "target_format: multihot"):
        with pytest.raises(
            LskdError, match=f"c.yaml sets {text.partition(':')[0]}, .* upstream train.py only"
        ):
            with_config(text)


def test_settings_of_timm_1_0_31_are_read(with_config):
    found = with_config("loss: bce\npersistent_workers: false\nsave_epochs: [1, 2]\nstop_epoch: null\n")
    assert (found.loss, found.persistent_workers, found.save_epochs) == ("bce", False, [1, 2])


def test_null_smoothing_is_not_asked_for(with_config):
    found = with_config("smoothing: null\nkd_temperature: null\nkd_teacher: resnet18\n")
    assert (found.smoothing, found.kd_temperature) == (0.0, 1.0)


def test_whole_numbers_written_with_a_point(with_config):
    found = with_config("seed: 42.0\nepochs: 7.0\nwarmup_lr: 0\ndecay_milestones: [90.0, 180, 270]\n")
    assert [type(value) for value in (found.seed, found.epochs, found.warmup_lr)] == [int, int, float]
    assert (found.seed, found.epochs, found.warmup_lr) == (42, 7, 0.0)
    assert [type(value) for value in found.decay_milestones] == [int] * 3


def test_seeds_are_no_sizes(with_config):
    """A run that is resumed, or a store that is read, may have a seed beyond the largest size of a tensor."""
    found = with_config(f"seed: {2**32 - 1}\nkd_soft_labels_seed: {2**63 - 1}\n")
    assert (found.seed, found.kd_soft_labels_seed) == (2**32 - 1, 2**63 - 1)
    with pytest.raises(LskdError, match=f"--kd-soft-labels-seed must be at most {2**63 - 1}, got {2**63}"):
        with_config("{}", "--kd-soft-labels-seed", str(2**63))


def test_values_that_look_like_arguments(with_config):
    """A file is no command line: what follows a list is not in it, and nothing in it is a flag."""
    found = with_config("mean: [-0.1, -1e-05, 0.3]\ndata: --x\n")
    assert (found.mean, found.data_dir) == ([-0.1, -1e-05, 0.3], "--x")
    assert with_config("mean: []\n").mean == []


@pytest.mark.parametrize("typed", [["there"], ["--data-dir", "there"]])
@pytest.mark.parametrize("text", ["data_dir: here", "data: here", "data: here\ndata_dir: elsewhere"])
def test_the_command_lines_data_folder_beats_the_files(with_config, typed, text):
    assert with_config(text, *typed).data_dir == "there"
    if "elsewhere" not in text:
        assert with_config(text).data_dir == "here"


@pytest.mark.parametrize(
    ("text", "typed"),
    [("data: here\ndata_dir: elsewhere", []), ("{}", ["here", "--data-dir", "elsewhere"])],
)
def test_two_data_folders_in_one_place_are_refused(with_config, text, typed):
    with pytest.raises(LskdError, match="two data folders are named, here and elsewhere"):
        with_config(text, *typed)


def test_arguments_that_timm_leaves_to_their_defaults_are_in_range():
    parse_arguments(["--lr", "0", "--color-jitter", "0", "--start-epoch", "0", "--crop-pct", "1"])
