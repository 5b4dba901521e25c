"""``lskd study``: from a file, or a folder of images, to a page."""
