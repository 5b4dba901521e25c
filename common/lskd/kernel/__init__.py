"""The loss's terms, exact and fast: one door, with a compiled and a chunked way behind it."""
