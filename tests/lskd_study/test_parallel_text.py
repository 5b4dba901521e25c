"""Parallel text: number words, the Ding dictionary and IWSLT'14."""

import io
import json
import subprocess
import tarfile

import pytest

from lskd import LskdError
from lskd_study.cli.main import main
from lskd_study.data.text.ding import prepare_ding
from lskd_study.data.text.iwslt14 import prepare_iwslt14, segments
from lskd_study.data.text.number_words import prepare_number_words
from lskd_study.data.text.parallel import SPLITS, clean_pairs

pytestmark = pytest.mark.unit


def lines(folder, split, language):
    return (folder / f"{split}.{language}").read_text(encoding="utf-8").splitlines()


def joined(line):
    return line.replace("@@ ", "")


def test_number_words_are_disjoint_whole_and_repeatable(tmp_path):
    _, manifest, written = prepare_number_words(tmp_path / "a", 300, 30, 20, bpe_tokens=50)
    assert written
    assert manifest["pairs"] == {"train": 300, "valid": 30, "test": 20}
    assert prepare_number_words(tmp_path / "a", 300, 30, 20, bpe_tokens=50)[1:] == (manifest, False)
    again = prepare_number_words(tmp_path / "b", 300, 30, 20, bpe_tokens=50).manifest
    other = prepare_number_words(tmp_path / "c", 300, 30, 20, bpe_tokens=50, seed=2).manifest
    assert again["listing_sha256"] == manifest["listing_sha256"] != other["listing_sha256"]
    everything = [line for split in SPLITS for line in lines(tmp_path / "a", split, "en")]
    assert len(set(everything)) == 350
    for split in SPLITS:
        for language in ("de", "en"):
            words = lines(tmp_path / "a" / "words", split, language)
            assert [joined(line) for line in lines(tmp_path / "a", split, language)] == words
    assert any("@@" in line for line in lines(tmp_path / "a", "train", "de"))


