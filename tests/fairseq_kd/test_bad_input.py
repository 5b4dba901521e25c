"""What a user can get wrong is one line and exit status 2, before the first update."""

import shutil

import pytest
import torch

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
    result = commands.train(data, save, *arguments, "--max-epoch", 1, check=False)
    line = result.error
    assert result.status == 2
    assert not result.numbers("train_inner")
    assert not list(save.glob("*.pt"))
    return line


def test_teachers(corpus, commands, others, tmp_path):
    def attempt(teacher, data=corpus.data):
        return refused(commands, data, tmp_path / "s", "--criterion", "ls_kd", "--kd-teacher", teacher)

    assert "nothere.pt does not exist" in attempt(tmp_path / "nothere.pt")
    assert "has another dictionary" in attempt(corpus.teacher, others[0])
    assert "has another dictionary" in attempt(corpus.teacher, others[1])
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(corpus.teacher.read_bytes()[:5000])
    assert "is damaged or no checkpoint" in attempt(damaged)
    bare = tmp_path / "bare.pt"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, bare)
    assert "was not written by fairseq-train" in attempt(bare)


def test_a_teacher_of_another_dictionary_whose_data_is_gone(corpus, commands, others, tmp_path):
    """Then only what the teacher says tells."""
    moved = tmp_path / "moved"
    shutil.copytree(corpus.data, moved)
    commands.train(moved, tmp_path / "t", "--criterion", "label_smoothed_cross_entropy", "--max-epoch", 12)
    shutil.rmtree(moved)
    teacher = tmp_path / "t" / "checkpoint_best.pt"
    line = refused(commands, others[1], tmp_path / "s", "--criterion", "ls_kd", "--kd-teacher", teacher)
    assert "less than chance" in line


def test_a_teacher_that_does_not_translate(corpus, commands, tmp_path):
    import fairseq_kd  # noqa: F401 - allows fairseq's settings in torch's safe loader

    state = torch.load(corpus.teacher, weights_only=True)
    state["cfg"]["model"].encoder_layers = 2
    other = tmp_path / "other.pt"
    torch.save(state, other)
    line = refused(commands, corpus.data, tmp_path / "s", "--criterion", "ls_kd", "--kd-teacher", other)
    assert "does not fit its own settings" in line


def another(corpus, folder):
    """Return a teacher that differs in one weight."""
    import fairseq_kd  # noqa: F401 - allows fairseq's settings in torch's safe loader

    state = torch.load(corpus.teacher, weights_only=True)
    next(iter(state["model"].values())).view(-1)[0] += 1e-3
    torch.save(state, folder / "another.pt")
    return folder / "another.pt"


def test_stores(corpus, commands, others, tmp_path, store):
    def attempt(path, *arguments, data=corpus.data):
        task = ("--task", "translation_ls_kd", "--kd-soft-labels", path, "--criterion", "ls_kd")
        return refused(commands, data, tmp_path / "s", *task, *arguments)

    assert "holds no soft labels" in attempt(tmp_path / "nothing")
    assert "do not belong to this run: data." in attempt(store, data=others[1])
    assert "teacher.checksum is" in attempt(store, "--kd-teacher", another(corpus, tmp_path))
    assert "--kd-top-k is 9, the soft labels in" in attempt(store, "--kd-top-k", 9)
    assert "goes by validation BLEU; add --eval-bleu" in attempt(store, "--kd-alpha-schedule", "adaptive")
    assert "never by test" in attempt(
        store, "--kd-alpha-schedule", "threshold", "--valid-subset", "test", *commands.bleu
    )
    truncated = tmp_path / "truncated"
    shutil.copytree(store, truncated)
    with open(truncated / "rows.bin", "r+b") as file:
        file.truncate(1000)
    assert "is truncated" in attempt(truncated)


def test_commands_of_the_plugin(corpus, commands, others, tmp_path, store):
    def attempt(command, *arguments):
        result = commands.run(f"fairseq_kd.{command}", *arguments, "--cpu", check=False)
        assert result.status == 2
        return result.error

    teacher = ("--path", corpus.teacher)
    output = ("--output", tmp_path / "out")
    assert "--top-k is 99" in attempt("soft_labels", corpus.data, *teacher, *output, "--top-k", 99)
    assert "is not a folder" in attempt("soft_labels", tmp_path / "no", *teacher, *output)
    assert "subset 'dev' is not in" in attempt(
        "soft_labels", corpus.data, *teacher, *output, "--subset", "dev"
    )
    assert "does not exist" in attempt("soft_labels", corpus.data, "--path", tmp_path / "no.pt", *output)
    assert "has another dictionary" in attempt("soft_labels", others[1], *teacher, *output)
    other = ("--path", another(corpus, tmp_path))
    assert "teacher.checksum" in attempt("soft_labels", corpus.data, *other, "--output", store)
    assert not (tmp_path / "out").exists()
    assert "exists; choose another" in attempt("sequence_level", corpus.data, *teacher, "--output", store)
