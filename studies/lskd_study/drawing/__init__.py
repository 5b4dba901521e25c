"""Figures: each a matplotlib figure and the numbers behind it."""
