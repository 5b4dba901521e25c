"""The study: does a label-smoothed teacher distil a better student? Data, workflow, statistics, page."""
