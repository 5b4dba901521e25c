"""The former name of ``python -m lskd_study.runs``."""

from lskd_study.runs.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
