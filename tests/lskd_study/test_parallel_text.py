"""Parallel text: number words, the Ding dictionary and IWSLT'14."""

import json
import subprocess
from collections import Counter

import pytest

from archives import pack
from lskd import LskdError
from lskd_study.cli.main import main
from lskd_study.data.text.ding import prepare_ding, read_pairs
from lskd_study.data.text.iwslt14 import prepare_iwslt14, segments
from lskd_study.data.text.number_words import prepare_number_words
from lskd_study.data.text.parallel import TEXT_SPLITS, clean_pairs

pytestmark = pytest.mark.unit


def lines(folder, split, language):
    return (folder / f"{split}.{language}").read_text(encoding="utf-8").splitlines()


def run(*words, status=0):
    assert main(["data", *map(str, words)]) == status


def refused(capsys, *words):
    """Return the one line on stderr."""
    capsys.readouterr()
    run(*words, status=2)
    error = capsys.readouterr().err
    assert error.startswith("lskd: error: ")
    assert error.count("\n") == 1
    return error


def test_number_words_are_disjoint_whole_and_repeatable(tmp_path):
    _, manifest, written = prepare_number_words(tmp_path / "a", 300, 30, 20, bpe_tokens=50)
    assert written
    assert manifest["pairs"] == {"train": 300, "valid": 30, "test": 20}
    assert prepare_number_words(tmp_path / "a", 300, 30, 20, bpe_tokens=50)[1:] == (manifest, False)
    again = prepare_number_words(tmp_path / "b", 300, 30, 20, bpe_tokens=50).manifest
    other = prepare_number_words(tmp_path / "c", 300, 30, 20, bpe_tokens=50, seed=2).manifest
    assert again["listing_sha256"] == manifest["listing_sha256"] != other["listing_sha256"]
    everything = [line for split in TEXT_SPLITS for line in lines(tmp_path / "a", split, "en")]
    assert len(set(everything)) == 350
    for split in TEXT_SPLITS:
        for language in ("de", "en"):
            words = lines(tmp_path / "a" / "words", split, language)
            assert [line.replace("@@ ", "") for line in lines(tmp_path / "a", split, language)] == words
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
    dictionary += [f"Xylophonquartett {i} spielt laut. :: A xylophone quartet plays {i}." for i in range(40)]
    (tmp_path / "d").write_text("\n".join(dictionary), encoding="utf-8")
    prepare_ding(tmp_path / "d", tmp_path / "out", bpe_tokens=60, held_out=5)
    words = tmp_path / "out" / "words"
    train = " ".join(lines(words, "train", "de") + lines(words, "train", "en"))
    for pair in (tmp_path / "out" / "code").read_text().splitlines()[1:]:
        assert pair.replace("</w>", "").replace(" ", "") in train


DING = """# Version
Aal {m} [zool.]; Flussaal {m} | grüne Aale {pl} (frisch; roh) :: eel; common eel | green eels /GE/
Haus {n} :: house
kaputt | zwei :: broken
Guten Tag! Wie geht es? :: Hello! How are you?
im Urlaub :: on holiday/vacation
Er ist im Urlaub. :: He is on holiday / vacation.
Große Beteiligung an etw. :: Large participation in sth.
das ist gut so. :: that is a good thing.
ein Rand (zerrissen; rest :: an edge
""" + "".join(f"Es kostet {i} Euro heute. <x> :: It costs {i} euros today. {{note}}\n" for i in range(30))


def test_ding_trains_on_phrases_and_sentences_and_tests_on_sentences(tmp_path):
    text = "Es kostet 3 Euro heute. :: That is 3 euros for you.\nes kostet 4 Euro heute. :: a phrase of it\n"
    (tmp_path / "de-en").write_text(DING + text, encoding="utf-8")
    manifest = prepare_ding(tmp_path / "de-en", tmp_path / "out", bpe_tokens=30, held_out=9).manifest
    words = tmp_path / "out" / "words"
    pairs = {
        split: list(zip(lines(words, split, "de"), lines(words, split, "en"), strict=True))
        for split in TEXT_SPLITS
    }
    held = {line for split in ("valid", "test") for pair in pairs[split] for line in pair}
    assert held.isdisjoint(line for pair in pairs["train"] for line in pair)
    assert {line for pair in pairs["valid"] for line in pair}.isdisjoint(
        line for pair in pairs["test"] for line in pair
    )
    assert manifest["pairs"]["valid"] == manifest["pairs"]["test"] == 9
    assert all(german.startswith(("es kostet", "guten tag")) for german in (p[0] for p in pairs["test"]))
    # One word, alternatives and torn brackets are left out; entries are phrases.
    once = {("grüne aale", "green eels"), ("große beteiligung an etw .", "large participation in sth .")}
    once.add(("das ist gut so .", "that is a good thing ."))
    counts = Counter(pairs["train"])
    phrases = {pair for pair, count in counts.items() if count == 1}
    assert once <= phrases <= once | {("es kostet 4 euro heute .", "a phrase of it")}
    assert manifest["sentences"] == 32
    assert all(
        count == 2 and pair[1].startswith(("it", "hello", "that"))
        for pair, count in counts.items()
        if pair not in phrases
    )
    sentences = prepare_ding(
        tmp_path / "de-en", tmp_path / "s", sentences_only=True, bpe_tokens=30, held_out=9
    )
    assert sentences.manifest["pairs"]["train"] == counts.total() - len(phrases)


