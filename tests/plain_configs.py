"""Imported where a run of mmengine's starts: its config is written as it is.

Formatting it, for the log, the folder and each checkpoint, takes most of a short run's time.
"""

from mmengine.config import config

config.FormatCode = lambda text, **_: (text, True)
