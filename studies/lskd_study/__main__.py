"""``python -m lskd_study`` is the ``lskd`` command."""

from lskd_study.cli.main import main

raise SystemExit(main())