def test_a_damaged_data_set_and_a_folder_of_something_else(tmp_path):
    prepare_number_words(tmp_path / "a", 30, 3, 2, bpe_tokens=0)
    (tmp_path / "a" / "train.de").write_text("eins\n")
    with pytest.raises(LskdError, match="exists and is not this data set"):
        prepare_number_words(tmp_path / "a", 30, 3, 2, bpe_tokens=0)
    with pytest.raises(LskdError, match="1 or more"):
        prepare_number_words(tmp_path / "b", 0, 3, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_subwords_are_learned_on_training_text_alone(tmp_path):
    """A word that only test has is spelled with the pieces of others."""
    dictionary = [f"Das ist Satz {i}. :: This is sentence {i}." for i in range(40)]
    dictionary += [
        f"Xylophonquartett {i} spielt laut. :: A xylophone quartet plays {i} times." for i in range(40)
    ]
    (tmp_path / "d").write_text("\n".join(dictionary), encoding="utf-8")
    prepare_ding(tmp_path / "d", tmp_path / "out", bpe_tokens=60, held_out=5)
    code = (tmp_path / "out" / "code").read_text()
    train = " ".join(
        lines(tmp_path / "out" / "words", "train", "de") + lines(tmp_path / "out" / "words", "train", "en")
    )
    for pair in code.splitlines()[1:]:
        assert pair.replace("</w>", "").replace(" ", "") in train


DING = """# Version
Aal {m} [zool.]; Flussaal {m} | Aale {pl} :: eel; common eel | eels
Haus {n} :: house
kaputt | zwei :: broken
Guten Tag! Wie geht es? :: Hello! How are you?
""" + "".join(f"Es kostet {i} Euro heute. <x> :: It costs {i} euros today. {{note}}\n" for i in range(30))


def test_ding_has_no_test_sentence_in_train(tmp_path):
    text = (
        DING
        + "Es kostet 3 Euro heute. :: That is 3 euros for you.\n"
        + "es kostet 4 Euro heute. :: a phrase\n"
    )
    (tmp_path / "de-en").write_text(text, encoding="utf-8")
    manifest = prepare_ding(tmp_path / "de-en", tmp_path / "out", bpe_tokens=30, held_out=9).manifest
    words = tmp_path / "out" / "words"
    held = {
        line
        for split in ("valid", "test")
        for language in ("de", "en")
        for line in lines(words, split, language)
    }
    for language in ("de", "en"):
        assert held.isdisjoint(lines(words, "train", language))
        assert set(lines(words, "valid", language)).isdisjoint(lines(words, "test", language))
    assert manifest["pairs"]["valid"] == manifest["pairs"]["test"] == 9
    assert ("aal", "eel") in zip(lines(words, "train", "de"), lines(words, "train", "en"), strict=True)
    assert not any(mark in line for line in held for mark in "{}<>")
    sentences = prepare_ding(
        tmp_path / "de-en", tmp_path / "s", sentences_only=True, bpe_tokens=30, held_out=9
    )
    assert sentences.manifest["pairs"]["train"] < manifest["pairs"]["train"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff\xfe\x00", "not UTF-8"), (DING.encode(), "too few for 1000")],
)
def test_ding_bad_input_is_one_line_through_the_command(tmp_path, capsys, content, message):
    file = tmp_path / "de-en"
    if content is not None:
        file.write_bytes(content)
    assert main(["data", "ding", "--file", str(file), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lskd: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def archive(path, missing=""):
    tags = "<url>http://x</url>\n<keywords>k</keywords>\n<title>Der Titel</title>\n"
    files = {}
    for language, word in (("de", "Wort"), ("en", "word")):
        body = "".join(f" {word} {i} , it's here .\n" for i in range(100))
        uneven = f"{word} " * (9 if language == "de" else 2) + "\n"
        files[f"de-en/train.tags.de-en.{language}"] = tags + body + uneven
        for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
            files[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = (
                f'<mteval>\n<doc>\n<seg id="1"> {name} It’s me. </seg>\n<seg id="2">Second</seg>\n</doc>'
            )
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            if missing not in name or not missing:
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_iwslt14_is_what_fairseqs_script_makes(tmp_path):
    manifest = prepare_iwslt14(archive(tmp_path / "de-en.tgz"), tmp_path / "out").manifest
    words = tmp_path / "out" / "words"
    # 100 sentences and a title; the uneven pair is longer than 1.5 times the other; every 23rd is valid.
    assert manifest["training_lines"] == 102
    assert manifest["pairs"] == {"train": 97, "valid": 4, "test": 10}
    assert manifest["sizes_as_expected"] is False
    assert lines(words, "train", "de")[0] == "der titel"
    assert lines(words, "train", "en")[1] == "word 0 , it &apos;s here ."
    assert lines(words, "valid", "en") == [f"word {i} , it &apos;s here ." for i in (21, 44, 67, 90)]
    assert lines(words, "test", "en")[0] == "ted.dev2010 it &apos;s me ."
    assert lines(words, "test", "de")[2].startswith("tedx.dev2012")


def test_iwslt14_bad_archives(tmp_path, capsys):
    (tmp_path / "no.tgz").write_bytes(b"hello")
    whole = archive(tmp_path / "whole.tgz").read_bytes()
    (tmp_path / "half.tgz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.tgz").write_bytes(whole[:-6])  # all texts are there, the checksum is not
    (tmp_path / "flipped.tgz").write_bytes(whole[:-8] + b"\0\0\0\0" + whole[-4:])
    with tarfile.open(tmp_path / "out.tgz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../escape"), io.BytesIO(b""))
    archive(tmp_path / "missing.tgz", "tst2011.de-en.de")
    for name, message in {
        "nowhere.tgz": "No such file",
        "no.tgz": "no tar archive",
        "half.tgz": "damaged or cut short",
        "cut.tgz": "damaged or cut short",
        "flipped.tgz": "damaged or cut short",
        "out.tgz": "leads out of it",
        "missing.tgz": "has no IWSLT14.TED.tst2011.de-en.de.xml",
    }.items():
        output = ["--output", str(tmp_path / "out")]
        assert main(["data", "iwslt14", "--archive", str(tmp_path / name), *output]) == 2
        error = capsys.readouterr().err
        assert message in error, name
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_command_says_what_comes_next_and_warns_of_other_sizes(tmp_path, capsys):
    output = tmp_path / "out"
    source = archive(tmp_path / "de-en.tgz")
    assert main(["data", "iwslt14", "--archive", str(source), "--output", str(output)]) == 0
    said = capsys.readouterr()
    assert "next: fairseq-preprocess -s de -t en" in said.out
    assert "160239" in said.err
    assert json.loads((output / "manifest.json").read_text())["expected"]["train"] == 160_239
    numbers = ["--train", "50", "--valid", "5", "--test", "5", "--output", str(tmp_path / "n")]
    assert main(["data", "number-words", *numbers]) == 0
    assert main(["data", "number-words", *numbers]) == 0
    assert "already there" in capsys.readouterr().out


def test_cleaning_is_moses():
    pairs = [("a b", "c d e"), ("a b", "c d e f"), ("", "c"), ("a " * 176, "a " * 176), ("  a   b ", "c d")]
    assert clean_pairs(pairs, 1.5, 1, 175) == [("a b", "c d e"), ("a b", "c d")]


def test_iwslt14_goes_on_where_a_segment_is_not_closed_on_its_line(tmp_path):
    """What `grep | sed` makes of it in fairseq's script: the rest of the line."""
    broken = '<seg id="1"> It’s me.\n</seg>\n<seg id="2">Second</seg> \n<seg id="x">odd</seg>'
    script = r"""grep '<seg id' "$1" | sed -e 's/<seg id="[0-9]*">\s*//g' -e 's/\s*<\/seg>\s*//g'"""
    (tmp_path / "x").write_text(broken + "\n", encoding="utf-8")
    done = subprocess.run(["bash", "-c", script, "-", tmp_path / "x"], capture_output=True, check=True)
    assert segments(broken) == done.stdout.decode().replace("’", "'").splitlines()


def test_iwslt14_with_unequal_evaluation_sets_is_one_line(tmp_path):
    file = archive(tmp_path / "de-en.tgz")
    with tarfile.open(file) as tar:
        texts = {member.name: tar.extractfile(member).read() for member in tar}
    texts["de-en/IWSLT14.TED.tst2010.de-en.de.xml"] += b'\n<seg id="3">mehr</seg>'
    with tarfile.open(file, "w:gz") as tar:
        for name, text in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    with pytest.raises(LskdError, match=r"TED.tst2010 has 3 German and 2 English sentences"):
        prepare_iwslt14(file, tmp_path / "out")


def test_text_is_already_there_only_from_the_same_source(tmp_path, capsys):
    """Another archive, or none, once got "already there" for an answer."""
    one, other = tmp_path / "one.tgz", tmp_path / "other.tgz"
    archive(one)
    other.write_bytes(archive(tmp_path / "x.tgz").read_bytes() + b"\0")
    for name in ("d1", "d2"):
        (tmp_path / name).write_text(DING + f"# {name}\n", encoding="utf-8")
    small = ["--held-out", "5", "--bpe-tokens", "30"]
    for words, first, second in (
        (["iwslt14", "--archive"], one, other),
        (["ding", *small, "--file"], tmp_path / "d1", tmp_path / "d2"),
    ):
        output = ["--output", str(tmp_path / words[0])]
        assert main(["data", *words, str(first), *output]) == 0
        assert main(["data", *words, str(first), *output]) == 0
        assert "already there" in capsys.readouterr().out
        for file, message in ((second, "was made with source_sha256"), (tmp_path / "none", "No such file")):
            assert main(["data", *words, str(file), *output]) == 2
            assert message in capsys.readouterr().err
