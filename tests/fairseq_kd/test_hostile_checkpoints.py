"""Checkpoints whose settings would run code, or fill the memory: strings and tensors, so torch reads them."""

import contextlib
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from lskd import LskdError

pytestmark = pytest.mark.integration

# Of what is not even one of fairseq's old files: a command line of a model that has settings of its own.
UNREADABLE = "was not written by fairseq-train"


@pytest.fixture
def trap(tmp_path):
    """Return a file, and Python that makes it."""
    return tmp_path / "ran", f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"


def forge(corpus, path, change, legacy=False):
    """Write the teacher with changed settings; as old fairseq did, in one flat namespace."""
    state = torch.load(corpus.teacher, weights_only=True)
    change(state["cfg"])
    if legacy:
        state["args"], state["cfg"] = Namespace(**vars(state["cfg"]["model"])), None
    torch.save(state, path)
    return path


def architecture(name, **settings):
    def change(cfg):
        vars(cfg["model"]).update(arch=name, _name=name, **settings)

    return change


def attacks(code):
    """Yield a change of the settings for each way of fairseq from a string to Python."""
    attention = {"encoder_attention": code, "decoder_attention": code}
    layers = {"encoder_layers": code, "decoder_layers": code}
    for name, settings in {
        "fconv": layers,
        "fconv_self_att": layers | attention | {"pretrained": code},
        "fconv_lm": layers,
        "lightconv_lm": {"adaptive_softmax_cutoff": code, "criterion": "adaptive_loss"},
        "transformer_lm": {"adaptive_softmax_cutoff": code, "criterion": "adaptive_loss"},
        "wav2vec": {"conv_feature_layers": code, "conv_aggregator_layers": code},
        "wav2vec2": {"conv_feature_layers": code},
        "hubert": {"conv_feature_layers": code},
        "transformer": {"adaptive_softmax_cutoff": code},
        "transformer_iwslt_de_en": {"encoder_xformers_att_config": code},
        "lstm": {"decoder_attention": code},
        "lightconv": {"adaptive_softmax_cutoff": code},
    }.items():
        yield name, architecture(name, **settings)

    def nested(cfg):
        cfg["model"] = {"_name": "transformer", "encoder": {"xformers_att_config": code}}

    def by_reference(cfg):
        cfg["common"]["tensorboard_logdir"] = code
        cfg["model"] = {"_name": "transformer", "adaptive_softmax_cutoff": "${common.tensorboard_logdir}"}

    def in_bytes(cfg):
        vars(cfg["model"]).update(arch="lstm", _name="lstm", decoder_attention=code.encode())

    def task(cfg):
        cfg["task"] = {"_name": "audio_pretraining", "data": "x", "post_save_script": code}

    def language(cfg):
        cfg["task"]["source_lang"] = f"de; {code}"

    def detokeniser(cfg):
        cfg["task"]["eval_bleu_detok"] = "os.system"

    yield from {
        "nested": nested,
        "reference": by_reference,
        "bytes": in_bytes,
        "task": task,
        "language": language,
        "detokeniser": detokeniser,
    }.items()


def test_no_setting_of_a_checkpoint_is_run(corpus, tmp_path, trap):
    ran, code = trap
    for name, change in attacks(code):
        for legacy in (False, True) if name not in ("nested", "reference") else (False,):
            teacher = forge(corpus, tmp_path / "bad.pt", change, legacy)
            if legacy and name in ("task", "language", "detokeniser"):
                continue  # changes of sections that one flat namespace does not have
            with pytest.raises(LskdError, match=f"is refused: its |{UNREADABLE}") as caught:
                corpus.teach(teacher)
            assert "\n" not in str(caught.value), name
            assert not ran.exists(), name


def test_every_route_asks_first(corpus, commands, tmp_path, trap):
    """The plugin's commands and fairseq's own, each with a file that would run code."""
    ran, code = trap
    bad = forge(corpus, tmp_path / "bad.pt", architecture("fconv", encoder_layers=code))
    old = forge(corpus, tmp_path / "old.pt", architecture("fconv", encoder_layers=code), legacy=True)
    output = ("--output", tmp_path / "out", "--cpu")
    shared = (corpus.data, "--cpu", "--user-dir", commands.plugin)
    for teacher in (bad, old):
        teach = commands.training(
            corpus.data, tmp_path / "s", "--criterion", "ls_kd", "--kd-teacher", teacher
        )
        for name, words in (
            ("fairseq_kd.soft_labels", (corpus.data, "--path", teacher, *output)),
            ("fairseq_kd.sequence_level", (corpus.data, "--path", teacher, *output)),
            ("fairseq-train", (*teach[1:], "--max-update", 1)),
            ("fairseq-generate", (*shared, "--path", teacher)),
            ("fairseq-interactive", (*shared, "--path", teacher)),
            ("fairseq-validate", (*shared, "--path", teacher, "--task", "translation", *BATCH)),
        ):
            with pytest.raises(LskdError, match="is refused: its architecture is 'fconv'"):
                commands.call(name, *words)
            assert not ran.exists(), name
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "s").glob("*.pt"))


BATCH = ("--max-tokens", "1000")


