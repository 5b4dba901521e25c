"""Imported where a run of mmengine's starts: its config is written as it is.

Formatting it, for the log, the folder and each checkpoint, takes most of a short run's time. What is no
Python, which the formatter refuses, is refused.
"""

from mmengine.config import config


def as_it_is(text, **_):
    compile(text, "config", "exec")
    return text, True


config.FormatCode = as_it_is
