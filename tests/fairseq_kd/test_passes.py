"""The teacher's passes over a data-bin: soft labels, and its own translations."""

import re
from itertools import islice

import numpy as np
import pytest
import sacrebleu
import torch
from fairseq.data import Dictionary, data_utils

from fairseq_kd import passes, sequence_level
from fairseq_kd.teacher import Teacher
from fairseq_kd.translations import translate
from lskd import LskdError, SoftLabels, SoftLabelsWriter
from lskd.errors import DivergedError
from lskd.terms import top_k_log_probabilities

pytestmark = pytest.mark.integration


def test_soft_labels_are_what_the_teacher_says_sentence_by_sentence(corpus, store):
    """One by one, without padding: batches and windows must not matter."""
    labels = SoftLabels(store)
    labels.verify()
    teacher = corpus.teach(corpus.teacher)
    teacher.task.load_dataset("train", task_cfg=teacher.task.cfg)
    pairs = teacher.task.dataset("train")
    assert len(labels) == len(pairs) == 400
    for index in range(0, 400, 37):
        batch = pairs.collater([pairs[index]])
        values, ids = top_k_log_probabilities(teacher.logits(batch["net_input"])[0], 8)
        np.testing.assert_allclose(labels[index].values, values, atol=6e-3, rtol=1e-3)  # float16
        np.testing.assert_array_equal(labels[index].ids[:, 0], ids[:, 0])
    identity = labels.identity
    assert identity["teacher"]["architecture"] == "transformer"
    assert identity["teacher_bleu"] > 20
    assert set(identity["data"]) >= {"source_dictionary", "target_dictionary", "source_sentences"}


class OnACard(torch.Tensor):
    """What NumPy cannot read, as a tensor on a GPU."""

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_soft_labels_of_batches_on_a_card(corpus, commands, tmp_path, store, monkeypatch):
    """As far as a CPU can tell."""
    collated = passes.Pass._collated

    def on_a_card(self, indices):
        batch = collated(self, indices)
        return batch | {"id": batch["id"].as_subclass(OnACard)}

    monkeypatch.setattr(passes.Pass, "_collated", on_a_card)
    arguments = ("--path", corpus.teacher, "--output", tmp_path / "s", "--cpu", "--max-tokens", 300)
    commands.call("fairseq_kd.soft_labels", corpus.data, *arguments)
    same_values(tmp_path / "s", store)


def test_lskd_reads_and_verifies_them(commands, store):
    command = ["-m", "lskd_study", "soft-labels"]
    said = commands.run(*command, "info", store).output
    assert re.search(r"^written +complete: 400 samples, 1 epoch$", said, re.MULTILINE)
    assert re.search(r"^teacher.architecture +transformer$", said, re.MULTILINE)
    assert "all as they were written" in commands.run(*command, "verify", store).output


def test_unfinished_soft_labels_are_refused(corpus, commands, tmp_path, monkeypatch):
    windows = passes.windows
    monkeypatch.setattr(passes, "WINDOW", 50)
    monkeypatch.setattr(passes, "windows", lambda *given, **options: islice(windows(*given, **options), 2))
    arguments = (corpus.data, "--path", corpus.teacher, "--output", tmp_path / "s", "--cpu")
    commands.call("fairseq_kd.soft_labels", *arguments)
    assert len(SoftLabels(tmp_path / "s")) == 100
    with pytest.raises(LskdError, match="are unfinished"):
        commands.train(
            *(corpus.data, tmp_path / "t", "--task", "translation_ls_kd", "--kd-soft-labels", tmp_path / "s"),
            *("--criterion", "ls_kd", "--max-epoch", 1),
        )


def test_soft_labels_of_two_jobs_are_those_of_one(corpus, commands, tmp_path, store):
    arguments = (corpus.data, "--path", corpus.teacher, "--output", tmp_path / "s", "--cpu")
    for shard in ("2/2", "1/2"):
        commands.call("fairseq_kd.soft_labels", *arguments, "--shard", shard)
    said = commands.run("-m", "lskd_study", "soft-labels", "merge", tmp_path / "s").output
    assert "shard-* can be removed" in said
    same_values(tmp_path / "s", store)
    assert SoftLabels(tmp_path / "s").rows == SoftLabels(store).rows


