"""``lskd data``: the commands that make image folders and parallel text."""

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Make data sets: image folders (train/<class>/, val/<class>/) and parallel text for fairseq.",
    no_args_is_help=True,
)

Source = Annotated[Path, typer.Argument(help="Folder with the publisher's files, see docs/data.md.")]
ImageFolder = Annotated[Path, typer.Argument(help="Image folder: train/<class>/ and val/<class>/.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
OwnOutput = Annotated[
    Path | None,
    typer.Option(help="Folder to write.", show_default="beside the source, with the command's name"),
]
Copy = Annotated[bool, typer.Option("--copy", help="Copy files where links would do.")]
NoChecksum = Annotated[bool, typer.Option("--no-checksum", help="Do not compute the archives' MD5.")]
Expect = Annotated[
    str | None,
    typer.Option(help="Numbers of images instead of the published ones: train=N,val=N,classes=N."),
]
Seed = Annotated[int, typer.Option(help="Of the random draws.")]
Lists = Annotated[
    Path | None, typer.Option(help="Folder of the published text lists.", show_default="the source")
]
EvaluateOn = Annotated[str, typer.Option(help="The list that becomes val/: val (the paper's) or test.")]


@app.command()
def imagenet(
    source: Source,
    output: Output = Path("data/imagenet"),
    copy: Copy = False,
    no_checksum: NoChecksum = False,
    expect: Expect = None,
) -> None:
    """Write ImageNet-1K from the ILSVRC2012 archives, or from train/ and val/ folders."""
    from lskd_study.data.published.imagenet import prepare_imagenet

    made = prepare_imagenet(source, output, copy=copy, checksum=not no_checksum, expected=_expected(expect))
    say(output, *made)


@app.command()
def cub200(
    source: Source,
    output: Output = Path("data/cub200"),
    copy: Copy = False,
    no_checksum: NoChecksum = False,
    expect: Expect = None,
) -> None:
    """Write CUB-200-2011 with its official split, from CUB_200_2011.tgz or what is in it."""
    from lskd_study.data.published.cub200 import prepare_cub200

    made = prepare_cub200(source, output, copy=copy, checksum=not no_checksum, expected=_expected(expect))
    say(output, *made)


@app.command()
def imaterialist(
    source: Source,
    output: Output = Path("data/imaterialist"),
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images you fetched.", show_default="the source")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on without lost images.")
    ] = False,
    copy: Copy = False,
    expect: Expect = None,
) -> None:
    """Write iMaterialist product 2019 from train.json, val.json and the images you fetched by them."""
    from lskd_study.data.published.imaterialist import prepare_imaterialist

    made = prepare_imaterialist(
        source, output, images=images, allow_missing=allow_missing, copy=copy, expected=_expected(expect)
    )
    say(output, *made)
    if missing := sum(made[0]["missing"].values()):
        print(f"lskd: warning: {missing:,} images of the lists are missing", file=sys.stderr)


@app.command()
def inat2019(
    source: Source,
    output: Output = Path("data/inat2019"),
    copy: Copy = False,
    no_checksum: NoChecksum = False,
    expect: Expect = None,
) -> None:
    """Write iNaturalist 2019 from train_val2019.tar.gz and its two annotation files."""
    from lskd_study.data.published.inat2019 import prepare_inat2019

    made = prepare_inat2019(source, output, copy=copy, checksum=not no_checksum, expected=_expected(expect))
    say(output, *made)


@app.command()
def imagenet_lt(
    source: Source,
    output: Output = Path("data/imagenet_lt"),
    lists: Lists = None,
    evaluate_on: EvaluateOn = "val",
    copy: Copy = False,
    expect: Expect = None,
) -> None:
    """Write ImageNet-LT: the published lists over an ImageNet folder."""
    _long_tailed("imagenet-lt", source, output, lists, evaluate_on, copy, expect)


@app.command()
def places_lt(
    source: Source,
    output: Output = Path("data/places_lt"),
    lists: Lists = None,
    evaluate_on: EvaluateOn = "val",
    copy: Copy = False,
    expect: Expect = None,
) -> None:
    """Write Places-LT: the published lists over a folder of Places365."""
    _long_tailed("places-lt", source, output, lists, evaluate_on, copy, expect)


