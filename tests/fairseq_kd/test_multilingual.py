"""Two language pairs, a teacher of each, and a student of both: what Tan et al. distil."""

import random
import re
import signal
import time
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from num2words import num2words

from fairseq_kd.criterion import LsKdCriterion
from fairseq_kd.settings import LsKdConfig
from lskd import LskdError

pytestmark = pytest.mark.integration

LANGUAGES = ("de", "en", "fr")
MULTI = ("--langs", ",".join(LANGUAGES), "--encoder-langtok", "src", "--sampling-method", "concat")
LSTM = [
    *("--arch", "lstm", "--encoder-embed-dim", 32, "--decoder-embed-dim", 32, "--decoder-out-embed-dim", 32),
    *("--encoder-hidden-size", 32, "--decoder-hidden-size", 32),
]
ALL = ("--required-batch-size-multiple", 1)  # or fairseq leaves out the last batch


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
    return with_teachers(commands, root / "bin", root, 3)


@pytest.fixture(scope="module")
def lstms(pairs, tmp_path_factory, commands):
    """Return the same data-bin with LSTMs as teachers."""
    return with_teachers(commands, pairs.data, tmp_path_factory.mktemp("lstms"), 1, shape=LSTM)


def with_teachers(commands, data, folder, epochs, *flags, **shape):
    teachers = {}
    for source in ("de", "fr"):
        task = ("--task", "translation_multi_simple_epoch", *MULTI, "--lang-pairs", f"{source}-en")
        task += ("--criterion", "cross_entropy", "--max-epoch", epochs, *flags)
        commands.train(data, folder / source, *task, **shape)
        teachers[f"{source}-en"] = folder / source / "checkpoint_best.pt"
    student = ("--task", "translation_multi_ls_kd", *MULTI, "--lang-pairs", "de-en,fr-en")
    named = ",".join(f"{pair}={path}" for pair, path in teachers.items())
    kd = (*student, "--criterion", "ls_kd", "--kd-teacher", named)
    return SimpleNamespace(data=data, teachers=teachers, named=named, student=student, kd=kd)


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
    ("kind", "named", "weight", "shares"),
    [
        ("pairs", "fr-en=0.3", 0.8, (0.8, 0.3)),
        ("pairs", "de-en=0.9", 0.0, (0.9, 0.0)),
        ("lstms", "fr-en=0.3", 0.8, (0.8, 0.3)),
    ],
    ids=["both", "one", "lstms"],
)
def test_every_sentence_has_the_teacher_and_the_weight_of_its_pair(
    request, commands, kind, named, weight, shares
):
    """A mixed batch's loss, from its definition in float64; a pair of no share needs no teacher."""
    pairs = request.getfixturevalue(kind)
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


def test_lstms_teach_learn_and_translate(lstms, commands, tmp_path):
    """A batch's longest source is often of another pair than what is read."""
    schedule = ("--kd-alpha-schedule", "adaptive", *commands.bleu[:3], "--max-epoch", 1, *ALL)
    result = commands.train(lstms.data, tmp_path, *lstms.kd, *schedule, shape=LSTM)
    assert {"valid_bleu_de-en", "valid_bleu_fr-en_teacher"} <= result.numbers("valid")[0].keys()


def test_what_the_teacher_of_a_pair_cannot_read(pairs, commands, tmp_path):
    limit = ("--max-source-positions", 24, "--skip-invalid-size-inputs-valid-test", *ALL)
    learnt = with_teachers(commands, pairs.data, tmp_path, 1, "--encoder-learned-pos", *limit)
    student = (pairs.data, tmp_path / "s", *learnt.kd, "--max-update", 1)
    with pytest.raises(LskdError, match=r" too long for the teacher .*/de/.* --max-source-positions 24 "):
        commands.train(*student)
    assert commands.train(*student, *limit).numbers("train")


def test_a_language_token_in_the_place_of_the_end(pairs, commands):
    """fairseq collates such batches pair by pair, to one length."""
    task, _, _, sample = made(pairs, commands, "--lang-tok-replacing-bos-eos", kd_weight=0.0)
    assert {pair: len(rows) for pair, rows in task.by_pair(sample)} == {"de-en": 3, "fr-en": 3}