def same_values(one, other):
    one, other = SoftLabels(one), SoftLabels(other)
    for index in range(400):
        np.testing.assert_allclose(one[index].values[:, :8], other[index].values, atol=6e-3, rtol=1e-3)


def test_sequence_level_trains_any_criterion_and_matches_generate(corpus, commands, tmp_path):
    arguments = ("--path", corpus.teacher, "--cpu", "--beam", 2)
    commands.call("fairseq_kd.sequence_level", corpus.data, "--output", tmp_path / "seq", *arguments)
    generated = commands.run(
        *("fairseq-generate", corpus.data, "--user-dir", commands.plugin, "--path", corpus.teacher, "--cpu"),
        *("--beam", 2, "--max-len-a", 1.2, "--max-len-b", 10, "--gen-subset", "train", "--max-tokens", 4096),
    )
    theirs = translated(generated)
    words = Dictionary.load(str(tmp_path / "seq" / "dict.en.txt"))
    ours, source, original = (
        data_utils.load_indexed_dataset(str(folder / f"train.de-en.{side}"), words)
        for folder, side in ((tmp_path / "seq", "en"), (tmp_path / "seq", "de"), (corpus.data, "de"))
    )
    agree = sum(words.string(ours[index]) == theirs[index] for index in range(400))
    assert agree >= 396  # other batches, other padding: a tie may fall the other way
    assert all(torch.equal(source[index], original[index]) for index in range(0, 400, 50))
    result = commands.train(
        tmp_path / "seq", tmp_path / "student", "--criterion", "cross_entropy", "--max-epoch", 1
    )
    assert result.numbers("valid")
    assert not list(tmp_path.glob(".seq*"))


def translated(generated):
    """Return what fairseq-generate printed, by sentence."""
    found = re.findall(r"^H-(\d+)\t[^\t\n]+\t(.*)", generated.output, re.MULTILINE)
    return {int(index): text for index, text in found}


def test_translations_have_the_bleu_that_the_checkpoint_was_chosen_by(corpus):
    found = translate(corpus.teacher, corpus.data, "valid")
    assert [line["id"] for line in found] == list(range(30))
    assert [line["source"] for line in found] == (corpus.text / "valid.de").read_text().splitlines()
    teacher = corpus.teach(corpus.teacher)
    # Of 30 sentences fairseq validates on 24: it leaves out a last batch that is no multiple of 8.
    teacher.task.load_dataset("valid", task_cfg=teacher.task.cfg)
    batches = teacher.task.get_batch_iterator(
        teacher.task.dataset("valid"), max_tokens=1000, required_batch_size_multiple=8, seed=3
    ).frozen_batches
    validated = [found[index] for batch in batches for index in batch]
    assert len(validated) == 24
    said, references = ([line[name] for line in validated] for name in ("hypothesis", "reference"))
    # fairseq rounds to two digits.
    assert sacrebleu.corpus_bleu(said, [references]).score == pytest.approx(teacher.bleu, abs=0.006)


def test_confidence_in_the_references_is_that_of_fairseqs_probabilities(corpus, monkeypatch):
    """One sentence at a time, by the model's own function; one is too long for the model."""
    fits = passes.Pass.fits
    monkeypatch.setattr(passes.Pass, "fits", lambda own, index: index != 3 and fits(own, index))
    found = translate(corpus.teacher, corpus.data)
    assert [found[3][name] for name in ("hypothesis", "confidence", "correct")] == ["", [], []]
    teacher = corpus.teach(corpus.teacher)
    asked = passes.Pass(teacher, "test", 1000, cpu=True)
    pad = teacher.task.target_dictionary.pad()
    assert any(batch["target"].eq(pad).any() for batch in asked.batches(range(len(asked.pairs))))
    pairs, (model,) = asked.pairs, teacher.models
    for line in found[:3] + found[4:]:
        batch = pairs.collater([pairs[line["id"]]])
        with torch.inference_mode():
            p = model.get_normalized_probs(model(**batch["net_input"]), log_probs=False)[0]
        np.testing.assert_allclose(line["confidence"], p.amax(-1), atol=2e-5)
        assert line["correct"] == (p.argmax(-1) == batch["target"][0]).int().tolist()