def test_validate_builds_no_criterion_beyond_those_it_knows(corpus, commands, tmp_path, trap):
    def change(cfg):
        cfg["criterion"] = {"_name": "ctc", "wer_args": trap[1], "sentence_avg": False}
        cfg["task"]["eval_bleu"] = False

    bad = forge(corpus, tmp_path / "bad.pt", change)
    with pytest.raises(LskdError, match="is refused: its criterion is 'ctc'"):
        commands.call(
            "fairseq-validate", corpus.data, "--cpu", "--path", bad, "--task", "translation", *BATCH
        )
    assert not trap[0].exists()


def test_a_run_that_goes_on_from_such_a_file_runs_nothing(corpus, commands, tmp_path, trap):
    """Of --restore-file and --finetune-from-model fairseq builds nothing: their weights alone are taken."""
    bad = forge(corpus, tmp_path / "bad.pt", architecture("fconv", encoder_layers=trap[1]), legacy=True)
    for number, option in enumerate(("--finetune-from-model", "--restore-file")):
        words = commands.training(
            *(corpus.data, tmp_path / str(number), "--criterion", "label_smoothed_cross_entropy"),
            *(option, bad, "--max-update", 1, "--reset-dataloader" if number else "--no-save"),
        )
        with contextlib.suppress(LskdError):
            commands.call("fairseq-train", *words[1:])
        assert not trap[0].exists()


def test_a_users_directory_of_the_file_is_not_imported(corpus, tmp_path, trap):
    folder = tmp_path / "their_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text(trap[1])
    teacher = forge(corpus, tmp_path / "t.pt", lambda cfg: cfg["common"].update(user_dir=str(folder)))
    corpus.teach(teacher)
    assert not trap[0].exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"encoder_layers": 10**9}, "encoder_layers is 1e"),
        ({"encoder_embed_dim": 2**20, "decoder_embed_dim": 2**20}, r"its settings ask for [\d,]+ numbers"),
        ({"decoder_ffn_embed_dim": 10**9}, r"its settings ask for [\d,]+ numbers"),
        ({"max_source_positions": 10**9}, r"its settings ask for [\d,]+ numbers"),
        ({"encoder_layers": "six"}, "does not fit its own settings"),
        ({"encoder_attention_heads": 0}, "does not fit its own settings"),
    ],
)
def test_settings_that_would_fill_the_memory(corpus, tmp_path, settings, reason):
    def change(cfg):
        vars(cfg["model"]).update(settings)

    with pytest.raises(LskdError, match=reason) as caught:
        corpus.teach(forge(corpus, tmp_path / "t.pt", change))
    assert "\n" not in str(caught.value)


def test_a_file_of_old_fairseq_still_teaches(corpus, tmp_path):
    teacher = corpus.teach(forge(corpus, tmp_path / "t.pt", lambda cfg: None, legacy=True))
    own = corpus.teach(corpus.teacher)
    for one, other in zip(teacher.models[0].parameters(), own.models[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "extra",
    [{"val_loss": "high"}, {"metrics": {"valid": [3]}}, {"val_loss": None, "metrics": {"valid": {"a": 1}}}],
)
def test_a_training_state_that_fairseq_does_not_write(corpus, tmp_path, extra):
    state = torch.load(corpus.teacher, weights_only=True)
    state["extra_state"] = extra | {"train_iterator": {"epoch": 1}}
    torch.save(state, tmp_path / "t.pt")
    with pytest.raises(LskdError, match="has a training state that fairseq does not write"):
        corpus.teach(tmp_path / "t.pt")


def test_embeddings_that_lay_elsewhere_are_not_read(corpus, tmp_path):
    """All weights are in the checkpoint; `/dev/zero` would never end."""

    def change(cfg):
        cfg["model"].encoder_embed_path = "/dev/zero"

    assert corpus.teach(forge(corpus, tmp_path / "t.pt", change)).models


def test_the_guard_is_in_place_before_fairseq_generate_loads(corpus, commands, tmp_path, trap):
    bad = forge(corpus, tmp_path / "bad.pt", architecture("fconv", encoder_layers=trap[1]))
    result = commands.run(
        *("fairseq-generate", corpus.data, "--user-dir", commands.plugin, "--path", bad, "--cpu"), check=False
    )
    assert result.status == 2
    assert "is refused: its architecture is 'fconv'" in result.error
    assert not trap[0].exists()


def test_what_the_classes_that_may_be_built_evaluate():
    """A new version of fairseq that evaluates another setting of them must not go unnoticed."""
    import inspect

    import fairseq.modules
    from fairseq import models, quantization_utils, sequence_generator
    from fairseq.data import encoders
    from fairseq.tasks import fairseq_task, translation

    from fairseq_kd import safe_loading

    sources = [Path(inspect.getfile(kind)) for kind in safe_loading._MODELS]
    sources += list(Path(inspect.getfile(models.transformer)).parent.glob("*.py"))
    for package in (fairseq.modules, encoders):
        sources += Path(inspect.getfile(package)).parent.rglob("*.py")
    sources += [
        Path(inspect.getfile(one))
        for one in (quantization_utils, sequence_generator, fairseq_task, translation)
    ]
    evaluated = set()
    for source in sources:
        text = source.read_text()
        evaluated |= set(re.findall(r"(?<![\w.])eval\(([^)]*)\)", text))
        evaluated |= set(re.findall(r"utils\.eval_\w+\(\s*(?:\w+\.)?(\w+)", text))
        assert not re.search(r"\b(exec\(|__import__|hydra\.utils)", text), source
    assert {name for name in evaluated if name not in safe_loading._EVALUATED} <= {"x"}
