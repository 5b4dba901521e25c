"""The teacher: a frozen timm model that reads the student's batches in its own normalisation and size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.loader import PrefetchLoader, fast_collate
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lskd import Convention, LskdError, target_mass
from lskd.errors import one_line
from lskd.teachers.fast import FastTeacher, TeacherForm, choose_fast
from lskd.teachers.outputs import logits_of
from lskd.teachers.preflight import compare_with_chance
from lskd.teachers.replay import augmentation_seed, replayed
from timm_ls_kd.arguments import KdConfig
from timm_ls_kd.data import Normalisation, input_channels
from timm_ls_kd.models import check_model_name, create, first_channels, input_arguments, load_weights
from timm_ls_kd.run_settings import settings_beside


class Teacher:
    """A frozen teacher that answers to the student's batches.

    No `nn.Module` on purpose: a task that holds one as an attribute does not own its parameters, so they are
    in no checkpoint, moving average, optimiser or DistributedDataParallel bucket.

    Args:
        model: a classifier; it is put in eval mode and frozen.
        teacher_norm: the normalisation the model was trained with.
        student_norm: the normalisation of the batches it will get.
        image_size: resize batches to this height and width, None: leave them as they are.
        dtype: precision of weights and forward pass; None: float32 weights, and the caller's autocast.
        channels_last: memory layout of the weights.
        smoothing: alpha and convention that the model was trained with, where known.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher_norm: Normalisation,
        student_norm: Normalisation,
        image_size: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        smoothing: tuple[float, Convention] | None = None,
    ) -> None:
        """Freeze the model."""
        self.model = model.eval().requires_grad_(False)
        if dtype is not None:
            model.to(dtype=dtype)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.teacher_norm = teacher_norm
        self.image_size = image_size
        self.smoothing = smoothing
        self.dtype = dtype
        self._forward: Any = model
        self._fast: FastTeacher | None = None
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None
        if not teacher_norm.same_as(student_norm):
            # (x s_s + m_s - m_t) / s_t as one multiplication and one addition.
            mean, std = (torch.tensor(v, dtype=torch.float64) for v in (student_norm.mean, student_norm.std))
            own_mean, own_std = (
                torch.tensor(v, dtype=torch.float64) for v in (teacher_norm.mean, teacher_norm.std)
            )
            self._scale = (std / own_std).float().view(1, -1, 1, 1)
            self._shift = ((mean - own_mean) / own_std).float().view(1, -1, 1, 1)

    def to(self, device: torch.device | None) -> "Teacher":
        """Move weights and constants to `device`; precision stays the teacher's own."""
        self.model.to(device=device)
        if self._scale is not None and self._shift is not None:
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def compile(self, **kwargs: Any) -> None:
        """Compile the forward pass with `torch.compile(**kwargs)`; a fast teacher is compiled on its own."""
        if self._fast is None:
            self._forward = torch.compile(self.model, **kwargs)

    def use(self, fast: FastTeacher) -> None:
        """Answer with a fast teacher from now on, and let go of the exact model."""
        self._fast = fast
        self.model, self._forward = fast.model, None

    @property
    def form(self) -> TeacherForm:
        """In which form it answers."""
        return TeacherForm() if self._fast is None else self._fast.form

    def prepare(self, batch: Tensor) -> Tensor:
        """Turn a batch in the student's normalisation into what the model gets, in float32."""
        if self._scale is not None and self._shift is not None:
            # In float32: half a batch's precision must not be lost before the teacher sees it.
            batch = torch.addcmul(self._shift, batch.float(), self._scale)
        if self.image_size is not None and tuple(batch.shape[-2:]) != self.image_size:
            batch = functional.interpolate(
                batch.float(), size=self.image_size, mode="bicubic", antialias=True, align_corners=False
            )
        return batch.float()

    def answer(self, images: Tensor) -> Any:
        """Return what the model returns for prepared images."""
        if self._fast is not None:
            return self._fast(images)
        if self.dtype is None:
            return self._forward(images)
        with torch.autocast(images.device.type, enabled=False):
            return self._forward(images.to(self.dtype))

    def __call__(self, batch: Tensor) -> Tensor:
        """Return logits `(B, K)` for a batch `(B, C, H, W)` in the student's normalisation."""
        with torch.inference_mode():
            logits = logits_of(self.answer(self.prepare(batch)))
        # Autograd refuses to save an inference tensor for the student's backward pass: hand out a normal copy
        # (B x K numbers), made outside the inference mode.
        return logits.clone()


