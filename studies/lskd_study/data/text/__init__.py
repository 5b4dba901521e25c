"""Parallel text and fairseq's binary form of it."""
