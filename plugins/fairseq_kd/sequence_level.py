"""`python -m fairseq_kd.sequence_level DATA-BIN --path teacher.pt --output DIR`: train on what it translates.

Sequence-level distillation (Kim and Rush, EMNLP 2016): the student trains on what the teacher translates the
training set to, with any criterion.
"""

import argparse
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.data import indexed_dataset
from tqdm import tqdm

from fairseq_kd import passes
from fairseq_kd.dataset import data_identity
from fairseq_kd.errors import run
from fairseq_kd.teacher import Teacher
from lskd import LskdError
from lskd.base.files import to_disk, write_text


def main(argv: Sequence[str] | None = None) -> None:
    """Write a data-bin with the teacher's translations as training targets.

    Raises:
        LskdError: for what the user can mend.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_kd.sequence_level",
        description="Decode the training set with the teacher into a data-bin; valid and test stay as they "
        "are. The same command goes on after an end.",
    )
    passes.add_pass_arguments(parser)
    parser.add_argument("--beam", type=int, default=5, help="default: 5")
    parser.add_argument("--lenpen", type=float, default=1.0, help="length penalty (default: 1)")
    parser.add_argument(
        "--max-len-a", type=float, default=1.2, help="most tokens: a * source + b (default: 1.2)"
    )
    parser.add_argument("--max-len-b", type=int, default=10, help="default: 10")
    args = parser.parse_args(argv)
    if args.beam < 1:
        raise LskdError(f"--beam is {args.beam}; it must be 1 or more")
    if args.output.exists():
        raise LskdError(f"{args.output} exists; choose another --output or remove it")
    teacher = passes.load_teacher(args)
    pairs = passes.load_pairs(teacher, "train", args)
    scratch = args.output.with_name(f".{args.output.name}-unfinished")
    _begin(scratch, teacher, args)
    _decode(scratch / "translations.txt", teacher, pairs, args)
    tokens = _binarise(scratch, teacher, args)
    (scratch / "translations.txt").unlink()
    to_disk(scratch)
    os.replace(scratch, args.output)
    print(f"{args.output}: the teacher's translations of {len(pairs)} sentences, {tokens} target tokens")


def _begin(scratch: Path, teacher: Teacher, args: Namespace) -> None:
    file = scratch / "sequence_level.json"
    if scratch.is_symlink() or (scratch.exists() and not file.is_file()):
        raise LskdError(f"{scratch} was not made by this command; move it away or choose another --output")
    cfg = teacher.task.cfg
    settings = {name: getattr(args, name) for name in ("beam", "lenpen", "max_len_a", "max_len_b")}
    content = {
        "teacher": teacher.checksum,
        "data": data_identity(cfg.data, "train", cfg.source_lang, cfg.target_lang),
    }
    manifest = json.dumps(content | settings, indent=2) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") != manifest:
        raise LskdError(
            f"{scratch} was begun with another teacher, data-bin or search; "
            "remove it or choose another --output"
        )
    write_text(file, manifest)


def _decode(file: Path, teacher: Teacher, pairs: Any, args: Namespace) -> None:
    """Append a line of token numbers for each sentence; what an ended run left half-written is cut off."""
    done = 0
    if file.is_file():
        whole = file.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        os.truncate(file, len(whole))
        done = whole.count(b"\n")
    search = Namespace(
        beam=args.beam, lenpen=args.lenpen, max_len_a=args.max_len_a, max_len_b=args.max_len_b, sampling=False
    )
    generator = teacher.task.build_generator(teacher.models, search)
    longest = passes.longest_of(teacher)
    with (
        open(file, "a", encoding="ascii") as lines,
        tqdm(total=len(pairs), initial=done, unit=" sentences", mininterval=1) as bar,
    ):
        for window in passes.windows(pairs, done):
            said: dict[int, list[int]] = {}
            for batch in passes.batches(pairs, window, args.max_tokens, longest):
                moved = passes.to_device(teacher, batch)
                hypotheses = teacher.task.inference_step(generator, teacher.models, moved)
                for index, best in zip(batch["id"].tolist(), hypotheses, strict=True):
                    said[index] = best[0]["tokens"].tolist()
            eos = teacher.task.target_dictionary.eos()
            # A sentence that the teacher cannot read keeps an empty translation, and fairseq drops it.
            lines.writelines(" ".join(map(str, said.get(index, [eos]))) + "\n" for index in window)
            lines.flush()
            os.fsync(lines.fileno())
            bar.update(len(window))


def _binarise(scratch: Path, teacher: Teacher, args: Namespace) -> int:
    cfg, data = teacher.task.cfg, Path(args.data)
    source, target = cfg.source_lang, cfg.target_lang
    pair = f"{source}-{target}" if list(data.glob(f"train.{source}-{target}.*")) else f"{target}-{source}"
    for file in sorted(data.iterdir()):
        if file.is_file() and not file.name.startswith(f"train.{pair}.{target}."):
            shutil.copyfile(file, scratch / file.name)
    prefix = scratch / f"train.{pair}.{target}"
    vocabulary = len(teacher.task.target_dictionary)
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=vocabulary)
    tokens = 0
    with open(scratch / "translations.txt", encoding="ascii") as lines:
        for line in lines:
            numbers = torch.IntTensor([int(word) for word in line.split()])
            tokens += len(numbers)
            builder.add_item(numbers)
    builder.finalize(f"{prefix}.idx")
    return tokens


if __name__ == "__main__":
    run(main)
