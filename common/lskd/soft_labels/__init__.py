"""Soft labels on the disk: a teacher is asked once for all of its students."""
