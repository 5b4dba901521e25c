"""What teachers say about a data set: read from a file, or asked of a model."""
