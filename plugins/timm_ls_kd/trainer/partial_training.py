"""Training a part of a network: FixRes' fine-tuning of the classifier (Touvron et al., 2019)."""

import difflib
from argparse import Namespace

from timm.utils.model import freeze
from torch import nn

from lskd import LskdError


def freeze_rest(model: nn.Module, args: Namespace) -> None:
    """Freeze all of a model but the modules that ``--train-only`` names; nothing without that argument.

    Frozen BatchNorm keeps its running statistics, except in the modules that ``--train-statistics`` names:
    there they go on moving, without gradients. Dropout, where a model has some, stays on.

    Args:
        model: changed in place; timm's frozen BatchNorm takes the place of the frozen ones.
        args: with ``train_only`` and ``train_statistics``, lists of names of modules.

    Raises:
        LskdError: a name that the model does not have, or statistics without ``--train-only``.
    """
    trained, moving = args.train_only or [], args.train_statistics or []
    if not trained:
        if moving:
            raise LskdError("--train-statistics needs --train-only MODULE, what else is trained; add it.")
        return
    modules = dict(model.named_modules())
    for flag, names in (("--train-only", trained), ("--train-statistics", moving)):
        for name in names:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=1, cutoff=0.5)
                mend = f"did you mean {near[0]}?" if near else f"it has {', '.join(list(modules)[1:5])}, ..."
                raise LskdError(f"{flag} {name}: model '{args.model}' has no such module; {mend}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = _within(name, trained)
    leaves = [name for name, module in modules.items() if name and not any(module.children())]
    frozen = [name for name in leaves if not _within(name, [*trained, *moving])]
    if frozen:  # an empty list would mean everything to timm
        freeze(model, frozen)


def _within(name: str, parents: list[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)
