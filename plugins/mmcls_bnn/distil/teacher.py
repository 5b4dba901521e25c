"""The teacher: which one a recipe names, built from timm, torchvision or mmcls, tried and made fast."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmengine.dataset import default_collate
from mmengine.dist import get_dist_info
from torch import Tensor, nn

from lskd import (
    CheckpointError,
    Convention,
    FrozenTeacher,
    LskdError,
    load_teacher_weights,
    target_entropy,
    target_values,
)
from lskd.base.install import how_to_install
from lskd.checkpoints import load_strictly, settings_beside
from lskd.errors import DivergedError, one_line
from lskd.teachers.fast import FAST_BOUND, FAST_MODES, FastMode
from lskd.teachers.frozen import FAST_SAMPLES, Normalisation
from lskd.teachers.outputs import Autocast
from lskd.teachers.preflight import check_teacher, spread_indices
from lskd.teachers.replay import replayed
from mmcls_bnn.binary.packed import deployable
from mmcls_bnn.compat import MODELS, labels_of
from mmcls_bnn.recipe import check_count, read_config, settings_of

_IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_BATCH = 64

# A network, the images that it was trained with, and their height and width, where they are known.
_Built = tuple[nn.Module, Normalisation, tuple[int, int] | None]


@dataclass(frozen=True)
class TeacherSettings:
    """Which teacher, as a recipe's `model.teacher` says it.

    Attributes:
        checkpoint: the weights; nothing is ever downloaded.
        model: name of a timm or torchvision model.
        config: an mmcls config instead, whose `model` is the teacher.
        source: "timm", "torchvision" or "mmcls"; None: mmcls where there is a config, otherwise timm, whose
            ResNets also read torchvision's files.
        mean: of the teacher's images by channel, in mmcls' units (0 to 255); None: as it was trained, from
            the args.yaml beside a checkpoint of timm's trainers, its config, or the default of its library.
        std: the deviation likewise.
        image_size: resize batches to this side; None: from args.yaml, otherwise the student's size.
        kwargs: more arguments of the model.
        smoothing: alpha that it was trained with, where known; for the log.
        convention: of that alpha.
    """

    checkpoint: str
    model: str | None = None
    config: str | None = None
    source: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    image_size: int | None = None
    kwargs: Mapping[str, Any] | None = None
    smoothing: float | None = None
    convention: Convention = "paper"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TeacherSettings":
        """Build them from a recipe.

        Raises:
            LskdError: for a key that is unknown or missing, or a value out of range.
        """
        settings = settings_of(cls, values, "model.teacher", "checkpoint='FILE', ...", checkpoint="")
        if not settings.checkpoint:
            raise LskdError("model.teacher names no checkpoint; give checkpoint='FILE' there.")
        if settings.library not in _BUILDERS:
            raise LskdError(f"model.teacher has source {settings.source!r}; give timm, torchvision or mmcls.")
        wanted = "config" if settings.library == "mmcls" else "model"
        if not getattr(settings, wanted):
            raise LskdError(
                f"model.teacher of source '{settings.library}' needs {wanted}; add it to the recipe."
            )
        if (settings.mean is None) != (settings.std is None):
            raise LskdError("model.teacher has mean or std alone; give both, or none for the teacher's own.")
        if settings.image_size is not None:
            check_count("model.teacher.image_size", settings.image_size)
        if settings.smoothing is not None:
            try:
                target_values(2, settings.smoothing, settings.convention)
            except (TypeError, ValueError) as error:
                raise LskdError(f"model.teacher: {error}.") from None
        return settings

    @property
    def library(self) -> str:
        """Where the model comes from."""
        return self.source or ("mmcls" if self.config else "timm")

    @property
    def name(self) -> str:
        """What to call the teacher in messages."""
        return str(self.config if self.library == "mmcls" else self.model)


@dataclass(frozen=True)
class FastTeacherSettings:
    """`model.distillation.teacher_fast` of a recipe.

    Attributes:
        mode: "none", "auto", "float32", "bfloat16" or "int8", see :func:`lskd.teachers.fast.choose_fast`.
        bound: largest mean KL(exact || fast) in nats.
    """

    mode: FastMode = "auto"
    bound: float = FAST_BOUND

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "FastTeacherSettings":
        """Build them from a recipe.

        Raises:
            LskdError: for a key that is unknown, or a value out of range.
        """
        where = "model.distillation.teacher_fast"
        settings = settings_of(cls, values, where, "mode='auto'")
        if settings.mode not in FAST_MODES:
            raise LskdError(f"{where}.mode is {settings.mode!r}; it must be one of {', '.join(FAST_MODES)}.")
        bound = settings.bound
        if not isinstance(bound, int | float) or not 0 < bound < math.inf:
            raise LskdError(
                f"{where}.bound is {bound!r}; it must be a KL divergence in nats above 0, "
                f"{FAST_BOUND:g} by default."
            )
        return settings


class LogitsOf(nn.Module):
    """An mmcls classifier that returns the logits that mmcls' own evaluation makes scores of.

    Most heads return them; ConformerHead returns two tensors, and it is their sum that is evaluated.

    Args:
        classifier: it is changed: its predictions are these logits from now on.

    Raises:
        LskdError: a classifier without a head, or a head of several tasks.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        head = getattr(classifier, "head", None)
        last: Any = classifier if head is None else head
        if not hasattr(last, "_get_predictions"):
            raise LskdError(
                f"{type(last).__name__} gives no one score for each class; use a classifier with one head"
            )
        last._get_predictions = lambda logits, *_: logits

    def forward(self, batch: Tensor) -> Tensor:
        """Return logits `(B, K)`."""
        classifier: Any = self.classifier
        if getattr(classifier, "head", None) is None:  # timm's and Hugging Face's models in mmcls' clothes
            logits: Tensor = classifier.predict(batch)
        else:
            logits = classifier.head.predict(classifier.extract_feat(batch))
        return logits


