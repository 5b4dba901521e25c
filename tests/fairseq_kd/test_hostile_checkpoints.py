"""Checkpoints whose settings would run code, or fill the memory: strings and tensors, so torch reads them."""

import contextlib
import inspect
import os
import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils, models, modules, quantization_utils, sequence_generator
from fairseq.data import encoders
from fairseq.tasks import fairseq_task, translation

from fairseq_kd import safe_loading
from fuzz.attacks import fairseq_settings, forged
from lskd import LskdError

pytestmark = pytest.mark.integration

# Of what is not even one of fairseq's old files: a command line of a model that has settings of its own.
UNREADABLE = "was not written by fairseq-train"


@pytest.fixture
def trap(tmp_path):
    """Return a file, and Python that makes it."""
    return tmp_path / "ran", f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"


@pytest.fixture
def forge(corpus, tmp_path):
    """Write the teacher with changed settings; as old fairseq did, in one flat namespace."""

    def write(change, legacy=False):
        def changed(state):
            change(state["cfg"])
            if legacy:
                state["args"], state["cfg"] = Namespace(**vars(state["cfg"]["model"])), None

        return corpus.forge(tmp_path / f"{'old' if legacy else 'bad'}.pt", changed)

    return write


def architecture(name, **settings):
    def change(cfg):
        vars(cfg["model"]).update(arch=name, _name=name, **settings)

    return change


def test_no_setting_of_a_checkpoint_is_run(corpus, forge, trap):
    ran, code = trap
    for name, sections, flat in fairseq_settings(code):
        for legacy in (False, True) if flat else (False,):
            teacher = forge(partial(forged, sections, flat), legacy)
            with pytest.raises(LskdError, match=f"is refused: its |{UNREADABLE}") as caught:
                corpus.teach(teacher)
            assert "\n" not in str(caught.value), name
            assert not ran.exists(), name


@pytest.mark.parametrize("legacy", [False, True])
def test_every_route_asks_first(corpus, commands, forge, tmp_path, trap, legacy):
    """The plugin's commands and fairseq's own, each with a file that would run code."""
    ran, code = trap
    teacher = forge(architecture("fconv", encoder_layers=code), legacy)
    output = ("--output", tmp_path / "out", "--cpu")
    shared = (corpus.data, "--cpu", "--user-dir", commands.plugin)
    teach = commands.training(corpus.data, tmp_path / "s", "--criterion", "ls_kd", "--kd-teacher", teacher)
    for name, *words in (
        ("fairseq_kd.soft_labels", corpus.data, *output),
        ("fairseq_kd.sequence_level", corpus.data, *output),
        (*teach, "--max-update", 1),
        ("fairseq-generate", *shared),
        ("fairseq-interactive", *shared),
        ("fairseq-validate", *shared, "--task", "translation", *BATCH),
    ):
        path = () if name == "fairseq-train" else ("--path", teacher)
        with pytest.raises(LskdError, match="is refused: its architecture is 'fconv'"):
            commands.call(name, *words, *path)
        assert not ran.exists(), name
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "s").glob("*.pt"))


BATCH = ("--max-tokens", "1000")


def test_validate_builds_no_criterion_beyond_those_it_knows(corpus, commands, forge, trap):
    def change(cfg):
        cfg["criterion"] = {"_name": "ctc", "wer_args": trap[1], "sentence_avg": False}
        cfg["task"]["eval_bleu"] = False

    words = ("fairseq-validate", corpus.data, "--cpu", "--path", forge(change), "--task", "translation")
    with pytest.raises(LskdError, match="is refused: its criterion is 'ctc'"):
        commands.call(*words, *BATCH)
    assert not trap[0].exists()


def test_a_run_that_goes_on_from_such_a_file_runs_nothing(corpus, commands, forge, tmp_path, trap):
    """Of --restore-file and --finetune-from-model fairseq builds nothing: their weights alone are taken."""
    bad = forge(architecture("fconv", encoder_layers=trap[1]), legacy=True)
    for number, option in enumerate(("--finetune-from-model", "--restore-file")):
        words = commands.training(
            *(corpus.data, tmp_path / str(number), "--criterion", "label_smoothed_cross_entropy"),
            *(option, bad, "--max-update", 1, "--reset-dataloader" if number else "--no-save"),
        )
        with contextlib.suppress(LskdError):
            commands.call(*words)
        assert not trap[0].exists()


def test_a_users_directory_of_the_file_is_not_imported(corpus, forge, tmp_path, trap):
    folder = tmp_path / "their_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text(trap[1])
    corpus.teach(forge(lambda cfg: cfg["common"].update(user_dir=str(folder))))
    assert not trap[0].exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"encoder_layers": 10**9}, "encoder_layers is 1e"),
        ({"encoder_embed_dim": 2**20, "decoder_embed_dim": 2**20}, r"its settings ask for [\d,]+ numbers"),
        ({"decoder_ffn_embed_dim": 10**9}, r"its settings ask for [\d,]+ numbers"),
        ({"max_source_positions": 10**9}, r"its settings ask for [\d,]+ numbers"),
        ({"encoder_layers": "six"}, "does not fit its own settings"),
        ({"encoder_layers": 2}, "does not fit its own settings"),
        ({"encoder_attention_heads": 0}, "does not fit its own settings"),
    ],
)
def test_settings_that_would_fill_the_memory(corpus, forge, settings, reason):
    teacher = forge(lambda cfg: vars(cfg["model"]).update(settings))
    with pytest.raises(LskdError, match=reason) as caught:
        corpus.teach(teacher)
    assert "\n" not in str(caught.value)


