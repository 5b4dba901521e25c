"""Published image data sets, from their publishers' files."""