def create_teacher(
    config: KdConfig,
    num_classes: int,
    in_chans: int,
    student_norm: Normalisation,
    channels_last: bool = False,
) -> Teacher:
    """Create the teacher that `config` names, with its weights loaded, on the CPU.

    Args:
        config: the distillation arguments.
        num_classes: the student's class count.
        in_chans: the student's input channels.
        student_norm: normalisation of the batches, as the loader really applies it.
        channels_last: whether the student uses that memory layout.

    Raises:
        LskdError: unknown model, weights that cannot be had or do not fit, another class or channel count.
    """
    check_model_name(config.teacher, "teacher")
    if config.checkpoint is None:
        model, settings, source = _pretrained(config, num_classes, in_chans)
    else:
        model, settings, source = _from_checkpoint(config, num_classes, in_chans)
    try:
        data_config = timm.data.resolve_data_config(settings, model=model)
    except (AssertionError, TypeError, ValueError):
        raise LskdError(
            f"args.yaml beside {config.checkpoint} names an image size, mean or std that timm cannot use; "
            "repair it or move the checkpoint elsewhere."
        ) from None
    channels = first_channels(model)
    return Teacher(
        model,
        Normalisation.of(data_config["mean"], data_config["std"], channels, source),
        student_norm,
        image_size=_image_size(config, model, settings, data_config["input_size"]),
        dtype=None if config.teacher_dtype is None else getattr(torch, config.teacher_dtype),
        channels_last=channels_last,
        smoothing=_smoothing(settings),
    )


def announce_teacher(kd: KdConfig) -> str:
    """Say which weights are about to be loaded; a download, or a hub that does not answer, takes its time."""
    return f"teacher '{kd.teacher}': loading {kd.checkpoint or 'the pretrained weights of timm'}"


def describe_teacher(
    kd: KdConfig, teacher: Teacher, student_norm: Normalisation, num_classes: int
) -> Iterator[str]:
    """Say how the teacher's input is made from the student's, and warn of a temperature that spoils it."""
    own = teacher.teacher_norm
    line = f"teacher '{kd.teacher}': normalisation {own}, {own.source}; the student's is "
    line += "the same" if own.same_as(student_norm) else f"{student_norm}, converted"
    if teacher.image_size is not None:
        line += f"; images resized to {teacher.image_size[0]} x {teacher.image_size[1]} where they differ"
    yield line
    if teacher.smoothing is not None and kd.temperature > 1:
        alpha, convention = teacher.smoothing
        cold, hot = (target_mass(num_classes, alpha, t, convention) for t in (1.0, kd.temperature))
        yield (
            f"teacher '{kd.teacher}' was trained with smoothing {alpha:g}: what it gives its own class falls "
            f"from about {cold:.3f} to {hot:.3f} at --kd-temperature {kd.temperature:g}, which often harms; "
            "1 is the paper's"
        )


def _pretrained(config: KdConfig, num_classes: int, in_chans: int) -> tuple[nn.Module, dict[str, Any], str]:
    name = config.teacher
    known = timm.models.get_pretrained_cfg(name) if ":" not in name else None
    mend = "give your own with --kd-teacher-checkpoint FILE"
    if ":" not in name and (known is None or not known.has_weights):
        raise LskdError(f"timm has no pretrained weights for teacher '{name}'; {mend}.")
    if known is not None:
        _check_counts(name, known.num_classes, num_classes, known.input_size[0], in_chans, mend)
    model = create(
        name,
        "teacher",
        mend="give the weights with --kd-teacher-checkpoint FILE",
        pretrained=True,
        extra=_arguments(config, {}),
    )
    # num_classes was not passed: this head is the one that came with the weights.
    _check_counts(
        name, int(getattr(model, "num_classes", 0)), num_classes, first_channels(model), in_chans, mend
    )
    return model, {}, "of its pretrained weights"


def _check_counts(
    name: str, classes: int, wanted_classes: int, channels: int, wanted_channels: int, mend: str
) -> None:
    if classes != wanted_classes:
        raise LskdError(
            f"teacher '{name}' has {classes} classes in its pretrained weights, "
            f"the student {wanted_classes}; {mend}, trained on the student's classes."
        )
    if channels != wanted_channels:
        raise LskdError(
            f"teacher '{name}' takes {channels} input channels, the student {wanted_channels}; "
            f"{mend}, trained with --in-chans {wanted_channels}."
        )