def test_ding_pairs_that_differ_in_capitals_are_one(tmp_path):
    """A sentence is in train twice and in one split only, however often the dictionary has it."""
    text = "".join(f"Er sieht Baum {i}. :: He sees tree {i}.\n" for i in range(30))
    text += text.replace("sieht Baum", "Sieht baum") + text.replace("Er", "er").replace("He", "he")
    text += "im Urlaub :: on holiday\nIm Urlaub :: On holiday\n"
    (tmp_path / "de-en").write_text(text, encoding="utf-8")
    manifest = prepare_ding(tmp_path / "de-en", tmp_path / "out", bpe_tokens=0, held_out=9).manifest
    assert (manifest["sentences"], manifest["phrases"]) == (30, 1)
    counts = {split: Counter(lines(tmp_path / "out", split, "de")) for split in TEXT_SPLITS}
    assert len(counts["valid"] | counts["test"]) == 18
    assert sorted(counts["train"].values()) == [1, *[2] * 12]


def test_ding_brackets_in_brackets():
    for deep, found in ((8, [("der Aal", "an eel")]), (200_000, [])):
        assert list(read_pairs([f"der Aal {'(' * deep}{')' * deep} :: an eel"])) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff\xfe\x00", "not UTF-8"), (DING.encode(), "too few for 1000")],
)
def test_ding_bad_input_is_one_line_through_the_command(tmp_path, capsys, content, message):
    file = tmp_path / "de-en"
    if content is not None:
        file.write_bytes(content)
    assert message in refused(capsys, "ding", "--file", file, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def iwslt14():
    """Return the publisher's files, in small."""
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
    return {name: text.encode() for name, text in files.items()}


def test_iwslt14_is_what_fairseqs_script_makes(tmp_path):
    manifest = prepare_iwslt14(pack(tmp_path / "de-en.tgz", iwslt14()), tmp_path / "out").manifest
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
    files = iwslt14()
    whole = pack(tmp_path / "whole.tgz", files).read_bytes()
    for name, content in {
        "no": b"hello",
        "half": whole[: len(whole) // 2],
        "cut": whole[:-6],  # all texts are there, the checksum is not
        "flipped": whole[:-8] + b"\0\0\0\0" + whole[-4:],
    }.items():
        (tmp_path / f"{name}.tgz").write_bytes(content)
    pack(tmp_path / "out.tgz", {"../../escape": b""})
    uneven = "de-en/IWSLT14.TED.tst2010.de-en.de.xml"
    pack(tmp_path / "uneven.tgz", files | {uneven: files[uneven] + b'\n<seg id="3">mehr</seg>'})
    del files["de-en/IWSLT14.TED.tst2011.de-en.de.xml"]
    pack(tmp_path / "missing.tgz", files)
    for name, message in {
        "nowhere": "No such file",
        "no": "no tar archive",
        "half": "damaged or cut short",
        "cut": "damaged or cut short",
        "flipped": "damaged or cut short",
        "out": "leads out of it",
        "uneven": "TED.tst2010 has 3 German and 2 English sentences",
        "missing": "has no IWSLT14.TED.tst2011.de-en.de.xml",
    }.items():
        words = ("iwslt14", "--archive", tmp_path / f"{name}.tgz", "--output", tmp_path / "output")
        assert message in refused(capsys, *words), name
        assert not (tmp_path / "output").exists()


def test_the_command_says_what_comes_next_and_warns_of_other_sizes(tmp_path, capsys):
    run("iwslt14", "--archive", pack(tmp_path / "de-en.tgz", iwslt14()), "--output", tmp_path / "out")
    said = capsys.readouterr()
    assert "next: fairseq-preprocess -s de -t en" in said.out
    assert "160239" in said.err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["expected"]["train"] == 160_239


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


def test_text_is_already_there_only_from_the_same_source(tmp_path, capsys):
    """Another archive, or none, once got "already there" for an answer."""
    one, other = (pack(tmp_path / name, iwslt14()) for name in ("one.tgz", "other.tgz"))
    other.write_bytes(other.read_bytes() + b"\0")
    for name in ("d1", "d2"):
        (tmp_path / name).write_text(DING + f"# {name}\n", encoding="utf-8")
    small = ["--held-out", "5", "--bpe-tokens", "30"]
    for words, first, second in (
        (["iwslt14", "--archive"], one, other),
        (["ding", *small, "--file"], tmp_path / "d1", tmp_path / "d2"),
    ):
        output = ("--output", tmp_path / words[0])
        for said in ("written", "already there"):
            run(*words, first, *output)
            assert said in capsys.readouterr().out
        assert "was made with source_sha256" in refused(capsys, *words, second, *output)
        assert "No such file" in refused(capsys, *words, tmp_path / "none", *output)
