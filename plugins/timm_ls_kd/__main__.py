"""`python -m timm_ls_kd train.py ...` is the console script `timm`."""

import sys

from timm_ls_kd.cli import main

sys.exit(main())