def _from_checkpoint(
    config: KdConfig, num_classes: int, in_chans: int
) -> tuple[nn.Module, dict[str, Any], str]:
    checkpoint = str(config.checkpoint)
    settings = settings_beside(Path(checkpoint), config.teacher)
    trained_channels = input_channels(settings)
    if settings and trained_channels != in_chans:
        raise LskdError(
            f"teacher checkpoint {checkpoint} takes {trained_channels} input channels, "
            f"the student {in_chans}; give a teacher that was trained with --in-chans {in_chans}."
        )
    model = create(
        config.teacher,
        "teacher",
        pretrained=False,
        num_classes=num_classes,
        in_chans=in_chans,
        global_pool=settings.get("gp"),
        extra=_arguments(config, settings),
    )
    load_weights(model, f"teacher '{config.teacher}'", checkpoint)
    if settings:
        return model, settings, "of the run beside its checkpoint (args.yaml)"
    return model, {}, "timm's default for this model"


def _smoothing(settings: dict[str, Any]) -> tuple[float, Convention] | None:
    alpha = settings.get("smoothing")
    if settings.get("kd_teacher") or not isinstance(alpha, float) or not 0 < alpha < 1:
        return None
    return alpha, "paper" if settings.get("smoothing_convention") == "paper" else "uniform"


def _arguments(config: KdConfig, settings: dict[str, Any]) -> dict[str, Any]:
    if config.teacher_img_size is not None:
        settings = {**settings, "img_size": config.teacher_img_size}
    return {**input_arguments(config.teacher, settings), **config.teacher_kwargs}


def _image_size(
    config: KdConfig, model: nn.Module, settings: dict[str, Any], trained_at: Sequence[int]
) -> tuple[int, int] | None:
    """Return the height and width to resize batches to; None: unknown, the teacher gets the student's."""
    if config.teacher_img_size is not None:
        return config.teacher_img_size, config.teacher_img_size
    pretrained_cfg = getattr(model, "pretrained_cfg", {})
    size: Sequence[int]
    if pretrained_cfg.get("fixed_input_size"):
        size = (
            getattr(getattr(model, "patch_embed", None), "img_size", None)
            or pretrained_cfg["input_size"][-2:]
        )
    elif config.checkpoint is None or "img_size" in settings or "input_size" in settings:
        # Both null in a run's args.yaml: it was trained at the model's default, which timm has resolved.
        size = trained_at[-2:]
    else:
        return None
    return int(size[0]), int(size[1])


MOST_SAMPLES = 256  # they are held in memory
# Layers of timm that may be folded, see lskd.fold_batch_norm.
CONVOLUTIONS = (Conv2dSame,)
NORMS: dict[type[nn.Module], Any] = {BatchNormAct2d: lambda norm: nn.Sequential(norm.drop, norm.act)}