def _long_tailed(
    name: str,
    source: Path,
    output: Path,
    lists: Path | None,
    evaluate_on: str,
    copy: bool,
    expect: str | None,
) -> None:
    from lskd_study.data.published.long_tailed_lists import prepare_long_tailed

    if evaluate_on not in ("val", "test"):
        raise typer.BadParameter(f"--evaluate-on must be val or test, got {evaluate_on!r}")
    made = prepare_long_tailed(
        name,
        source,
        output,
        lists=lists,
        evaluate_on=evaluate_on,
        copy=copy,
        expected=_expected(expect),
    )
    say(output, *made)


@app.command()
def fashion_mnist(
    source: Annotated[
        Path, typer.Argument(help="Folder with the four idx files; Debian's package installs them there.")
    ] = Path("/usr/share/datasets/fashion-mnist"),
    output: Output = Path("data/fashion_mnist"),
    expect: Expect = None,
) -> None:
    """Write Fashion-MNIST as PNG images from the publisher's four files."""
    from lskd_study.data.published.fashion_mnist import prepare_fashion_mnist

    say(output, *prepare_fashion_mnist(source, output, expected=_expected(expect)))


@app.command()
def imagenet_subset(
    source: ImageFolder,
    classes: Annotated[int, typer.Option(help="How many: 100 and 500 in the paper's Table 4.")] = 100,
    seed: Seed = 0,
    output: OwnOutput = None,
    copy: Copy = False,
    expect: Expect = None,
) -> None:
    """Write ImageNet-100, -500 ...: classes of a whole ImageNet folder, drawn at random."""
    from lskd_study.data.folders.derived import prepare_subset

    output = output or _beside(source, f"{classes}")
    made = prepare_subset(
        source,
        output,
        classes=classes,
        seed=seed,
        copy=copy,
        published="imagenet",
        expected=_expected(expect),
    )
    say(output, *made)


@app.command()
def subset(
    source: ImageFolder,
    classes: Annotated[int | None, typer.Option(help="How many classes, drawn at random.")] = None,
    list: Annotated[Path | None, typer.Option(help="Or a file that names them, one a line.")] = None,
    seed: Seed = 0,
    output: OwnOutput = None,
    copy: Copy = False,
) -> None:
    """Keep some classes of any image folder; classes.txt says which."""
    from lskd_study.data.folders.derived import prepare_subset

    output = output or _beside(source, "subset")
    made = prepare_subset(source, output, classes=classes, class_list=list, seed=seed, copy=copy)
    say(output, *made)


@app.command()
def long_tail(
    source: ImageFolder,
    head: Annotated[int, typer.Option(help="Images in the largest class; 1280 in ImageNet-LT.")],
    tail: Annotated[int, typer.Option(help="Images in the smallest class.")] = 5,
    alpha: Annotated[float, typer.Option(help="Power value of the Pareto distribution.")] = 6.0,
    seed: Seed = 0,
    output: OwnOutput = None,
    copy: Copy = False,
) -> None:
    """Give the training classes of any image folder the sizes of a Pareto distribution."""
    from lskd_study.data.folders.derived import prepare_long_tail

    output = output or _beside(source, "long_tail")
    made = prepare_long_tail(source, output, alpha=alpha, head=head, tail=tail, seed=seed, copy=copy)
    say(output, *made)


@app.command()
def noise(
    source: ImageFolder,
    rate: Annotated[float, typer.Option(help="Share of training images that get a wrong label.")] = 0.3,
    seed: Seed = 0,
    output: OwnOutput = None,
    copy: Copy = False,
) -> None:
    """Give training images of any image folder wrong labels; noise.csv says which."""
    from lskd_study.data.folders.derived import prepare_noise

    output = output or _beside(source, "noise")
    made = prepare_noise(source, output, rate=rate, seed=seed, copy=copy)
    say(output, *made)
    print(f"{made[0]['wrong_labels']:,} wrong labels, listed in {output}/noise.csv")


def say(output: Path, manifest: Mapping[str, Any], written: bool) -> None:
    """Print what is in an image folder."""
    images = manifest["images"]
    state = "written" if written else "already there"
    print(f"{output}: {images['train']} training and {images['val']} validation images, {state}")
    parts = []
    for split, counts in manifest["images_per_class"].items():
        parts.append(f"{split} {min(counts)} to {max(counts)}, median {statistics.median(counts):g}")
    print(f"{manifest['num_classes']} classes; images in a class: {'; '.join(parts)}")