def normalisation_of(preprocessor: Any, channels: int) -> Normalisation:
    """Return what mmcls' data preprocessor does to images, in mmcls' units (0 to 255)."""
    rgb = bool(preprocessor.to_rgb)
    if not getattr(preprocessor, "_enable_normalize", False):
        return Normalisation((0.0,) * channels, (1.0,) * channels, rgb)
    mean, std = (tuple(values.flatten().tolist()) for values in (preprocessor.mean, preprocessor.std))
    return Normalisation(mean, std, rgb)


def load_teacher(settings: TeacherSettings, num_classes: int, student: Normalisation) -> FrozenTeacher:
    """Build the teacher and load its weights, on the CPU.

    Raises:
        LskdError: unknown model, a checkpoint that is missing, unsafe or of another architecture, another
            count of classes or channels.
    """
    weights = load_teacher_weights(settings.checkpoint)  # first: a missing file is the commonest mistake
    model, own, size = _BUILDERS[settings.library](settings, num_classes, len(student.mean))
    if settings.mean is not None and settings.std is not None:
        own = Normalisation(tuple(map(float, settings.mean)), tuple(map(float, settings.std)), own.rgb)
    _check_channels(settings, len(own.mean), len(student.mean))
    _load(model, weights, settings, num_classes)
    if settings.library == "mmcls":
        model = LogitsOf(model)
    if settings.image_size is not None:
        size = settings.image_size, settings.image_size
    return FrozenTeacher(model, own, student, size, name=settings.name)


def describe_teacher(settings: TeacherSettings, teacher: FrozenTeacher, num_classes: int) -> str:
    """Return a line about which teacher was loaded, and what its smoothing makes of the loss."""
    line = f"teacher '{settings.name}' of {settings.library}: {settings.checkpoint}, "
    line += "images converted to its own normalisation" if teacher.converts else "normalisation the student's"
    if teacher.image_size is not None:
        line += f", resized to {teacher.image_size[0]} x {teacher.image_size[1]}"
    if settings.smoothing is not None:
        entropy = target_entropy(num_classes, settings.smoothing, 1.0, settings.convention)
        line += f"; trained with smoothing {settings.smoothing:g} ({settings.convention}): the entropy of an "
        line += f"ideal one is {entropy:.3f} nats, the least that its student's loss can be"
    return line


def try_teacher(model: Any, dataset: Any, samples: int) -> str:
    """Measure the teacher's accuracy over all processes and return a line about it.

    Args:
        samples: how many to take, spread over the set.

    Raises:
        LskdError: the teacher is not better than chance, or cannot process the images.
    """
    rank, processes = get_dist_info()
    batches = _batches(model, dataset, spread_indices(len(dataset), samples)[rank::processes], False)
    return check_teacher(
        model.load_teacher(),
        ((batch["inputs"], labels_of(batch["data_samples"])) for batch in batches),
        int(model.head.num_classes),
        size_option="model.teacher.image_size",
        skip_option="TeacherHook with samples=0",
    )


def autocast_of(device: torch.device, amp: torch.dtype | bool) -> Autocast:
    """Return what makes the context of a forward pass in training.

    Args:
        device: of the networks.
        amp: the type of mixed precision; True: torch's default for the device, False: none.
    """
    dtype = None if isinstance(amp, bool) else amp
    return partial(torch.autocast, device.type, dtype=dtype, enabled=bool(amp))


def speed_up(model: Any, dataset: Any, amp: torch.dtype | bool) -> str:
    """Make the teacher a fast one, as asked, and return a line about it.

    Args:
        model: an LsKdClassifier, whose exact teacher is replaced.
        dataset: the training images, with their transforms; every process takes the same ones.
        amp: the exact teacher's mixed precision, see :func:`autocast_of`.

    Raises:
        LskdError: a model for which the mode cannot be had, or an error above the bound.
    """
    teacher = model.load_teacher()
    with replayed(0):  # the run's own generators must not notice
        batches = _batches(model, dataset, spread_indices(len(dataset), FAST_SAMPLES), True)
        images = [batch["inputs"] for batch in batches]
    line: str = teacher.speed_up(
        images,
        model.teacher_mode,
        model.fast_settings.bound,
        option="model.distillation.teacher_fast",
        autocast=autocast_of(teacher.device, amp),
    )
    return line


