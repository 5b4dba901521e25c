"""Data sets: image folders (``train/<class>/``, ``val/<class>/``) and parallel text for fairseq."""