def _expected(text: str | None) -> Mapping[str, int] | None:
    from lskd_study.data.expected import parse_expected

    return None if text is None else parse_expected(text)


def _beside(source: Path, name: str) -> Path:
    source = source.absolute()
    return source.parent / f"{source.name}_{name}"


DataBin = Annotated[
    Path | None, typer.Option(help="Folder for fairseq-preprocess' output too, made in the same step.")
]


@app.command()
def digits(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/digits"),
) -> None:
    """Write scikit-learn's 1,797 handwritten digits as PNG images, with a fixed split."""
    from lskd_study.data.published.digits import prepare_digits

    say(output, *prepare_digits(output))


@app.command()
def iwslt14(
    archive: Annotated[Path, typer.Option(help="The publisher's de-en.tgz.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/iwslt14_de_en"),
    data_bin: DataBin = None,
) -> None:
    """Write IWSLT'14 German-English as fairseq's prepare script does, with joint subwords."""
    from lskd_study.data.text.iwslt14 import EXPECTED, prepare_iwslt14

    manifest, written = prepare_iwslt14(output, archive)
    _binarise_or_say(output, manifest, written, data_bin, {})
    if not manifest.get("sizes_as_expected"):
        print(f"lskd: warning: expected {EXPECTED}; the archive is not the one of 2014", file=sys.stderr)


@app.command()
def ding(
    file: Annotated[
        Path, typer.Option(help="The dictionary; Debian's package trans-de-en installs it there.")
    ] = Path("/usr/share/trans/de-en"),
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/ding_de_en"),
    sentences_only: Annotated[bool, typer.Option(help="Train on whole sentences alone.")] = False,
    held_out: Annotated[int, typer.Option(help="Sentences in each of valid and test.")] = 1000,
    bpe_tokens: Annotated[int, typer.Option(help="Subwords to learn.")] = 10_000,
    data_bin: DataBin = None,
) -> None:
    """Write the German-English text of the Ding dictionary: sentences and phrases, with a fixed split."""
    from lskd_study.data.text.ding import prepare_ding

    options = {"sentences-only": sentences_only, "held-out": held_out, "bpe-tokens": bpe_tokens}
    made = prepare_ding(output, file, sentences_only, bpe_tokens, held_out)
    _binarise_or_say(output, *made, data_bin, options)


@app.command()
def number_words(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/number_words_de_en"),
    train: Annotated[int, typer.Option(help="Training pairs.")] = 20_000,
    valid: Annotated[int, typer.Option(help="Validation pairs.")] = 500,
    test: Annotated[int, typer.Option(help="Test pairs.")] = 500,
    bpe_tokens: Annotated[int, typer.Option(help="Subwords to learn.")] = 200,
    seed: Annotated[int, typer.Option(help="Which numbers.")] = 1,
    data_bin: DataBin = None,
) -> None:
    """Write numbers below a million in German and English words; needs no data at all."""
    from lskd_study.data.text.number_words import prepare_number_words

    options = {"train": train, "valid": valid, "test": test, "bpe-tokens": bpe_tokens, "seed": seed}
    made = prepare_number_words(output, train, valid, test, bpe_tokens, seed)
    _binarise_or_say(output, *made, data_bin, options)


def _binarise_or_say(
    output: Path,
    manifest: dict[str, Any],
    written: bool,
    data_bin: Path | None,
    options: Mapping[str, bool | int | str],
) -> None:
    """Say what was written, and binarise it or print the command that does."""
    pairs = manifest["pairs"]
    state = "written" if written else "already there"
    print(
        f"{output}: {pairs['train']} training, {pairs['valid']} validation and {pairs['test']} test pairs, "
        f"{state}"
    )
    if data_bin is not None:
        from lskd_study.data.text.data_bin import write_data_bin

        binarised = write_data_bin(data_bin, output, manifest, options)
        print(f"{data_bin}: data-bin, {'written' if binarised else 'already there'}")
        return
    print(
        f"next: fairseq-preprocess -s de -t en --trainpref {output}/train --validpref {output}/valid "
        f"--testpref {output}/test --destdir {output}-bin"
    )
