"""Measures of teachers and classes beyond stability."""
