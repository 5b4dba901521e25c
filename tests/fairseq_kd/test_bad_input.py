"""What a user can get wrong is one line and exit status 2, before the first update."""

import math
import shutil

import pytest
import torch

from lskd import LskdError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def others(corpus, commands):
    """Return a data-bin with a dictionary of another size, and one with the same entries in another order."""
    root = corpus.root
    commands.write_numbers(root / "few", {"train": range(30), "valid": range(30, 40), "test": range(40, 50)})
    smaller = commands.preprocess(root / "few", root / "few-bin")
    lines = (corpus.data / "dict.en.txt").read_text().splitlines()
    (root / "dict.en.txt").write_text("\n".join(reversed(lines)) + "\n")
    reordered = commands.preprocess(
        *(corpus.text, root / "reordered", "--tgtdict", root / "dict.en.txt"),
        *("--srcdict", corpus.data / "dict.de.txt"),
    )
    return smaller, reordered


def refused(commands, data, save, *arguments):
    """Return the one line; nothing was trained and nothing written."""
    with pytest.raises(LskdError) as caught:
        commands.call(*commands.training(data, save, *arguments, "--max-epoch", 1))
    assert not list(save.glob("*.pt"))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_line_is_all_that_stderr_has(corpus, commands, tmp_path):
    teacher = ("--criterion", "ls_kd", "--kd-teacher", tmp_path / "nothere.pt")
    result = commands.run(*commands.training(corpus.data, tmp_path / "s", *teacher), check=False)
    assert result.status == 2
    assert "nothere.pt does not exist" in result.error
    assert not result.numbers("train_inner")


def test_teachers(corpus, commands, others, tmp_path):
    def attempt(teacher, data=corpus.data):
        return refused(commands, data, tmp_path / "s", "--criterion", "ls_kd", "--kd-teacher", teacher)

    assert "has another dictionary" in attempt(corpus.teacher, others[0])
    assert "has another dictionary" in attempt(corpus.teacher, others[1])
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"no checkpoint")
    assert "is damaged or no checkpoint" in attempt(damaged)
    bare = tmp_path / "bare.pt"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, bare)
    assert "was not written by fairseq-train" in attempt(bare)


@pytest.fixture
def another(corpus, tmp_path):
    """Return a teacher that differs in one weight."""

    def change(state):
        next(iter(state["model"].values())).view(-1)[0] += 1e-3

    return corpus.forge(tmp_path / "another.pt", change)


def test_stores(corpus, commands, others, another, tmp_path, store):
    def attempt(path, *arguments, data=corpus.data):
        task = ("--task", "translation_ls_kd", "--kd-soft-labels", path, "--criterion", "ls_kd")
        return refused(commands, data, tmp_path / "s", *task, *arguments)

    assert "contains no soft labels" in attempt(tmp_path / "nothing")
    assert "do not belong to this run: data." in attempt(store, data=others[1])
    assert "teacher.checksum is" in attempt(store, "--kd-teacher", another)
    for own in (("--kd-divergence", "reverse"), ("--kd-on-policy", 0.5)):
        assert "give --kd-teacher in the place of --kd-soft-labels" in attempt(store, *own)
    assert "--kd-top-k is 9, the soft labels in" in attempt(store, "--kd-top-k", 9)
    assert "goes by validation BLEU; add --eval-bleu" in attempt(store, "--kd-alpha-schedule", "adaptive")
    assert "never by test" in attempt(
        store, "--kd-alpha-schedule", "threshold", "--valid-subset", "test", *commands.bleu
    )
    line = attempt(store, "--criterion", "label_smoothed_cross_entropy")
    assert "--kd-soft-labels is for --criterion ls_kd, and the criterion is LabelSmoothed" in line
    truncated = tmp_path / "truncated"
    shutil.copytree(store, truncated)
    with open(truncated / "rows.bin", "r+b") as file:
        file.truncate(1000)
    assert "is truncated" in attempt(truncated)


def test_sentences_that_are_too_long_for_the_teacher(corpus, commands, tmp_path):
    """One is among the first, which the teacher tries. Sinusoidal positions have no end."""
    lengths = [len(line.split()) + 1 for line in (corpus.text / "train.de").read_text().splitlines()]
    limit = max(lengths[:16]) - 1
    limits = ("--max-source-positions", limit, "--max-target-positions", limit)
    limits += ("--skip-invalid-size-inputs-valid-test",)
    learnt = ("--encoder-learned-pos", "--decoder-learned-pos")
    plain = ("--criterion", "cross_entropy", "--max-epoch", 1)
    for name, positions in (("learnt", learnt), ("sinusoidal", ())):
        commands.train(corpus.data, tmp_path / name, *plain, *limits, *positions)
    teacher, labels = tmp_path / "learnt" / "checkpoint_best.pt", tmp_path / "labels"
    commands.call("fairseq_kd.soft_labels", corpus.data, "--path", teacher, "--output", labels, "--cpu")
    online = ("--criterion", "ls_kd", "--kd-teacher", teacher)
    stored = ("--criterion", "ls_kd", "--task", "translation_ls_kd", "--kd-soft-labels", labels)
    unread = sum(length > limit for length in lengths)
    for asked in (online, stored):
        line = refused(commands, corpus.data, tmp_path / "s", *asked)
        assert line.startswith(f"{unread} training sentences ")
        assert line.endswith(f"leave them out: --max-source-positions {limit} --max-target-positions {limit}")
    for name, asked in (
        ("a", (*online, *limits)),
        ("b", (*stored, *limits)),
        ("c", (*online, "--kd-teacher", tmp_path / "sinusoidal")),
    ):
        every = ("--required-batch-size-multiple", 1, "--max-epoch", 1)
        assert commands.train(corpus.data, tmp_path / name, *asked, *every).numbers("train")