def _batches(model: Any, dataset: Any, indices: Sequence[int], training: bool) -> Iterator[dict[str, Any]]:
    for start in range(0, len(indices), _BATCH):
        batch = default_collate([dataset[index] for index in indices[start : start + _BATCH]])
        yield model.data_preprocessor(batch, training)


def _timm(settings: TeacherSettings, num_classes: int, channels: int) -> _Built:
    try:
        import timm
    except ImportError:
        raise LskdError(
            f"the teacher is a timm model and timm is not installed here; {how_to_install('timm')}"
        ) from None
    name = str(settings.model)
    _check_name(name, name.partition(".")[0], timm.list_models(), "timm")
    run = settings_beside(settings.checkpoint, name)
    trained = int(run.get("in_chans") or (run.get("input_size") or (channels,))[0])
    _check_channels(settings, trained, channels)
    arguments = {
        "global_pool": run.get("gp"),  # weights fit any, and any bn_eps; timm leaves None to the model
        "bn_eps": run.get("bn_eps"),
        **(run.get("model_kwargs") or {}),
        **(settings.kwargs or {}),
    }
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, in_chans=channels, **arguments
        )
        data = timm.data.resolve_data_config(run, model=model)
    except Exception as error:  # timm and its models raise whatever they like
        raise LskdError(f"teacher '{name}' cannot be created: {one_line(error, 200)}") from None
    own = Normalisation.of(data["mean"], data["std"], channels, scale=255)
    if not run.keys() & {"img_size", "input_size"}:
        return model, own, None
    height, width = data["input_size"][-2:]  # both null: the model's default, which timm has resolved
    return model, own, (int(height), int(width))


def _torchvision(settings: TeacherSettings, num_classes: int, channels: int) -> _Built:
    from torchvision import models

    name = str(settings.model)
    _check_name(name, name, models.list_models(module=models), "torchvision")
    try:
        model: nn.Module = models.get_model(
            name, weights=None, num_classes=num_classes, **(settings.kwargs or {})
        )
    except (TypeError, ValueError) as error:
        raise LskdError(f"teacher '{name}' cannot be created: {one_line(error, 200)}") from None
    return model, _IMAGENET, None


def _mmcls(settings: TeacherSettings, num_classes: int, channels: int) -> _Built:
    path = str(settings.config)
    config = read_config(path, what="the teacher's config", kind="an mmcls config")
    try:
        # Weights come from the checkpoint alone: nothing is to be fetched or drawn for it.
        description = deployable(config)
        description["data_preprocessor"] = {**description["data_preprocessor"], "type": "ClsDataPreprocessor"}
        model: nn.Module = MODELS.build(description)
    except LskdError:
        raise
    except Exception as error:  # a config is a program, and the registry raises whatever its classes raise
        raise LskdError(f"the teacher cannot be built from {path}: {one_line(error, 200)}") from None
    found = getattr(getattr(model, "head", None), "num_classes", num_classes)
    if found != num_classes:
        raise LskdError(_other_classes(path, found, num_classes))
    return model, normalisation_of(model.data_preprocessor, channels), None


_BUILDERS = {"timm": _timm, "torchvision": _torchvision, "mmcls": _mmcls}


def _load(
    model: nn.Module, weights: Mapping[str, Tensor], settings: TeacherSettings, num_classes: int
) -> None:
    wanted = model.state_dict()
    for key in weights.keys() & wanted.keys():
        found, ours = weights[key].shape, wanted[key].shape
        # The classifier is what has as many rows as there are classes, and for the rest the same shape.
        if found != ours and ours[:1] == (num_classes,) and found[1:] == ours[1:]:
            raise CheckpointError(_other_classes(settings.checkpoint, found[0], num_classes))
    fix = "give model.teacher the model and the kwargs that it was trained with"
    try:
        load_strictly(model, weights, settings.name, settings.checkpoint, fix)
    except DivergedError as error:  # the teacher's training did; this one has not begun
        raise CheckpointError(f"{str(error).partition(';')[0]}; give another checkpoint.") from None


def _other_classes(where: str, found: int, wanted: int) -> str:
    return (
        f"the teacher in {where} has {found} classes, the student {wanted}; "
        "give a teacher that was trained on the student's classes."
    )


def _check_channels(settings: TeacherSettings, found: int, wanted: int) -> None:
    if found != wanted:
        raise LskdError(
            f"teacher '{settings.name}' takes {found} input channels, the student {wanted}; "
            "give a teacher that was trained on the student's images."
        )


def _check_name(name: str, architecture: str, known: list[str], library: str) -> None:
    if architecture in known:
        return
    near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"see the models of {library}."
    raise LskdError(f"unknown teacher '{name}': {library} has no such model; {hint}")
