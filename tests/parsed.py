"""The ``lskd`` command's own parser."""

from typing import Any

from typer.main import get_command

from lskd_study.cli import main as cli


def parsed(words: list[str]) -> tuple[str, Any]:
    """Find a command of ``lskd`` and let it parse its words, without running it; its name and context."""
    command, name = get_command(cli.app), []
    words = list(words)
    while hasattr(command, "commands"):
        if not words:  # `lskd data`, named as a whole
            return " ".join(name), None
        name.append(words.pop(0))
        assert name[-1] in command.commands, f"lskd {' '.join(name)}"
        command = command.commands[name[-1]]
    alone = not words and name[0] in ("data", "figure")  # named, not to be run as it stands
    return " ".join(name), None if alone else command.make_context(name[-1], words)
