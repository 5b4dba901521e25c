"""What the publishers of the data sets ship: numbers of images, checksums, where to get it.

The numbers of images are those of the paper's Table 5 where it prints them (errata E24, E25 for Places-LT and
the two long-tailed validation lists), else the publishers'.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lskd import LskdError

Numbers = dict[str, int]
"""Images by split (``train``, ``val``) and ``classes``."""


@dataclass(frozen=True)
class Published:
    """One data set as it is published.

    Attributes:
        title: what it is called.
        numbers: what there is, one entry for each version that exists.
        get: where to get it.
        md5: checksums by file name.
    """

    title: str
    numbers: tuple[Numbers, ...]
    get: str
    md5: Mapping[str, str] = field(default_factory=dict)


def numbers(train: int, val: int, classes: int) -> dict[str, int]:
    """Return the numbers of one version."""
    return {"train": train, "val": val, "classes": classes}


PUBLISHED: dict[str, Published] = {
    "digits": Published(
        "scikit-learn's digits, split by `lskd data digits`", (numbers(1_201, 596, 10),), "scikit-learn"
    ),
    "imagenet": Published(
        "ImageNet-1K",
        (numbers(1_281_167, 50_000, 1000),),
        "https://image-net.org/download.php (ILSVRC2012, with an account)",
    ),
    "cub200": Published(
        "CUB-200-2011",
        (numbers(5_994, 5_794, 200),),
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        {"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78"},
    ),
    "imaterialist": Published(
        "iMaterialist product 2019",
        (numbers(1_011_532, 10_095, 2019),),
        "https://github.com/msight-tech/imaterialist-product-2019 (lists of URLs; fetch the images yourself)",
    ),
    "inat2019": Published(
        "iNaturalist 2019",
        (numbers(265_213, 3_030, 1010),),
        "https://github.com/visipedia/inat_comp/tree/master/2019",
        {
            "train_val2019.tar.gz": "c60a6e2962c9b8ccbd458d12c8582644",
            "train2019.json.tar.gz": "b06a6683537867c0d5c7a45f407a306d",
            "val2019.json.tar.gz": "5cc5509b0fe495f1c8c1362612448497",
        },
    ),
    "imagenet-lt": Published(
        "ImageNet-LT",
        (numbers(115_846, 20_000, 1000), numbers(115_846, 50_000, 1000)),
        "https://github.com/zhmiao/OpenLongTailRecognition-OLTR (ImageNet_LT_train.txt and the others)",
        {
            "ImageNet_LT_val.txt": "ef44f8e43fbc904809a77216042e7498",
            "ImageNet_LT_test.txt": "5f5f97c738923e877c5c78accce6744f",
        },
    ),
    "places-lt": Published(
        "Places-LT",
        tuple(
            numbers(train, val, 365)
            for train in (62_500, 184_500)  # the list of today, and what the paper says
            for val in (7_300, 36_500)
        ),
        "https://github.com/zhmiao/OpenLongTailRecognition-OLTR (Places_LT_train.txt and the others)",
        {
            "Places_LT_train.txt": "e7795ab1bf428a89f900854127b1e556",
            "Places_LT_val.txt": "2f6e727cd6c99c7b7fdecc9876875b1b",
            "Places_LT_test.txt": "1347af35b053bd31cf782256306affe7",
        },
    ),
    "fashion-mnist": Published(
        "Fashion-MNIST",
        (numbers(60_000, 10_000, 10),),
        "https://github.com/zalandoresearch/fashion-mnist, or Debian's package dataset-fashion-mnist",
    ),
}


def known_numbers(name: str, expect: object = None) -> Numbers:
    """Return what is known beforehand of a data set: what all of its versions agree on, or what is expected.

    >>> known_numbers("imagenet-lt"), known_numbers("noise")
    ({'train': 115846, 'classes': 1000}, {})

    Raises:
        LskdError: for an expectation that is none.
    """
    if expect is not None:
        return parse_expected(str(expect))
    first, *others = PUBLISHED[name].numbers if name in PUBLISHED else ({},)
    return {key: value for key, value in first.items() if all(other[key] == value for other in others)}


def parse_expected(text: str) -> Numbers:
    """Read what a user expects instead of what is published.

    >>> parse_expected("train=90,val=30,classes=3")
    {'train': 90, 'val': 30, 'classes': 3}

    Raises:
        LskdError: for anything else.
    """
    parts = dict(re.findall(r"(train|val|classes)=(\d+)", text))
    if ",".join(f"{key}={value}" for key, value in parts.items()) != text.replace(" ", "") or len(parts) != 3:
        raise LskdError(f"--expect must look like train=5994,val=5794,classes=200, got {text!r}")
    return {key: int(value) for key, value in parts.items()}


def count(rows: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Return the numbers of images, given the split and the class of each.

    >>> count([("train", "a"), ("val", "a"), ("train", "b")])
    {'train': 2, 'val': 1, 'classes': 2}
    """
    rows = list(rows)
    splits = Counter(split for split, _ in rows)
    return numbers(splits["train"], splits["val"], len({label for _, label in rows}))


def check_numbers(name: str, found: Numbers, expect: str | None) -> None:
    """Compare what there is with what is published, or with what the user expects.

    Raises:
        LskdError: naming both, where they differ.
    """
    versions = PUBLISHED[name].numbers if expect is None else (parse_expected(expect),)
    if found in versions:
        return
    nearest = max(versions, key=lambda version: sum(version[key] == found[key] for key in version))
    raise LskdError(
        f"{PUBLISHED[name].title}: expected {_in_words(nearest)}, found {_in_words(found)}; "
        f"get the whole of it from {PUBLISHED[name].get}, or name what you expect with "
        f"--expect {','.join(f'{key}={value}' for key, value in found.items())}"
    )


def _in_words(images: Numbers) -> str:
    split = f"{images['train']:,} training and {images['val']:,} validation images"
    return f"{split} in {images['classes']:,} classes"


def origin(name: str, expect: str | None) -> dict[str, object]:
    """Return what a manifest says of the source: whose numbers it was compared with.

    Raises:
        LskdError: for numbers that are none.
    """
    return {
        "title": PUBLISHED[name].title,
        "numbers": "published" if expect is None else parse_expected(expect),
    }
