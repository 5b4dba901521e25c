"""A study file, what it may say, and the runs that follow from it."""
