"""Which soft labels a study stores, and what is there of them."""
