"""Data sets as image folders: ``train/<class>/`` and ``val/<class>/``."""
