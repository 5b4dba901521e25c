"""mixup and CutMix image by image: a recipe's `batch_augments` for images that can be made again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lskd import Convention, LskdError
from lskd.teachers.replay import Mixing, MixingPolicy, mixed_image, mixed_targets


@dataclass(frozen=True)
class ImageMixing:
    """How training images are mixed, each by itself, and what becomes of their labels.

    Called as a preprocessor's `batch_augments`, it changes nothing: the images are mixed before.

    Attributes:
        policy: how they are mixed.
        num_classes: class count.
        alpha: smoothing of both labels before mixing.
        convention: what alpha means.
    """

    policy: MixingPolicy
    num_classes: int
    alpha: float = 0.0
    convention: Convention = "uniform"

    def __call__(self, inputs: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are."""
        return inputs, scores

    def apply(self, item: dict[str, Any], partner: dict[str, Any] | None, mixing: Mixing | None) -> None:
        """Mix an image of a pipeline with its partner's, in place; None: keep it as it is.

        Raises:
            LskdError: images of two sizes.
        """
        sample, weight = item["data_samples"], 1.0
        label = other = _label(sample)
        if partner is not None and mixing is not None:
            sizes = [tuple(each["inputs"].shape) for each in (item, partner)]
            if sizes[0] != sizes[1]:
                raise LskdError(
                    f"images of {sizes[0]} and {sizes[1]} cannot be mixed; let the pipeline crop or resize "
                    "all to one size."
                )
            item["inputs"], weight = mixed_image(item["inputs"], partner["inputs"], mixing)
            other = _label(partner["data_samples"])
        weights = torch.tensor([weight], dtype=torch.float32)
        scores = mixed_targets(label, other, weights, self.num_classes, self.alpha, self.convention)
        sample.set_gt_score(scores[0])


def mix_by_image(model: Any) -> ImageMixing | None:
    """Take over what the model's preprocessor would mix by batch; None: it mixes nothing.

    mmcls draws one kind and one weight for a batch and mixes it with a permutation of itself. Here each image
    draws its own by the same laws, see :class:`lskd.MixingPolicy`.

    Args:
        model: an LsKdClassifier; its preprocessor mixes no more.

    Raises:
        LskdError: a way of mixing that no seed repeats here, by name.
    """
    preprocessor, loss = model.data_preprocessor, model.distillation
    augments = getattr(preprocessor, "batch_augments", None)
    if augments is None:
        return None
    if isinstance(augments, ImageMixing):
        return augments
    alphas = {"Mixup": 0.0, "CutMix": 0.0}
    shares = {"Mixup": 0.0, "CutMix": 0.0}
    probabilities = augments.probs or [1 / len(augments.augments)] * len(augments.augments)
    for augment, probability in zip(augments.augments, probabilities, strict=True):
        if augment is None or probability == 0:
            continue
        name = type(augment).__name__
        other_box = getattr(augment, "cutmix_minmax", None) or not getattr(augment, "correct_lam", True)
        if name not in alphas or other_box or alphas[name]:
            raise LskdError(
                f"soft labels cannot be stored with {name} of data_preprocessor.batch_augments as it is set "
                "up there: images are mixed one by one by one Mixup(alpha) and one CutMix(alpha) at most; "
                "take it out, or train without soft_labels."
            )
        alphas[name], shares[name] = float(augment.alpha), float(probability)
    mixed = sum(shares.values())
    policy = MixingPolicy(
        alphas["Mixup"], alphas["CutMix"], min(mixed, 1.0), shares["CutMix"] / mixed if mixed else 0.0
    )
    mixing = ImageMixing(policy, int(model.head.num_classes), loss.alpha, loss.convention)
    preprocessor.batch_augments = mixing
    return mixing


def _label(sample: Any) -> Tensor:
    label: Tensor = getattr(sample.gt_label, "label", sample.gt_label)  # mmcls; mmpretrain
    return label
