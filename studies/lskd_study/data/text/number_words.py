"""German and English words of numbers: a translation task for machines with no data at all."""

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from lskd import LskdError
from lskd_study.data.arguments import Output, Subwords
from lskd_study.data.manifest import Made
from lskd_study.data.text.parallel import Pair, write_parallel

LARGEST = 1_000_000


def prepare_number_words(
    output: Output = Path("data/number_words_de_en"),
    train: Annotated[int, typer.Option(help="Training pairs.")] = 20_000,
    valid: Annotated[int, typer.Option(help="Validation pairs.")] = 500,
    test: Annotated[int, typer.Option(help="Test pairs.")] = 500,
    bpe_tokens: Subwords = 200,
    seed: Annotated[int, typer.Option(help="Which numbers.")] = 1,
) -> Made:
    """Write numbers below a million in German and English words; needs no data at all.

    ``siebenhundertneun`` -> ``seven hundred and nine``: German writes one long word with units before tens,
    so that subwords and word order both matter. The numbers are distinct, none is in two splits.

    Raises:
        LskdError: for sizes that do not fit, or an output that cannot be written.
    """
    if min(train, valid, test) < 1 or train + valid + test > LARGEST:
        raise LskdError(f"train, valid and test must be 1 or more and {LARGEST} at most together")

    def make() -> tuple[dict[str, Sequence[Pair]], dict[str, Any]]:
        from num2words import num2words

        numbers = iter(random.Random(seed).sample(range(LARGEST), train + valid + test))

        def words(number: int, language: str) -> str:
            return str(num2words(number, lang=language)).replace(",", "").replace("-", " ")

        pairs = {
            split: [(words(number, "de"), words(number, "en")) for number in islice(numbers, size)]
            for split, size in (("train", train), ("valid", valid), ("test", test))
        }
        return dict(pairs), {"source": "num2words", "seed": seed}

    return write_parallel(output, f"number-words-{train}-{valid}-{test}-{seed}", make, bpe_tokens)
