"""The ``lskd`` command, one file a sub-command."""