def test_commands_of_the_plugin(corpus, commands, others, another, tmp_path, store):
    def attempt(command, *arguments):
        with pytest.raises(LskdError) as caught:
            commands.call(f"fairseq_kd.{command}", *arguments, "--cpu")
        return str(caught.value)

    teacher = ("--path", corpus.teacher)
    output = ("--output", tmp_path / "out")
    assert "--top-k is 99" in attempt("soft_labels", corpus.data, *teacher, *output, "--top-k", 99)
    assert "is not a folder" in attempt("soft_labels", tmp_path / "no", *teacher, *output)
    dev = attempt("soft_labels", corpus.data, *teacher, *output, "--subset", "dev")
    assert "subset 'dev' is not in" in dev
    assert "does not exist" in attempt("soft_labels", corpus.data, "--path", tmp_path / "no.pt", *output)
    assert "has another dictionary" in attempt("soft_labels", others[1], *teacher, *output)
    assert "teacher.checksum" in attempt("soft_labels", corpus.data, "--path", another, "--output", store)
    assert not (tmp_path / "out").exists()
    assert "exists; choose another" in attempt("sequence_level", corpus.data, *teacher, "--output", store)


def taught_otherwise(corpus, path, order, record, temperature=1.0):
    """Write the teacher as if its target words had another order, and its data-bin were gone.

    With a temperature it is never far from chance, as a smoothed teacher.
    """

    def change(state):
        state["cfg"]["task"]["data"] = "/nowhere"
        state["extra_state"] = {"train_iterator": {"epoch": 1}, **record}
        model = state["model"]
        for name, divisor in (("output_projection", temperature), ("embed_tokens", 1)):
            model[f"decoder.{name}.weight"] = model[f"decoder.{name}.weight"][order] / divisor

    return corpus.forge(path, change)


def nll(corpus, path):
    """Return nats a token of a teacher on the first sentences."""
    teacher = corpus.teach(path)
    teacher.task.load_dataset("train", task_cfg=teacher.task.cfg)
    pairs = teacher.task.dataset("train")
    batch = pairs.collater([pairs[index] for index in range(16)])
    mask = batch["target"] != teacher.task.target_dictionary.pad()
    logits = teacher.logits(batch["net_input"])[mask]
    return teacher, pairs, float(torch.nn.functional.cross_entropy(logits, batch["target"][mask]))


def test_a_dictionary_of_the_same_size_by_what_the_checkpoint_records(corpus, tmp_path, caplog):
    """Its data-bin is gone; neighbours swapped, and all shuffled, of a teacher that is near chance."""
    same = torch.arange(corpus.classes)
    swapped = torch.cat([same[:4], same[4:].view(-1, 2).flip(-1).flatten()])
    swap = torch.randperm(corpus.classes - 4, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([same[:4], 4 + swap])

    def teacher_of(order, record, temperature=3.0):
        return nll(corpus, taught_otherwise(corpus, tmp_path / "t.pt", order, record, temperature))

    *_, own = teacher_of(same, {})
    chance = math.log(corpus.classes)
    assert chance / 4 < own < chance
    meter = (10, "nll_loss", "AverageMeter", {"sum": 3 * own / math.log(2), "count": 3})
    for record, recorded in (
        ({}, None),
        ({"fairseq_kd": {"valid_nll": own}}, own),
        ({"val_loss": own / math.log(2)}, None),  # which is BLEU of this teacher
        ({"metrics": {"valid": [meter]}}, own),
    ):
        teacher, pairs, _ = teacher_of(same, record)
        assert teacher.recorded == [None if recorded is None else pytest.approx(recorded)], record
        with caplog.at_level("INFO", logger="fairseq_kd.teacher"):
            teacher.check_sense(pairs)
        assert "its dictionaries cannot be compared: it has no checksums of them" in caplog.text
        assert ("its checkpoint records" in caplog.text) == (recorded is not None)
        caplog.clear()
        for order in (swapped, shuffled):
            teacher, pairs, loss = teacher_of(order, record)
            assert loss < chance + 1  # so that nothing but the record tells
            if recorded is not None:
                with pytest.raises(LskdError, match="makes no sense of this data"):
                    teacher.check_sense(pairs)
    teacher, pairs, _ = teacher_of(shuffled, {}, temperature=1.0)
    with pytest.raises(LskdError, match="makes no sense of this data"):  # worse than guessing
        teacher.check_sense(pairs)


def test_a_dictionary_of_the_same_size_by_its_checksum(corpus, tmp_path):
    own = torch.load(corpus.teacher, weights_only=True)["extra_state"]["fairseq_kd"]["dictionaries"]
    same, other = (
        taught_otherwise(corpus, tmp_path / name, torch.arange(corpus.classes), {"fairseq_kd": record})
        for name, record in (
            ("same.pt", {"dictionaries": own}),
            ("other.pt", {"dictionaries": own | {"target": own["source"]}}),
        )
    )
    assert corpus.teach(same).checked == ["its dictionaries have the checksums of these"]
    with pytest.raises(LskdError, match="has another dictionary, by the checksum of target"):
        corpus.teach(other)