def test_each_pair_has_a_schedule_of_its_own_that_survives_an_end(pairs, commands, tmp_path):
    """Weaker teachers than the student becomes, so that it passes them and the weights fall."""
    flags = (*pairs.kd, "--kd-preset", "tan2019", "--kd-pair-weights", "fr-en=0.5", *commands.bleu[:3])
    flags += ("--kd-alpha-schedule", "adaptive", "--kd-alpha-interval", 1, "--max-epoch", 5, *ALL)
    whole = commands.train(pairs.data, tmp_path / "whole", *flags)
    rows, valid = whole.numbers("train"), whole.numbers("valid")
    assert rows[1]["train_kd_kl"] < rows[0]["train_kd_kl"]
    for pair, weight in (("de-en", 0.9), ("fr-en", 0.5)):
        teacher = valid[0][f"valid_bleu_{pair}_teacher"]
        passed = [row[f"valid_bleu_{pair}"] - teacher for row in valid]
        expected = [weight, *(weight * 0.5 ** max(points + 2, 0) for points in passed[:-1])]
        assert [row[f"train_kd_weight_{pair}"] for row in rows] == pytest.approx(expected, abs=2e-3)
        assert expected[-1] < weight
        assert len([row for row in valid if f"valid_bleu_{pair}_teacher" in row]) == 1
    process = commands.start_training(pairs.data, tmp_path / "parts", *flags)
    while not (tmp_path / "parts" / "checkpoint_last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    parts = commands.train(pairs.data, tmp_path / "parts", *flags)
    again = parts.numbers("train")
    assert 0 < len(again) < 5
    for name in ("train_loss", "train_kd_weight", "train_kd_weight_de-en", "train_kd_weight_fr-en"):
        assert [row[name] for row in again] == [row[name] for row in rows[-len(again) :]], name
    assert not any("bleu_de-en_teacher" in name for row in parts.numbers("valid") for name in row)
    model = torch.load(tmp_path / "whole" / "checkpoint_last.pt", weights_only=True)["model"]
    assert model.keys() == torch.load(pairs.teachers["de-en"], weights_only=True)["model"].keys()
    assert bleu_of_generate(pairs, commands, tmp_path / "whole", MULTI, "fr") == pytest.approx(
        valid[-1]["valid_bleu_fr-en"], abs=0.006
    )


def bleu_of_generate(pairs, commands, save, form, source):
    """Return sacrebleu of what fairseq-generate prints of the validation set."""
    said = commands.run(
        *("fairseq-generate", pairs.data, "--user-dir", commands.plugin, "--cpu", "--max-tokens", 1000),
        *("--task", "translation_multi_simple_epoch", *form, "--lang-pairs", "de-en,fr-en", *ALL),
        *("-s", source, "-t", "en", "--path", save / "checkpoint_last.pt", "--gen-subset", "valid"),
        *("--beam", 2, "--max-len-a", 1.2, "--max-len-b", 10),
    ).output
    lines = [dict(re.findall(rf"^{kind}-(\d+)\t(?:\S+\t)?(.*)", said, re.MULTILINE)) for kind in "DT"]
    assert len(lines[1]) == 15
    hypotheses, references = ([texts[key] for key in sorted(lines[1])] for texts in lines)
    return sacrebleu.corpus_bleu(hypotheses, [references]).score


def test_an_mbart_teaches_a_student_of_its_sentence_form(pairs, commands, tmp_path):
    """In the only task in which this fairseq trains one for translation."""
    form = (*MULTI, "--decoder-langtok", "--lang-tok-style", "mbart")
    task = ("--task", "translation_multi_simple_epoch", *form, "--lang-pairs", "de-en")
    mbart = ("--arch", "mbart_large", "--criterion", "cross_entropy", "--max-epoch", 3)
    commands.train(pairs.data, tmp_path / "t", *task, *mbart)
    kd = ("--criterion", "ls_kd", "--kd-teacher", f"de-en={tmp_path / 't' / 'checkpoint_best.pt'}")
    kd += ("--kd-pair-weights", "fr-en=0", "--lang-pairs", "de-en,fr-en", "--task", "translation_multi_ls_kd")
    kd += ("--max-epoch", 2, *commands.bleu[:3], *ALL)
    result = commands.train(pairs.data, tmp_path / "s", *kd, *form)
    first, last = result.numbers("train")
    assert last["train_kd_kl"] < first["train_kd_kl"]
    assert bleu_of_generate(pairs, commands, tmp_path / "s", form, "fr") == pytest.approx(
        result.numbers("valid")[-1]["valid_bleu_fr-en"], abs=0.006
    )
    # The teacher decodes in the first validation, and goes on to teach as if it had not.
    schedule = ("--kd-alpha-schedule", "adaptive", "--kd-alpha-interval", 50)
    measured = commands.train(pairs.data, tmp_path / "m", *kd, *form, *schedule)
    assert "valid_bleu_de-en_teacher" in measured.numbers("valid")[0]
    assert [row["train_loss"] for row in measured.numbers("train")] == [
        first["train_loss"],
        last["train_loss"],
    ]
    with pytest.raises(LskdError, match="was trained with --decoder-langtok True, the student has False"):
        commands.train(pairs.data, tmp_path / "u", *kd, *MULTI)


@pytest.mark.parametrize("several", [True, False])
def test_an_mbart_reads_the_same_before_and_after_it_decodes(pairs, commands, several):
    """Of fairseq's generator its attention would keep the beam."""
    flags = ("--arch", "mbart_large", *commands.bleu[:3])
    if several:
        task, student, criterion, sample = made(pairs, commands, *flags, kd_weight=0.0)
    else:
        task = ("--task", "translation_ls_kd", "-s", "de", "-t", "en")
        words = commands.training(pairs.data, "/nowhere", *task, *flags)
        args = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words[1:]])
        cfg = convert_namespace_to_omegaconf(args)
        task = tasks.setup_task(cfg.task)
        student = task.build_model(cfg.model).eval()
        task.load_dataset("valid")
        criterion = LsKdCriterion.build_criterion(LsKdConfig(kd_weight=0.0, sentence_avg=False), task)
        valid = task.dataset("valid")
        sample = valid.collater([valid[index] for index in range(6)])
    alone = {name: part[:1] for name, part in sample["net_input"].items()}
    before = student(**sample["net_input"])[0]
    losses = [float(task.valid_step(sample, student, criterion)[0]) for _ in range(2)]
    assert losses[0] == losses[1]
    after = student(**sample["net_input"])[0]
    assert torch.equal(before, after)
    torch.testing.assert_close(student(**alone)[0], after[:1], atol=1e-5, rtol=1e-4)


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
    assert "was trained on no --lang-pairs, not on fr-en" in attempt(*kd, "--kd-teacher", other)
    assert "--kd-pair-weights has de-en=2" in attempt(*pairs.kd, "--kd-pair-weights", "de-en=2")
    unheeded = (*pairs.student, "--criterion", "cross_entropy", "--kd-pair-weights", "fr-en=0.5")
    assert "--kd-pair-weights is for --criterion ls_kd" in attempt(*unheeded)
    unnumbered = ("--extra-lang-pairs", "{'mined': 'fr-de'}")
    assert "--extra-lang-pairs has fr-de" in attempt(*pairs.kd, *unnumbered)
    unasked = ("--kd-weight", 0, "--kd-pair-weights", "de-en=0.9")
    assert "needs --kd-teacher de-en=FILE" in attempt(*kd, *unasked)
    schedule = (*pairs.kd, "--kd-alpha-schedule", "adaptive")
    assert "goes by validation BLEU; add --eval-bleu" in attempt(*schedule)
    assert "never by test" in attempt(*schedule, "--eval-bleu", "--valid-subset", "test")
    assert "leave out --kd-teacher-bleu" in attempt(*schedule, "--eval-bleu", "--kd-teacher-bleu", 30)
    assert "is no JSON object" in attempt(*schedule, "--eval-bleu", "--eval-bleu-args", "beam=2")
    assert "has no --kd-on-policy" in attempt(*pairs.kd, "--kd-on-policy", 0.5)
    words = [("tgt" if word == "src" else word) for word in pairs.kd]
    assert "was trained with --encoder-langtok src, the student has tgt" in attempt(*words)