def test_a_file_that_pickles_a_call_is_told_what_fairseq_can_read(corpus, tmp_path):
    """Weights alone, or as safetensors, it cannot restore."""
    path = corpus.forge(tmp_path / "call.pt", lambda state: state["extra_state"].update(call=os.system))
    with pytest.raises(LskdError, match=r"system, and loading that would run .*; use one that fairseq"):
        corpus.teach(path)


def test_shapes_without_numbers_are_no_weights(corpus, tmp_path):
    """Or the network might be as large as they say."""

    def change(state):
        vars(state["cfg"]["model"]).update(decoder_ffn_embed_dim=10**7)
        state["model"]["decoder.none"] = torch.empty(10**6, 10**6, device="meta")

    with pytest.raises(LskdError, match=r"has the shape of 'decoder.none' and none of its numbers"):
        corpus.teach(corpus.forge(tmp_path / "meta.pt", change))


def test_a_file_of_old_fairseq_still_teaches(corpus, forge):
    teacher = corpus.teach(forge(lambda cfg: None, legacy=True))
    own = corpus.teach(corpus.teacher)
    for one, other in zip(teacher.models[0].parameters(), own.models[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "extra",
    [{"val_loss": "high"}, {"metrics": {"valid": [3]}}, {"val_loss": None, "metrics": {"valid": {"a": 1}}}],
)
def test_a_training_state_that_fairseq_does_not_write(corpus, tmp_path, extra):
    state = {"extra_state": extra | {"train_iterator": {"epoch": 1}}}
    teacher = corpus.forge(tmp_path / "t.pt", lambda content: content.update(state))
    with pytest.raises(LskdError, match="has a training state that fairseq does not write"):
        corpus.teach(teacher)


def test_embeddings_that_lay_elsewhere_are_not_read(corpus, forge):
    """All weights are in the checkpoint; `/dev/zero` would never end."""
    teacher = forge(lambda cfg: vars(cfg["model"]).update(encoder_embed_path="/dev/zero"))
    assert corpus.teach(teacher).models


def test_heads_for_classes_are_not_built():
    """They would be as large as the shapes of the file's tensors, which may have no content."""
    settings = Namespace(arch="mbart_large", load_checkpoint_heads=True)
    safe_loading.check_model(settings, "x.pt")
    assert not settings.load_checkpoint_heads


def test_words_of_the_task_before_are_not_made(corpus, tmp_path, caplog):
    """They would be as wide as a tensor's shape says, which may be of one number."""
    small = ("encoder_layers", "decoder_layers", "encoder_embed_dim", "decoder_embed_dim")

    def change(state):
        kept = {name: value for name, value in vars(state["cfg"]["model"]).items() if name in small}
        kept |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "share_all_embeddings": False}
        bart = {"_name": "mbart_large", "arch": "mbart_large", "task": "multilingual_denoising"}
        state["cfg"]["model"] = Namespace(**bart, **kept)
        wide = torch.zeros(1).expand(1, 10**6)
        state["model"] |= {f"{part}.embed_tokens.weight": wide for part in ("encoder", "decoder")}

    # Without the comparison of dictionaries, which fairseq's own commands do not have.
    with pytest.raises(LskdError, match="does not fit its own settings"):
        checkpoint_utils.load_model_ensemble_and_task(
            [str(corpus.forge(tmp_path / "wide.pt", change))], {"data": str(corpus.data), "eval_bleu": False}
        )
    assert "Adding extra language embeddings" not in caplog.text


def test_the_guard_is_in_place_before_fairseq_generate_loads(corpus, commands, forge, trap):
    bad = forge(architecture("fconv", encoder_layers=trap[1]))
    result = commands.run(
        *("fairseq-generate", corpus.data, "--user-dir", commands.plugin, "--path", bad, "--cpu"), check=False
    )
    assert result.status == 2
    assert "is refused: its architecture is 'fconv'" in result.error
    assert not trap[0].exists()


def test_what_the_classes_that_may_be_built_evaluate():
    """A new version of fairseq that evaluates another setting of them must not go unnoticed."""
    sources = [Path(inspect.getfile(kind)) for kind in safe_loading._MODELS]
    for package in (models.transformer, modules, encoders):
        sources += Path(inspect.getfile(package)).parent.rglob("*.py")
    for one in (quantization_utils, sequence_generator, fairseq_task, translation):
        sources.append(Path(inspect.getfile(one)))
    evaluated = set()
    for source in sources:
        text = source.read_text()
        evaluated |= set(re.findall(r"(?<![\w.])eval\(([^)]*)\)", text))
        evaluated |= set(re.findall(r"utils\.eval_\w+\(\s*(?:\w+\.)?(\w+)", text))
        assert not re.search(r"\b(exec\(|__import__|hydra\.utils)", text), source
    assert {name for name in evaluated if name not in safe_loading._EVALUATED} <= {"x"}
