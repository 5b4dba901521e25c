"""Real German-English text of the Ding dictionary (Debian's package trans-de-en): sentences and phrases."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.arguments import Output, Subwords
from lskd_study.data.folders.archives import fingerprint
from lskd_study.data.manifest import Made
from lskd_study.data.text.parallel import Pair, tokenizer, write_parallel

# Notes in any brackets, the inner ones first, and abbreviations between slashes.
_MARKERS = re.compile(r"\{[^{}|]*\}|\[[^][|]*\]|<[^<>|]*>|\([^()|]*\)|(?<!\S)/[^/|;]*/(?![^\s;])")
_LEFT = re.compile(
    r"[][{}()<>/]"
)  # alternatives (a/b), of which nobody can tell where they end; torn brackets
_PLACEHOLDER = re.compile(
    r"\b(?:je?m?d[mns]?|etw|sb|sth|so)\.|\.\.|…", re.IGNORECASE
)  # what entries speak of
_NESTED = 8  # levels of brackets; each takes a pass over the line
_SEED = 1
_LIMIT = 256 << 20  # bytes; the dictionary has 26 MB
_REPEATED = 2  # times that a whole sentence is in train, of which there is a sixth as many as phrases


def prepare_ding(
    file: Annotated[
        Path, typer.Option(help="The dictionary; Debian's package trans-de-en installs it there.")
    ] = Path("/usr/share/trans/de-en"),
    output: Output = Path("data/ding_de_en"),
    sentences_only: Annotated[bool, typer.Option(help="Train on whole sentences alone.")] = False,
    held_out: Annotated[int, typer.Option(help="Sentences in each of valid and test.")] = 1000,
    bpe_tokens: Subwords = 8_000,
) -> Made:
    """Write the German-English text of the Ding dictionary: sentences and phrases, with a fixed split.

    Valid and test are ``held_out`` whole sentences each. No sentence of theirs, German or English, is in
    another split: what shares one with them is left out. Train has every other sentence twice, and the
    phrases of two words or more on each side once. Notes in brackets are cut off; what holds an alternative
    (``a/b``) is left out.

    Raises:
        LskdError: a file that is missing or is no such dictionary, or an output that cannot be written.
    """
    if held_out < 1:
        raise LskdError(f"held-out sentences must be 1 or more, got {held_out}")
    fix = "apt install trans-de-en, or name the file with --file"

    def make() -> tuple[dict[str, list[Pair]], dict[str, Any]]:
        try:
            lines = read_bytes(file, _LIMIT, "the de-en file of the package trans-de-en", fix).decode()
        except UnicodeDecodeError:
            raise LskdError(
                f"{file} is not UTF-8 text; give the de-en file of the package trans-de-en"
            ) from None
        german, english = tokenizer("de"), tokenizer("en")
        # As they are written: two that differ in capitals are one, a sentence if either is.
        sentence: dict[Pair, bool] = {}
        for pair in dict.fromkeys(read_pairs(lines.splitlines())):
            if min(len(side.split()) for side in pair) >= 2:
                written = german(pair[0]), english(pair[1])
                sentence[written] = sentence.get(written, False) or is_sentence(pair)
        whole = [pair for pair, is_whole in sentence.items() if is_whole]
        phrases = [pair for pair, is_whole in sentence.items() if not is_whole]
        if len(whole) < 3 * held_out:
            raise LskdError(
                f"{file} has {len(whole)} whole sentences, too few for {held_out} in each of valid and test; "
                "give the de-en file of the package trans-de-en, or a smaller --held-out"
            )
        splits = _split([] if sentences_only else phrases, whole, held_out)
        more = {
            "source": "Ding dictionary, package trans-de-en",
            "phrases": len(phrases),
            "sentences": len(whole),
            "sentences_repeated": _REPEATED,
        }
        return splits, more

    kind = "sentences" if sentences_only else "all"
    return write_parallel(output, f"ding-3-{kind}-{held_out}", make, bpe_tokens, fingerprint(file, fix))


def read_pairs(lines: Iterable[str]) -> Iterator[Pair]:
    """Yield what translates to what: `a; b {f} | c :: d | e` gives (a, d) and (c, e).

    >>> list(read_pairs(["Aal {m} (Fisch; roh) [zool.]; Fluss-Aal {m} | Aale {pl} :: eel /E/; eels | eels"]))
    [('Aal', 'eel'), ('Aale', 'eels')]
    >>> list(read_pairs(["# comment", "im Urlaub :: on holiday/vacation"]))
    []
    """
    for line in lines:
        if line.startswith("#") or "::" not in line:
            continue
        german, english = (_without_markers(side).split("|") for side in line.split("::", 1))
        if len(german) != len(english):
            continue
        for sides in zip(german, english, strict=True):
            source, target = (" ".join(side.split(";")[0].replace("’", "'").split()) for side in sides)
            if source and target and not _LEFT.search(source + target):
                yield source, target


def _without_markers(text: str) -> str:
    for _ in range(_NESTED):
        text = _MARKERS.sub(" ", text)
    return text


def is_sentence(pair: Pair) -> bool:
    """Return whether both sides are whole sentences.

    They have three words or more, begin with a capital and end in . ! or ?. An entry that ends in "etw." is
    none.

    >>> is_sentence(("Das ist gut.", "That is good.")), is_sentence(("gut", "good"))
    (True, False)
    >>> is_sentence(("Beteiligung an etw.", "Participation in sth."))
    False
    """
    return all(
        side.endswith((".", "!", "?"))
        and len(side.split()) >= 3
        and next(filter(str.isalpha, side), "").isupper()
        and not _PLACEHOLDER.search(side)
        for side in pair
    )


def _split(phrases: Sequence[Pair], whole: Sequence[Pair], held_out: int) -> dict[str, list[Pair]]:
    order = list(whole)
    random.Random(_SEED).shuffle(order)
    parts: dict[str, list[Pair]] = {"valid": [], "test": []}
    taken: set[str] = set()
    for pair in order:
        part = "valid" if len(parts["valid"]) < held_out else "test"
        if len(parts[part]) == held_out:
            break
        if taken.isdisjoint(pair):  # the same German with two translations stays within one split
            parts[part].append(pair)
            taken.update(pair)
    rest = [*_REPEATED * list(whole), *phrases]
    return {"train": [pair for pair in rest if taken.isdisjoint(pair)], **parts}
