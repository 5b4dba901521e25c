"""Errors that a user can cause; each message is one line: what is wrong, and what to do."""


class LskdError(Exception):
    """Something the user can mend. Command lines print the message as one line and exit with 2."""


class CheckpointError(LskdError):
    """A file of weights that is missing, damaged, unsafe or not what it should be."""


class SoftLabelsError(LskdError):
    """Stored soft labels that are missing, damaged, unfinished, in use, or of another teacher or data."""
