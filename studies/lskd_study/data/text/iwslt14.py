"""IWSLT'14 German-English, as fairseq's prepare-iwslt14.sh makes it, in Python."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lskd import LskdError
from lskd_study.data.arguments import Output
from lskd_study.data.folders.archives import fingerprint, read_members
from lskd_study.data.manifest import Made
from lskd_study.data.text.parallel import LANGUAGES, Pair, clean_pairs, tokenizer, write_parallel

EXPECTED = {"train": 160_239, "valid": 7_283, "test": 6_750}
BPE_TOKENS = 10_000
# Files of a language, in the archive.
_TRAIN = "train.tags.de-en.{}"
_TEST = {
    name: f"IWSLT14.{name}.de-en.{{}}.xml"
    for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
}
_DROPPED = ("<url>", "<talkid>", "<keywords>")
_TAGS = re.compile(r"</?(?:title|description)>")
_SEGMENT = re.compile(r'<seg id="[0-9]*">\s*')
_SEGMENT_END = re.compile(r"\s*</seg>\s*")
_VALID_EVERY = 23


def prepare_iwslt14(
    archive: Annotated[Path, typer.Option(help="The publisher's de-en.tgz.")],
    output: Output = Path("data/iwslt14_de_en"),
) -> Made:
    """Write IWSLT'14 German-English as fairseq's prepare script does, with joint subwords.

    Every 23rd training line is valid, test is dev2010, TEDX.dev2012 and tst2010 to tst2012, the subwords are
    learned on the training text of both languages: nothing is chosen by test. The manifest says whether the
    numbers of pairs are the expected ones (160,239, 7,283 and 6,750).

    Raises:
        LskdError: a missing or other archive, or an output that cannot be written.
    """

    def make() -> tuple[dict[str, Sequence[Pair]], dict[str, Any]]:
        texts = _read(archive)
        tokenizers = {language: tokenizer(language) for language in LANGUAGES}

        def sides(cut: Callable[[str], list[str]], file: str) -> list[list[str]]:
            """Return the tokenised sentences in German and in English."""
            return [
                [tokenize(line) for line in cut(texts[file.format(language)])]
                for language, tokenize in tokenizers.items()
            ]

        german, english = sides(train_lines, _TRAIN)
        if len(german) != len(english):
            raise LskdError(f"{archive} has {len(german)} German and {len(english)} English training lines")
        cleaned = list(enumerate(clean_pairs(zip(german, english, strict=True), 1.5, 1, 175), 1))
        splits: dict[str, Sequence[Pair]] = {
            "train": [pair for number, pair in cleaned if number % _VALID_EVERY],
            "valid": [pair for number, pair in cleaned if not number % _VALID_EVERY],
        }
        test: list[Pair] = []
        for name, file in _TEST.items():
            lines = sides(segments, file)
            if len(lines[0]) != len(lines[1]):
                raise LskdError(
                    f"{archive}: {name} has {len(lines[0])} German and {len(lines[1])} English sentences; "
                    "get the archive again"
                )
            test += zip(*lines, strict=True)
        splits["test"] = test
        found = {split: len(pairs) for split, pairs in splits.items()}
        more = {"source": "IWSLT 2014, de-en.tgz", "training_lines": len(german), "expected": EXPECTED}
        return splits, more | {"sizes_as_expected": found == EXPECTED}

    fix = "give the publisher's de-en.tgz of IWSLT 2014"
    return write_parallel(output, "iwslt14", make, BPE_TOKENS, fingerprint(archive, fix))


def train_lines(text: str) -> list[str]:
    """Return the sentences of a `train.tags` file.

    >>> train_lines("<url>x</url>\\n<title>Ein Titel</title>\\n Das ist gut. \\n")
    ['Ein Titel', ' Das ist gut. ']
    """
    lines = text.removesuffix("\n").split("\n")
    return [_TAGS.sub("", line) for line in lines if not any(tag in line for tag in _DROPPED)]


def segments(text: str) -> list[str]:
    """Return the sentences of an evaluation set; a ``</seg>`` may stand on another line.

    >>> segments('<doc>\\n<seg id="1"> It’s me. </seg>\\n</doc>')
    ["It's me."]
    """
    lines = (line for line in text.split("\n") if "<seg id" in line)
    return [_SEGMENT_END.sub("", _SEGMENT.sub("", line)).replace("’", "'") for line in lines]


def _read(archive: Path) -> dict[str, str]:
    wanted = [file.format(language) for file in (_TRAIN, *_TEST.values()) for language in LANGUAGES]
    texts = {}
    for member in read_members(archive):
        name = member.name.rpartition("/")[2]
        if name in wanted:
            try:
                texts[name] = member.read().decode("utf-8")
            except UnicodeDecodeError:
                raise LskdError(f"{archive}: {name} is no text in UTF-8; get the archive again") from None
    if missing := [name for name in wanted if name not in texts]:
        raise LskdError(f"{archive} has no {missing[0]}; give the publisher's de-en.tgz of IWSLT 2014")
    return texts
