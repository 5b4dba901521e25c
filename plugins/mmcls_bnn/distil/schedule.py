"""The learning rate of the recipes."""

from typing import Any

from mmengine.optim import LinearLR
from mmengine.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class LinearDecay(LinearLR):
    """Epoch e of E, counted from 0, runs at lr (1 - e / E): the first at lr, the last at lr / E.

    mmengine's LinearLR from 1 to 0 would leave the last epoch with a learning rate of 0.

    Args:
        optimizer: whose learning rate decays.
        end: E; mmengine's Runner gives `train_cfg.max_epochs`, or `max_iters` with `by_epoch=False`.
        begin: the epoch that counts as 0.
        kwargs: further arguments of mmengine's LinearLR.
    """

    def __init__(self, optimizer: Any, *, end: int, begin: int = 0, **kwargs: Any) -> None:
        """Set the last factor."""
        super().__init__(
            optimizer, start_factor=1.0, end_factor=1 / (end - begin), begin=begin, end=end, **kwargs
        )
