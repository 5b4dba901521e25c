"""Image folders: layout, archives, derived data sets."""
