"""Command lines, drawn from the real options of every command."""

import contextlib
import io
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fuzz import attacks
from fuzz.harness import Read, one_file, same
from lskd import LskdError
from lskd_study.plan.recipes import recipes_folder


def words(dice: random.Random, data: bytes) -> bytes:
    """Vary a command line by its words."""
    parts = data.split(b"\0")
    known = OPTIONS.get(parts[0], [])
    for _ in range(dice.choice((1, 1, 2, 3))):
        at = dice.randrange(1, len(parts) + 1)
        match dice.randrange(6):
            case 0 if at < len(parts):
                del parts[at]
            case 1 if at < len(parts):
                parts.insert(at, parts[at])
            case 2 if known:
                parts[at:at] = [dice.choice(known), dice.choice(VALUES)]
            case 3 if known:
                parts.insert(at, dice.choice(known))
            case _:
                parts[at : at + 1] = [dice.choice(VALUES)]
    return b"\0".join(parts)


OPTIONS: dict[bytes, list[bytes]] = {}
VALUES = [
    *(b"", b"0", b"-1", b"1", b"2", b"nan", b"inf", b"1e999", b"9" * 400, b"x", b"--", b"-", b"\xff\xfe"),
    b"a\nb",
    *(b"nosuch/x", b"n" * 300, b"study.yaml", b"t.yaml", b"data", b"x.npz", b"table.csv", b"/proc/nothing/x"),
    *(b"file:///nosuch", b"nosuch://a:b@c", b"0,0.1", b"1/2", b"2/1", b"train=1,val=1", b"cpu", b"../x"),
    *(b".", b"loop"),
    *(name.encode() for name in attacks.NAMES),
]


