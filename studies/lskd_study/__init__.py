"""The study: does a label-smoothed teacher distil a better student? Data, workflow, statistics, page.

From Python: ``from lskd_study import Study``.
"""

import typing

if typing.TYPE_CHECKING:
    from lskd_study.study.from_python import Study as Study

__all__ = ["Study"]  # imported above for those who check types


def __getattr__(name: str) -> typing.Any:
    """Import the class when it is asked for: the commands and jobs of this package do without it."""
    if name != "Study":
        raise AttributeError(f"module 'lskd_study' has no attribute {name!r}")
    from lskd_study.base.extras import require_extra

    require_extra()
    from lskd_study.study.from_python import Study

    return Study
