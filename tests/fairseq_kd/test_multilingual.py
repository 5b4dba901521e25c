"""Two language pairs, a teacher of each, and a student of both: what Tan et al. distil."""

import random
from types import SimpleNamespace

import pytest
import torch
from fairseq import options, tasks
from num2words import num2words

from fairseq_kd.criterion import LsKdCriterion
from fairseq_kd.settings import LsKdConfig
from lskd import LskdError

pytestmark = pytest.mark.integration

LANGUAGES = ("de", "en", "fr")
MULTI = ("--langs", ",".join(LANGUAGES), "--encoder-langtok", "src", "--sampling-method", "concat")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, commands):
    """Return a data-bin of numbers, letters to words, with one dictionary, and a teacher of each pair."""
    root = tmp_path_factory.mktemp("pairs")
    numbers = random.Random(0).sample(range(1000), 330)
    parts = {"train": numbers[:300], "valid": numbers[300:315], "test": numbers[315:]}
    entries = set()
    for split, part in parts.items():
        for language in LANGUAGES:
            words = [num2words(number, lang=language).replace("-", " ") for number in part]
            lines = [word if language == "en" else " ".join(word.replace(" ", "_")) for word in words]
            (root / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
            entries |= {word for line in lines for word in line.split()}
    dictionary = root / "words.txt"
    dictionary.write_text("".join(f"{word} 1\n" for word in sorted(entries)), encoding="utf-8")
    for source in ("de", "fr"):
        commands.call(
            *("fairseq-preprocess", "-s", source, "-t", "en", "--workers", 1, "--destdir", root / "bin"),
            *("--trainpref", root / "train", "--validpref", root / "valid", "--testpref", root / "test"),
            *("--srcdict", dictionary, "--tgtdict", dictionary),
        )
    teachers = {}
    for source in ("de", "fr"):
        save = root / source
        task = ("--task", "translation_multi_simple_epoch", *MULTI, "--lang-pairs", f"{source}-en")
        commands.train(root / "bin", save, *task, "--criterion", "cross_entropy", "--max-epoch", 3)
        teachers[f"{source}-en"] = save / "checkpoint_best.pt"
    student = ("--task", "translation_multi_ls_kd", *MULTI, "--lang-pairs", "de-en,fr-en")
    named = ",".join(f"{pair}={path}" for pair, path in teachers.items())
    kd = (*student, "--criterion", "ls_kd", "--kd-teacher", named)
    return SimpleNamespace(data=root / "bin", teachers=teachers, named=named, student=student, kd=kd)


def made(pairs, commands, *flags, **settings):
    """Return a task, a student without dropout, its criterion, and a batch of both pairs."""
    words = commands.training(pairs.data, "/nowhere", *pairs.student, *flags)
    args = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words[1:]])
    task = tasks.setup_task(args)
    torch.manual_seed(0)
    student = task.build_model(args).eval()  # first: it has the limits of the sentences' lengths
    task.load_dataset("train")
    student.training = True  # without dropout
    settings = {"kd_teacher": pairs.named, "label_smoothing": 0.0, "sentence_avg": False} | settings
    criterion = LsKdCriterion.build_criterion(LsKdConfig(**settings), task)
    dataset = task.dataset("train")
    return (
        task,
        student,
        criterion,
        dataset.collater([dataset[index] for index in (0, 299, 300, 599, 5, 450)]),
    )


@pytest.mark.parametrize(
    ("named", "weight", "shares"),
    [("fr-en=0.3", 0.8, (0.8, 0.3)), ("de-en=0.9", 0.0, (0.9, 0.0))],
    ids=["both", "one"],
)
def test_every_sentence_has_the_teacher_and_the_weight_of_its_pair(pairs, commands, named, weight, shares):
    """A mixed batch's loss, from its definition in float64; a pair of no share needs no teacher."""
    if not all(shares):
        pairs = SimpleNamespace(**{**vars(pairs), "named": f"de-en={pairs.teachers['de-en']}"})
    flags = ("--kd-pair-weights", named)
    task, student, criterion, sample = made(pairs, commands, *flags, kd_weight=weight)
    criterion.train()
    loss, _, log = criterion(student, sample)
    loss.backward()
    assert any(parameter.grad is not None for parameter in student.parameters())
    numbers = sample["id"] % 2
    assert sorted(numbers.tolist()) == [0, 0, 0, 1, 1, 1]
    german = task.source_dictionary.index("__de__")
    assert ((sample["net_input"]["src_tokens"] == german).any(1) == (numbers == 0)).all()
    logs = student(**sample["net_input"])[0].detach().double().log_softmax(-1)
    target = sample["target"]
    counts = target != task.target_dictionary.pad()
    expected, share, taught_tokens = 0.0, 0.0, 0
    for number, (pair, own_share) in enumerate(zip(("de-en", "fr-en"), shares, strict=True)):
        own = counts & (numbers == number).unsqueeze(-1)
        hard = -logs.gather(-1, target.unsqueeze(-1)).squeeze(-1)[own].sum()
        expected += float((1 - own_share) * hard)
        if own_share:
            with torch.no_grad():
                taught = criterion.pair_teachers[pair].models[0](**sample["net_input"])[0]
            soft = -(taught.double().softmax(-1) * logs).sum(-1)[own].sum()
            expected += float(own_share * soft)
            taught_tokens += int(own.sum())
        share += own_share * int(own.sum())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert float(log["kd_weight"]) == pytest.approx(share)
    assert int(log["kd_tokens"]) == taught_tokens