def lskd_command(folder: Path) -> tuple[Sequence[bytes], Read]:
    """All commands with their real options; what would train, or start a process, ends before."""
    from typer.main import get_command

    from lskd_study.cli import main as cli
    from lskd_study.data.published import small
    from lskd_study.data.text import ding, number_words
    from lskd_study.study import engine, own
    from scenes import Scene

    at = folder / "a" / "b" / "c"
    at.mkdir(parents=True)
    Scene(at, None).set_up()  # type: ignore[arg-type]
    np.savez(at / "x.npz", logits=np.eye(4, dtype=np.float32), labels=np.arange(4))
    (at / "table.csv").write_text("name,accuracy\na,1\n")
    (at / "loop").symlink_to("loop")

    def leaves(command: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
        if hasattr(command, "commands"):
            for name, one in command.commands.items():
                yield from leaves(one, (*path, name))
        else:
            yield path, command

    sound = [b"lskd study\0--schema"]
    for path, command in leaves(get_command(cli.app), ()):
        names = [name.encode() for option in command.params for name in option.opts if name.startswith("-")]
        key = b"lskd " + " ".join(path).encode()
        OPTIONS[key] = names
        sound += [b"\0".join([key, *more]) for more in ([], [b"data"], [b"study.yaml"], [b"--help"])]
    stubbed = False

    def read(data: bytes) -> None:
        nonlocal stubbed
        if not stubbed:  # in the worker
            os.chdir(at)
            os.environ["XDG_CACHE_HOME"] = str(folder)
            engine.run_study = lambda file, output, *_, **__: engine.make_plan(file, output) and 0  # type: ignore
            own.run_own = lambda *_, **__: 0  # type: ignore[assignment]
            cli.soft_labels.subprocess.run = _no_process  # type: ignore[attr-defined]
            # or a machine that has their sources would write whole data sets
            small._FASHION_FILES = ("none",)
            ding.write_parallel = number_words.write_parallel = _no_process
            stubbed = True
        name, *arguments = data.decode(errors="surrogateescape").replace("\r", "").split("\0")
        _one_line(lambda: cli.main([*name.split()[1:], *arguments]), "lskd: ")

    return sound, read


def _no_process(*_: Any, **__: Any) -> Any:
    raise LskdError("no process is started here")


def timm_command(folder: Path) -> tuple[Sequence[bytes], Read]:
    from timm_ls_kd.arguments import kd_config
    from timm_ls_kd.trainer.arguments import create_parser, parse_arguments

    (folder / "c.yaml").write_text("epochs: 1\n")
    actions = create_parser()._actions
    OPTIONS[b"timm"] = [name.encode() for action in actions for name in action.option_strings]

    def read(data: bytes) -> None:
        os.chdir(folder)
        arguments = data.decode(errors="surrogateescape").split("\0")[1:]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # --help
            args = parse_arguments(arguments)
            kd_config(args)
            found = vars(args)
            assert 0 <= found["smoothing"] < 1
            (folder / "args.yaml").write_text(yaml.safe_dump(found))
            same(found, vars(parse_arguments(["--config", "args.yaml"])))

    texts = ["timm", "timm\0data\0--model\0resnet50\0--smoothing\x000.1"]
    texts.append("timm\0--config\0c.yaml\0--kd-teacher\0resnet18")
    return [text.encode() for text in texts], read


MODULES = ("fairseq_kd.soft_labels", "fairseq_kd.sequence_level", "mmcls_bnn.soft_labels", "mmcls_bnn.export")
MODULES += ("mmcls_bnn.profile", "mmcls_bnn.complexity", "mmcls_bnn.authors")


def plugin_command(folder: Path) -> tuple[Sequence[bytes], Read]:
    """The plugins' own commands, and the bundled trainer's that stores; nothing is there to be read."""
    from fairseq_kd.errors import _as_line
    from timm_ls_kd.cli import main

    def of_fairseq(own: Callable[[list[str]], None], words: list[str]) -> int:
        try:
            own(words)
        except Exception as error:  # as its hook does
            line, status = _as_line(error)
            if line is None:
                raise
            print(line, file=sys.stderr)
            return status
        return 0

    (folder / "data").mkdir()
    calls = {name: import_module(name).main for name in MODULES}
    for name in MODULES[:2]:
        calls[name] = partial(of_fairseq, calls[name])
    calls["timm"] = lambda words: main(["soft-labels", *words])
    for name, call in calls.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            call(["--help"])
        OPTIONS[name.encode()] = re.findall(rb"(?<![\w-])--?[a-z][a-z-]*", printed.getvalue().encode())

    def read(data: bytes) -> None:
        os.chdir(folder)
        name, *arguments = data.decode(errors="surrogateescape").split("\0")
        if name not in calls:
            raise LskdError("another command")
        _one_line(lambda: calls[name](arguments), r"(timm|fairseq_kd|mmcls_bnn|python -m)[ .\w]*: ")

    more = ("", "\0data", "\0data\0--output\0out", "\0data\0--path\0data\0--output\0out")
    return [b"timm\0--help", *((name + words).encode() for name in calls for words in more)], read


def timm_file(folder: Path) -> tuple[Sequence[bytes], Read]:
    """The file of defaults that the bundled trainer reads: what it makes of it survives its args.yaml."""
    from timm_ls_kd.trainer.arguments import parse_arguments

    def read(path: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # warnings
            found = vars(parse_arguments(["--config", str(path)]))
            (folder / "args.yaml").write_text(yaml.safe_dump(found))
            same(found, vars(parse_arguments(["--config", str(folder / "args.yaml")])))

    sound = (recipes_folder() / "digits/student.yaml").read_bytes()
    whole = yaml.safe_dump(vars(parse_arguments(["--model", "resnet18"]))).encode()
    return [sound, whole, json.dumps(yaml.safe_load(whole)).encode()], one_file("c.yaml", read)(folder)


def _one_line(call: Callable[[], int | None], prefix: str) -> None:
    """Run a command: what it refuses is one line on stderr that a terminal can show, and no success."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = call()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    if not status:
        return
    lines = [line for line in err.getvalue().split("\n") if re.match(prefix + "error", line)]
    if status == 2 and not lines and out.getvalue():  # the help instead
        return
    assert len(lines) == 1, f"{len(lines)} lines, status {status}: {err.getvalue()[-300:]!r}"
    assert lines[0].isprintable(), f"not printable: {lines[0]!r}"
    raise LskdError(lines[0])