def test_logits_that_are_not_finite_name_the_sentence(corpus, monkeypatch):
    monkeypatch.setattr(Teacher, "logits", lambda own, given: own.models[0](**given)[0] + torch.inf)
    with pytest.raises(DivergedError, match=r"the logits of sentence \d+ are not all finite"):
        translate(corpus.teacher, corpus.data)


def test_translations_are_those_of_fairseq_generate(corpus, commands):
    words = ("fairseq-generate", corpus.data, "--user-dir", commands.plugin, "--path", corpus.teacher)
    search = ("--beam", 2, "--max-len-a", 1.2, "--max-len-b", 10, "--max-tokens", 1000, "--cpu")
    search += ("--required-batch-size-multiple", 1)  # or fairseq leaves out the last batch
    ours = {line["id"]: line["hypothesis_tokens"] for line in translate(corpus.teacher, corpus.data)}
    assert translated(commands.run(*words, *search)) == ours


def test_unknown_words_match_nothing(corpus, commands, tmp_path):
    """No word of this test set is in the teacher's dictionaries."""
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        for language in ("de", "en"):
            (text / f"{split}.{language}").write_text("xxx yyy\n")
    sides = (("src", "de"), ("tgt", "en"))
    dictionaries = [f"--{side}dict={corpus.data}/dict.{language}.txt" for side, language in sides]
    data = commands.preprocess(text, tmp_path / "bin", *dictionaries)
    (line,) = translate(corpus.teacher, data)
    assert line["reference"] == line["reference_tokens"] == "UNKNOWNTOKENINREF UNKNOWNTOKENINREF"
    assert "INREF" not in line["hypothesis"]


def test_a_window_has_a_bound_in_bytes(corpus, commands, tmp_path, store, monkeypatch):
    """All entries of the vocabulary, and a bound of about ten sentences: as many bytes are held, no more."""
    bound = 10 * 8 * 6 * corpus.classes
    monkeypatch.setattr(passes, "WINDOW_BYTES", bound)
    appended, append = [], SoftLabelsWriter.append

    def count(writer, values, ids, lengths):
        appended.append((8 * values.size, len(lengths)))
        append(writer, values, ids, lengths)

    monkeypatch.setattr(SoftLabelsWriter, "append", count)
    arguments = ("--path", corpus.teacher, "--top-k", corpus.classes, "--output", tmp_path / "s", "--cpu")
    commands.call("fairseq_kd.soft_labels", corpus.data, *arguments)
    assert sum(sentences for _, sentences in appended) == 400
    assert len(appended) > 20
    assert max(held for held, _ in appended) <= bound
    same_values(tmp_path / "s", store)


def test_windows_of_long_sentences(monkeypatch):
    class Pairs(list):
        tgt_sizes = property(np.array)

    pairs = Pairs([3, 5, 100, 2, 2, 2])
    assert list(passes.windows(pairs, 1)) == [range(1, 6)]
    of_ten = passes.WINDOW_BYTES // 10
    assert list(passes.windows(pairs, 0, of_ten)) == [range(2), range(2, 3), range(3, 6)]
    monkeypatch.setattr(passes, "WINDOW", 4)
    assert list(passes.windows(pairs)) == [range(4), range(4, 6)]


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_that_sequence_level_did_not_make_is_left_alone(tmp_path, kind):
    mine, scratch = tmp_path / "mine", tmp_path / ".seq-unfinished"
    mine.mkdir()
    (mine / "translations.txt").write_text("mine")
    mine = mine.rename(scratch) if kind == "folder" else mine
    if kind == "link":
        scratch.symlink_to(mine)
    with pytest.raises(LskdError, match="was not made by this command; move it away"):
        sequence_level._begin(scratch, None, None)
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"translations.txt": "mine"}


def test_sequence_level_goes_on_where_it_was_killed_before_it_began(tmp_path):
    """The note of what is begun has not taken its name yet."""
    scratch = tmp_path / ".seq-unfinished"
    scratch.mkdir()
    (scratch / ".sequence_level.json.lskd-0123abcd.new").write_text("{")
    with pytest.raises(AttributeError, match="task"):  # it asks who teaches
        sequence_level._begin(scratch, None, None)