def test_a_language_token_in_the_place_of_the_end(pairs, commands):
    """fairseq collates such batches pair by pair, to one length."""
    task, _, _, sample = made(pairs, commands, "--lang-tok-replacing-bos-eos", kd_weight=0.0)
    assert {pair: len(rows) for pair, rows in task.by_pair(sample)} == {"de-en": 3, "fr-en": 3}


def test_a_student_of_two_pairs_trains_and_goes_on(pairs, commands, tmp_path):
    result = commands.train(pairs.data, tmp_path / "s", *pairs.kd, "--kd-preset", "tan2019", "--max-epoch", 2)
    rows = result.numbers("train")
    assert rows[1]["train_kd_kl"] < rows[0]["train_kd_kl"]
    more = commands.train(pairs.data, tmp_path / "s", *pairs.kd, "--kd-preset", "tan2019", "--max-epoch", 3)
    assert more.numbers("train")[-1]["train_kd_kl"] < rows[1]["train_kd_kl"]
    model = torch.load(tmp_path / "s" / "checkpoint_last.pt", weights_only=True)["model"]
    teacher = torch.load(pairs.teachers["de-en"], weights_only=True)["model"]
    assert model.keys() == teacher.keys()
    said = commands.run(
        *("fairseq-generate", pairs.data, "--user-dir", commands.plugin, "--cpu", "--max-tokens", 1000),
        *("--task", "translation_multi_simple_epoch", *MULTI, "--lang-pairs", "de-en,fr-en"),
        *("-s", "fr", "-t", "en", "--path", tmp_path / "s" / "checkpoint_last.pt"),
    )
    assert "Generate test with beam=5: BLEU4 = " in said.output


def test_what_cannot_be_is_one_line(pairs, commands, corpus, tmp_path):
    def attempt(*arguments):
        with pytest.raises(LskdError) as caught:
            commands.call(*commands.training(pairs.data, tmp_path / "s", *arguments, "--max-epoch", 1))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.rglob("*.pt"))
        return str(caught.value)

    german, french = pairs.teachers.values()
    kd = (*pairs.student, "--criterion", "ls_kd")
    assert "needs --kd-teacher de-en=FILE" in attempt(*kd)
    assert "names none for fr-en" in attempt(*kd, "--kd-teacher", f"de-en={german}")
    assert "--kd-teacher has 'es-en=x'" in attempt(*kd, "--kd-teacher", "es-en=x")
    swapped = f"de-en={french},fr-en={german}"
    assert "was trained on fr-en, not on de-en" in attempt(*kd, "--kd-teacher", swapped)
    other = f"de-en={german},fr-en={corpus.teacher}"
    assert "does not fit its own settings or this data" in attempt(*kd, "--kd-teacher", other)
    assert "--kd-pair-weights has de-en=2" in attempt(*pairs.kd, "--kd-pair-weights", "de-en=2")
    unnumbered = ("--extra-lang-pairs", "{'mined': 'fr-de'}")
    assert "--extra-lang-pairs has fr-de" in attempt(*pairs.kd, *unnumbered)
    unasked = ("--kd-weight", 0, "--kd-pair-weights", "de-en=0.9")
    assert "needs --kd-teacher de-en=FILE" in attempt(*kd, *unasked)
    assert "has no --kd-alpha-schedule" in attempt(*pairs.kd, "--kd-alpha-schedule", "adaptive")
    assert "has no --kd-on-policy" in attempt(*pairs.kd, "--kd-on-policy", 0.5)
    words = [("tgt" if word == "src" else word) for word in pairs.kd]
    assert "was trained with --encoder-langtok src, the student has tgt" in attempt(*words)
