"""What every part of a study stands on."""
