"""Intervals, bootstrap, trends and BLEU: numbers in, numbers out."""
