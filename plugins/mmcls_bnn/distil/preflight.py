"""The teacher on real validation images, before the first iteration."""

from typing import Any

import torch
from mmengine.dataset import default_collate
from mmengine.dist import get_dist_info

from lskd import LskdError
from lskd.base.tensors import accumulator_dtype
from lskd.teachers.preflight import compare_with_chance
from mmcls_bnn.compat import labels_of

_BATCH = 64


def try_teacher(model: Any, dataset: Any, samples: int) -> str:
    """Measure the teacher's accuracy over all processes and return a line about it.

    Args:
        model: an LsKdClassifier.
        dataset: validation images, with their transforms.
        samples: how many to take, spread over the set (a folder is sorted by class).

    Raises:
        LskdError: the teacher is not better than chance (one-sided binomial test at 1 %), chance being the
            larger of 1/K and the share of the most frequent class; or it cannot process the images.
    """
    teacher = model.load_teacher()
    name, classes = model.teacher_settings.name, int(model.head.num_classes)
    count = min(samples, len(dataset))
    rank, processes = get_dist_info()
    indices = [(2 * i + 1) * len(dataset) // (2 * count) for i in range(count)][rank::processes]
    device = next(model.parameters()).device
    counts = torch.zeros(classes + 1, dtype=accumulator_dtype(device), device=device)
    for start in range(0, len(indices), _BATCH):
        batch = default_collate([dataset[index] for index in indices[start : start + _BATCH]])
        batch = model.data_preprocessor(batch, False)
        try:
            logits = teacher(batch["inputs"])
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            shape = " x ".join(str(size) for size in batch["inputs"].shape[1:])
            raise LskdError(
                f"teacher '{name}' cannot process {shape} images ({' '.join(str(error).split())[:200]}); "
                "set model.teacher.image_size to the size it was trained on."
            ) from None
        labels = labels_of(batch["data_samples"]).to(logits.device)
        if labels.ndim == 2:  # where training mixes, mmcls turns all labels into probabilities
            labels = labels.argmax(-1)
        counts[0] += (logits.argmax(-1) == labels).sum()
        counts[1:] += torch.bincount(labels, minlength=classes)
    if processes > 1:
        torch.distributed.all_reduce(counts)  # every process then comes to the same verdict
    right, *per_class = (int(value) for value in counts.tolist())
    chance = max(1 / classes, max(per_class) / max(sum(per_class), 1))
    share = 100 * right / max(count, 1)
    accuracy = f"right on {share:.1f} % of {count} validation images (chance {100 * chance:.1f} %)"
    match compare_with_chance(right, count, chance):
        case "at":
            raise LskdError(
                f"teacher '{name}' is at chance: {accuracy}; check its checkpoint, normalisation, image size "
                "and order of classes; TeacherHook with samples=0 trains on it nevertheless."
            )
        case "too few":
            return f"teacher '{name}': {accuracy}; too few images to tell it from chance"
    return f"teacher '{name}': {accuracy}"
