"""`python -m fairseq_kd.sequence_level DATA-BIN --path teacher.pt --output DIR`: train on what it translates.

Sequence-level distillation (Kim and Rush, EMNLP 2016): the student trains on what the teacher translates the
training set to, with any criterion.
"""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from fairseq.data import indexed_dataset

from fairseq_kd import passes
from fairseq_kd.errors import run
from fairseq_kd.task import data_identity, language_pair
from fairseq_kd.teacher import Teacher
from lskd import LskdError
from lskd.base.files import is_scratch, to_disk, write_text

_SEARCH = ("beam", "lenpen", "max_len_a", "max_len_b")


def main(argv: Sequence[str] | None = None) -> None:
    """Write a data-bin with the teacher's translations as training targets.

    Raises:
        LskdError: for what the user can fix.
    """
    parser = passes.parser_of(
        "sequence_level",
        "Decode the training set with the teacher into a data-bin; valid and test stay as they are. "
        "The same command goes on after an end.",
    )
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
    asked = passes.Pass(teacher, "train", args.max_tokens, cpu=args.cpu, fp16=args.fp16)
    scratch = args.output.with_name(f".{args.output.name}-unfinished")
    _begin(scratch, teacher, args)
    _decode(scratch / "translations.txt", asked, args)
    tokens = _binarise(scratch, teacher, args.data)
    to_disk(scratch)
    (scratch / "translations.txt").unlink()
    os.replace(scratch, args.output)
    print(
        f"{args.output}: the teacher's translations of {len(asked.pairs)} sentences, {tokens} target tokens"
    )


def _begin(scratch: Path, teacher: Teacher, args: Namespace) -> None:
    file = scratch / "sequence_level.json"
    begun = scratch.is_dir() and all(map(is_scratch, scratch.iterdir()))  # killed before it was noted
    if scratch.is_symlink() or (scratch.exists() and not begun and not file.is_file()):
        raise LskdError(f"{scratch} was not made by this command; move it away or choose another --output")
    cfg = teacher.task.cfg
    content = {
        "teacher": teacher.checksum,
        "data": data_identity(cfg.data, "train", cfg.source_lang, cfg.target_lang),
        **{name: getattr(args, name) for name in _SEARCH},
    }
    manifest = json.dumps(content, indent=2) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") != manifest:
        raise LskdError(
            f"{scratch} was begun with another teacher, data-bin or search; "
            "remove it or choose another --output"
        )
    write_text(file, manifest)


def _decode(file: Path, asked: passes.Pass, args: Namespace) -> None:
    """Append a line of token numbers for each sentence; what an ended run left half-written is cut off."""
    done = 0
    if file.is_file():
        whole = file.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        os.truncate(file, len(whole))
        done = whole.count(b"\n")
    task = asked.teacher.task
    search = Namespace(**{name: getattr(args, name) for name in _SEARCH}, sampling=False)
    generator = task.build_generator(asked.teacher.models, search)
    # A sentence that the teacher cannot read keeps an empty translation, and fairseq drops it.
    nothing = torch.tensor([task.target_dictionary.eos()])
    with open(file, "a", encoding="ascii") as lines:
        for window in passes.windows(asked.pairs, done):
            said = asked.translated(window, generator)
            tokens = [said.get(index, nothing).tolist() for index in window]
            lines.writelines(" ".join(map(str, numbers)) + "\n" for numbers in tokens)
            lines.flush()
            os.fsync(lines.fileno())


def _binarise(scratch: Path, teacher: Teacher, data: str) -> int:
    cfg = teacher.task.cfg
    pair = language_pair(data, "train", cfg.source_lang, cfg.target_lang)
    target = f"train.{pair}.{cfg.target_lang}"
    for file in sorted(Path(data).iterdir()):
        if file.is_file() and not file.name.startswith(f"{target}."):
            shutil.copyfile(file, scratch / file.name)
    vocabulary = len(teacher.task.target_dictionary)
    builder = indexed_dataset.make_builder(str(scratch / f"{target}.bin"), impl="mmap", vocab_size=vocabulary)
    tokens = 0
    with open(scratch / "translations.txt", encoding="ascii") as lines:
        for line in lines:
            numbers = torch.IntTensor([int(word) for word in line.split()])
            tokens += len(numbers)
            builder.add_item(numbers)
    builder.finalize(str(scratch / f"{target}.idx"))
    return tokens


if __name__ == "__main__":
    run(main)
