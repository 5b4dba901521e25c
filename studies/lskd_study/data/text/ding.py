"""Real German-English text of the Ding dictionary (Debian's package trans-de-en): sentences and phrases."""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lskd import LskdError
from lskd.base.files import read_bytes
from lskd_study.data.arguments import Output, Subwords
from lskd_study.data.folders.archives import fingerprint
from lskd_study.data.manifest import Made
from lskd_study.data.text.parallel import Pair, tokenizer, write_parallel

_MARKERS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|<[^>]*>")
_SEED = 1
_LIMIT = 256 << 20  # bytes; the dictionary has 20 MB


def prepare_ding(
    file: Annotated[
        Path, typer.Option(help="The dictionary; Debian's package trans-de-en installs it there.")
    ] = Path("/usr/share/trans/de-en"),
    output: Output = Path("data/ding_de_en"),
    sentences_only: Annotated[bool, typer.Option(help="Train on whole sentences alone.")] = False,
    held_out: Annotated[int, typer.Option(help="Sentences in each of valid and test.")] = 1000,
    bpe_tokens: Subwords = 10_000,
) -> Made:
    """Write the German-English text of the Ding dictionary: sentences and phrases, with a fixed split.

    Valid and test are ``held_out`` whole sentences each (three words or more, ending in . ! or ?). No
    sentence of theirs, German or English, is in train: what shares one with them is left out.

    Raises:
        LskdError: a file that is missing or is no such dictionary, or an output that cannot be written.
    """
    if held_out < 1:
        raise LskdError(f"held-out sentences must be 1 or more, got {held_out}")
    fix = "apt install trans-de-en, or name the file with --file"

    def make() -> tuple[dict[str, Sequence[Pair]], dict[str, Any]]:
        try:
            lines = read_bytes(file, _LIMIT, "the de-en file of the package trans-de-en", fix).decode()
        except UnicodeDecodeError:
            raise LskdError(
                f"{file} is not UTF-8 text; give the de-en file of the package trans-de-en"
            ) from None
        pairs = list(dict.fromkeys(read_pairs(lines.splitlines())))
        whole = [pair for pair in pairs if is_sentence(pair)]
        if len(whole) < 3 * held_out:
            raise LskdError(
                f"{file} has {len(whole)} whole sentences, too few for {held_out} in each of valid and test; "
                "give the de-en file of the package trans-de-en, or a smaller --held-out"
            )
        splits = _split(pairs, whole, sentences_only, held_out)
        german, english = tokenizer("de"), tokenizer("en")
        text = {split: [(german(a), english(b)) for a, b in part] for split, part in splits.items()}
        # Two that differed in capitals may be one now.
        seen = {side for split in ("valid", "test") for pair in text[split] for side in pair}
        train = [pair for pair in dict.fromkeys(text["train"]) if seen.isdisjoint(pair)]
        more = {
            "source": "Ding dictionary, package trans-de-en",
            "distinct_pairs": len(pairs),
            "sentences": len(whole),
        }
        return {"train": train, "valid": text["valid"], "test": text["test"]}, more

    kind = "sentences" if sentences_only else "all"
    return write_parallel(output, f"ding-{kind}-{held_out}", make, bpe_tokens, fingerprint(file, fix))


def read_pairs(lines: Sequence[str]) -> Iterator[Pair]:
    """Yield what translates to what: `a; b {f} | c :: d | e` gives (a, d) and (c, e).

    >>> list(read_pairs(["Aal {m} [zool.]; Fluss-Aal {m} | Aale {pl} :: eel; eels | eels", "# comment"]))
    [('Aal', 'eel'), ('Aale', 'eels')]
    """
    for line in lines:
        if line.startswith("#") or "::" not in line:
            continue
        german, english = line.split("::", 1)
        variants = german.split("|"), english.split("|")
        if len(variants[0]) != len(variants[1]):
            continue
        for sides in zip(*variants, strict=True):
            source, target = (" ".join(_MARKERS.sub(" ", side).split(";")[0].split()) for side in sides)
            if source and target:
                yield source, target


def is_sentence(pair: Pair) -> bool:
    """Return whether both sides are whole sentences of three words or more.

    >>> is_sentence(("Das ist gut.", "That is good.")), is_sentence(("gut", "good"))
    (True, False)
    """
    return all(side.endswith((".", "!", "?")) and len(side.split()) >= 3 for side in pair)


def _split(
    pairs: Sequence[Pair], whole: Sequence[Pair], sentences_only: bool, held_out: int
) -> dict[str, list[Pair]]:
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
    rest = whole if sentences_only else pairs
    return {"train": [pair for pair in rest if taken.isdisjoint(pair)], **parts}
