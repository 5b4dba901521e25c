"""One module per trainer: how its command line is built and its logs are read."""
