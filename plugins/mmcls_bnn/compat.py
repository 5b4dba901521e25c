"""The names of mmcls 1.0.0rc6, or of its successor mmpretrain, for the rest of this package.

mmcls is taken where it is installed, otherwise mmpretrain - onedl-mmpretrain 1.3, which is maintained, or
mmpretrain 1.2 - or else what `MMCLS_BNN_FRAMEWORK` names. The names that mmpretrain gave up (`PackClsInputs`,
`ClsVisualizer`) are put in its registry, so the recipes run there with
`--cfg-options default_scope=mmpretrain` as their only change.
"""

import os
import warnings
from collections.abc import Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from typing import Any

import torch
from mmengine.registry import DefaultScope
from torch import Tensor

from lskd import LskdError
from lskd.base.install import how_to_install

CHOICES = {
    "mmcls": ("mmcls", "mmcv-lite", "mmcv"),
    "onedl": ("onedl-mmpretrain", "onedl-mmcv"),
    "mmpretrain": ("mmpretrain", "mmcv-lite", "mmcv"),
}
"""Values of `MMCLS_BNN_FRAMEWORK` with the distributions that they are of, the framework's first."""


def _choose() -> str:
    wanted = os.environ.get("MMCLS_BNN_FRAMEWORK")
    if wanted is not None and wanted not in CHOICES:
        raise LskdError(f"MMCLS_BNN_FRAMEWORK is {wanted!r}; it must be mmcls, onedl or mmpretrain.")
    for name in [wanted] if wanted else CHOICES:
        found = find_spec("mmcls" if name == "mmcls" else "mmpretrain") is not None
        if found and (name != "onedl" or any(distributions(name=CHOICES[name][0]))):
            return name
    extra = wanted if wanted == "onedl" else "mmcls"
    raise LskdError(f"{wanted or 'mmcls'} is not installed here; {how_to_install(extra)}")


_CHOICE = _choose()
FRAMEWORK = "mmcls" if _CHOICE == "mmcls" else "mmpretrain"
DISTRIBUTIONS = CHOICES[_CHOICE]

# mmcv-lite's remark on an operator that nothing here uses would stand before every error and result.
warnings.filterwarnings("ignore", message="Fail to import ``MultiScale")

if FRAMEWORK == "mmcls":
    from mmcls.datasets import BaseDataset, CustomDataset
    from mmcls.models import ImageClassifier
    from mmcls.models.backbones.base_backbone import BaseBackbone
    from mmcls.registry import BATCH_AUGMENTS, DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS
    from mmcls.utils import register_all_modules
else:
    from mmpretrain.datasets import BaseDataset, CustomDataset
    from mmpretrain.datasets.transforms import PackInputs
    from mmpretrain.models import ImageClassifier
    from mmpretrain.models.backbones.base_backbone import BaseBackbone
    from mmpretrain.registry import BATCH_AUGMENTS, DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS, VISUALIZERS
    from mmpretrain.utils import register_all_modules
    from mmpretrain.visualization import UniversalVisualizer

    TRANSFORMS.register_module(name="PackClsInputs", module=PackInputs, force=True)
    VISUALIZERS.register_module(name="ClsVisualizer", module=UniversalVisualizer, force=True)


def use_registry() -> None:
    """Register the framework's modules and make its scope the default, where no runner has done so."""
    register_all_modules(init_default_scope=DefaultScope.get_current_instance() is None)


def labels_of(data_samples: Sequence[Any]) -> Tensor:
    """Return the labels `(B,)`, or their probabilities `(B, K)` where mixup or CutMix made some."""
    if FRAMEWORK == "mmpretrain":
        if "gt_score" in data_samples[0]:
            return torch.stack([sample.gt_score for sample in data_samples])
        return torch.cat([sample.gt_label for sample in data_samples])
    if "score" in data_samples[0].gt_label:
        return torch.stack([sample.gt_label.score for sample in data_samples])
    return torch.cat([sample.gt_label.label for sample in data_samples])


def scores_of(predictions: Sequence[Any]) -> Tensor:
    """Return all probabilities of a batch's predictions, `(B K,)`; none for another kind of model."""
    if FRAMEWORK == "mmpretrain":
        scores = [sample.pred_score for sample in predictions if "pred_score" in sample]
    else:
        scores = [sample.pred_label.score for sample in predictions if "pred_label" in sample]
    return torch.cat(scores) if scores else torch.empty(0)
