"""A distilling training step of fairseq against its label-smoothed cross-entropy, with batches made anew."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.models.transformer import TransformerConfig, TransformerModelBase

from fairseq_kd.criterion import LsKdCriterion
from fairseq_kd.settings import LsKdConfig
from fairseq_kd.task import SoftLabelledPairs, TranslationLsKdConfig, TranslationLsKdTask
from lskd import SoftLabels, SoftLabelsWriter
from lskd.soft_labels.format import SoftLabelsLayout
from lskd.terms import top_k_log_probabilities

VOCABULARY, SENTENCES, LENGTH, TOP_K = 10_000, 48, 24, 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A student, a teacher, sentences and their soft labels: random, of the vocabulary size of the paper."""
    torch.manual_seed(0)
    words = Dictionary()
    for number in range(VOCABULARY - len(words)):
        words.add_symbol(str(number))
    task = TranslationLsKdTask(TranslationLsKdConfig(kd_soft_labels="given below"), words, words)
    models = [_model(task), _model(task)]
    rows = [
        torch.cat([torch.randint(4, VOCABULARY, (LENGTH,)), torch.tensor([words.eos()])]) for _ in range(96)
    ]
    sizes = np.full(SENTENCES, LENGTH + 1)
    pairs = LanguagePairDataset(
        rows[:SENTENCES], sizes, words, rows[SENTENCES:], sizes, words, left_pad_target=False
    )
    folder = tmp_path_factory.mktemp("labels")
    layout = SoftLabelsLayout(VOCABULARY, TOP_K, SENTENCES)
    with SoftLabelsWriter(Path(folder) / "s", layout, {}) as writer:
        count = SENTENCES * (LENGTH + 1)
        values, ids = top_k_log_probabilities(torch.randn(count, VOCABULARY), TOP_K)
        writer.append(values.numpy(), ids.numpy(), [LENGTH + 1] * SENTENCES)
    return SimpleNamespace(
        task=task,
        student=models[0],
        teacher=models[1].eval().requires_grad_(False),
        pairs=pairs,
        labelled=SoftLabelledPairs(pairs, SoftLabels(Path(folder) / "s")),
    )


def _model(task: Any) -> torch.nn.Module:
    side = {"embed_dim": 256, "ffn_embed_dim": 512, "attention_heads": 4, "layers": 3}
    cfg = TransformerConfig.from_namespace(
        SimpleNamespace(share_decoder_input_output_embed=True, dropout=0.3)
    )
    for part in (cfg.encoder, cfg.decoder):
        for name, value in side.items():
            setattr(part, name, value)
    cfg.decoder.input_dim = cfg.decoder.output_dim = 256
    return TransformerModelBase.build_model(cfg, task)


def _step(work: SimpleNamespace, criterion: torch.nn.Module, pairs: Any) -> Callable[[], None]:
    criterion.train()
    work.student.train()

    def step() -> None:
        work.student.zero_grad()
        sample = pairs.collater([pairs[index] for index in range(SENTENCES)])
        criterion(work.student, sample)[0].backward()

    return step


def _distilling(work: SimpleNamespace, **flags: Any) -> LsKdCriterion:
    criterion = LsKdCriterion(LsKdConfig(sentence_avg=False, label_smoothing=0.1, **flags), work.task)
    criterion._ready = True
    return criterion


def test_stored_top_8_against_label_smoothed_cross_entropy(ratio, work):
    plain = LabelSmoothedCrossEntropyCriterion(work.task, False, 0.1)
    ratio(
        "fairseq step, stored top-8 / label_smoothed_cross_entropy",
        _step(work, _distilling(work), work.labelled),
        _step(work, plain, work.pairs),
        bar=1.05,
    )


def test_online_against_plain_and_a_forward(ratio, work):
    criterion = _distilling(work)
    criterion.teacher = SimpleNamespace(
        to=lambda like: None, logits=torch.inference_mode()(lambda net_input: work.teacher(**net_input)[0])
    )
    step = _step(work, LabelSmoothedCrossEntropyCriterion(work.task, False, 0.1), work.pairs)

    def peer() -> None:
        step()
        with torch.inference_mode():
            work.teacher(
                **work.pairs.collater([work.pairs[index] for index in range(SENTENCES)])["net_input"]
            )

    ratio(
        "fairseq step, online teacher / (label_smoothed_cross_entropy + a teacher's forward pass)",
        _step(work, criterion, work.pairs),
        peer,
        bar=1.05,
    )
