"""The Hugging Face hub, which is not asked unasked."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def offline(unless: Sequence[str] = ()) -> Iterator[None]:
    """Let nothing ask the hub, unless one of these environment variables is set."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not any(map(os.environ.get, unless))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