class Augmented(Dataset[Any]):
    """A script's training images as their transform makes them of a seed; its own draws stay as they are."""

    def __init__(self, dataset: Any, seed: int) -> None:
        """Wrap `dataset`."""
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return an image and its label, the same each time."""
        allow = getattr(getattr(self.dataset, "reader", None), "allow", None)
        if allow is not None:  # a reader that gives each image once, see timm_ls_kd.loader
            allow(index)
        with replayed(augmentation_seed(self.seed, 0, index)):
            return self.dataset[index]


def speed_up(
    kd: KdConfig,
    teacher: Teacher,
    dataset: Any,
    student_norm: Normalisation,
    device: torch.device,
    *,
    prefetch: bool,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> str:
    """Make the teacher a fast one, as asked, and return a line about it.

    Every process takes the same images, so that all get the same teacher. They are augmented, because that is
    what the teacher is asked about: it lies further out than validation images, and 8 bits cost more there.

    Args:
        kd: the distillation arguments.
        teacher: the exact teacher; it is changed.
        dataset: training images, each augmented the same way whenever it is asked for.
        student_norm: normalisation of the batches.
        device: of the teacher.
        prefetch: whether the transform leaves normalising to timm's prefetcher.
        batch_size: of training.
        autocast: context of the exact teacher in training.

    Raises:
        LskdError: no images, a model for which the mode cannot be had, or an error above the bound.
    """
    if isinstance(getattr(dataset, "dataset", dataset), IterableDataset):
        raise LskdError(
            "--kd-teacher-fast measures its error on training images of its choice, and this data set can "
            "only be streamed; drop it, or give a folder of images or a tar file."
        )
    indices = spread_indices(len(dataset), min(kd.preflight_samples, MOST_SAMPLES))
    with torch.inference_mode():
        images = torch.cat(
            [
                teacher.prepare(images)
                for images, _ in spread_batches(dataset, indices, student_norm, device, prefetch=prefetch)
            ]
        )

    def exact(batch: Tensor) -> Any:
        with autocast():
            return teacher.answer(batch)

    try:
        choice = choose_fast(
            teacher.model,
            images,
            kd.teacher_fast,
            kd.teacher_fast_bound,
            exact=exact,
            convolutions=CONVOLUTIONS,
            norms=NORMS,
            compiled=kd.teacher_compile,
            batch_size=batch_size,
        )
    except LskdError as error:
        raise LskdError(f"teacher '{kd.teacher}', --kd-teacher-fast {kd.teacher_fast}: {error}") from None
    teacher.use(choice.teacher)
    return f"teacher '{kd.teacher}', fast: {choice.line}"


SIGNIFICANCE = 0.01
_BATCH = 64


def spread_indices(total: int, count: int) -> list[int]:
    """Choose `count` of `total` indices at even distances: a folder is sorted by class."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def spread_batches(
    dataset: Any, indices: Sequence[int], student_norm: Normalisation, device: torch.device, prefetch: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of chosen samples as the training loop sees them: in the student's normalisation.

    Args:
        dataset: map-style data set whose transform is set already.
        indices: samples to take.
        student_norm: what is applied on the device when `prefetch`, otherwise the transform has done it.
        device: where batches go.
        prefetch: whether the transform leaves normalising to timm's prefetcher.
    """
    loader: Any = DataLoader(
        Subset(dataset, list(indices)), batch_size=_BATCH, collate_fn=fast_collate if prefetch else None
    )
    if prefetch:
        mean, std = student_norm.mean, student_norm.std
        loader = PrefetchLoader(loader, mean=mean, std=std, channels=len(mean), device=device)
    for images, targets in loader:
        yield images.to(device), targets.to(device)


def check_teacher_accuracy(
    teacher: Teacher,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    name: str,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
) -> str:
    """Measure the teacher's accuracy over all processes and return a line about it.

    Args:
        teacher: the teacher to check.
        batches: this process's share of the images.
        num_classes: class count.
        name: the teacher's name, for messages.
        device: where counts are kept.
        autocast: context of the forward pass in training.
        channels_last: memory layout of batches in training.

    Raises:
        LskdError: the teacher is not better than chance (one-sided binomial test at 1 %), chance being the
            larger of 1/K and the share of the most frequent class.
    """
    counts = torch.zeros(num_classes + 1, dtype=torch.float32, device=device)
    for images, targets in batches:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = answer(teacher, images, name)
        counts[0] += (logits.argmax(-1) == targets).sum()
        counts[1:] += torch.bincount(targets, minlength=num_classes)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)  # every process then comes to the same verdict
    right, *per_class = (int(value) for value in counts.tolist())
    total = sum(per_class)
    return verdict(right, total, max(1 / num_classes, max(per_class) / max(total, 1)), name)


def answer(teacher: Teacher, images: Tensor, name: str) -> Tensor:
    """Return the teacher's logits.

    Raises:
        LskdError: the teacher cannot process images of this shape.
    """
    try:
        return teacher(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        shape = " x ".join(str(size) for size in images.shape[1:])
        raise LskdError(
            f"teacher '{name}' cannot process {shape} images ({one_line(error)}); "
            "set --kd-teacher-img-size to the size it was trained on."
        ) from None


def accuracy_text(right: int, total: int, chance: float) -> str:
    """Say how many images a model is right on, and how many a guess."""
    return f"{100 * right / total:.1f} % of {total} validation images (chance {100 * chance:.1f} %)"


def verdict(right: int, total: int, chance: float, name: str) -> str:
    """Return the line for `right` of `total` against `chance`, or refuse the teacher."""
    if total == 0:
        return f"teacher '{name}': no validation images, its accuracy is not checked"
    accuracy = accuracy_text(right, total, chance)
    compared = compare_with_chance(right, total, chance, SIGNIFICANCE)
    if compared == "too few":
        return f"teacher '{name}': {accuracy}; too few images to tell it from chance"
    if compared == "at":
        raise LskdError(
            f"teacher '{name}' is at chance: right on {accuracy}; "
            "check its checkpoint, normalisation, image size (--kd-teacher-img-size) and class order; "
            "--kd-preflight-samples 0, in YAML kd_preflight_samples: 0, trains on it nevertheless."
        )
    return f"teacher '{name}': right on {accuracy}"
