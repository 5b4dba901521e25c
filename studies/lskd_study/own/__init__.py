"""``lskd study --own DIR``: a study of one's own images, with no file to write."""
