"""Settings for every test."""

import os

# Before torch is imported anywhere, and inherited by every subprocess.
os.environ.setdefault("OMP_NUM_THREADS", "1")
