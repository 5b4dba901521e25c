"""Building a teacher from timm, torchvision or an mmcls config, and loading its weights, all of them."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import Tensor, nn

from lskd import CheckpointError, LskdError, load_teacher_weights
from lskd.base.files import read_yaml
from lskd.base.install import how_to_install
from mmcls_bnn.binary.packed import deployable
from mmcls_bnn.compat import MODELS
from mmcls_bnn.distil.teacher import InputFormat, Teacher, TeacherSettings

_IMAGENET = InputFormat((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), rgb=True)


class LogitsOf(nn.Module):
    """An mmcls classifier that returns the logits that mmcls' own evaluation makes scores of.

    Most heads return them; ConformerHead returns two tensors, and it is their sum that is evaluated.

    Args:
        classifier: it is changed: its predictions are these logits from now on.

    Raises:
        LskdError: a classifier without a head, or a head of several tasks.
    """

    def __init__(self, classifier: nn.Module) -> None:
        """Let the part that makes predictions of logits give the logits."""
        super().__init__()
        self.classifier = classifier
        head = getattr(classifier, "head", None)
        last: Any = classifier if head is None else head
        if not hasattr(last, "_get_predictions"):
            raise LskdError(
                f"{type(last).__name__} gives no one score for each class; use a classifier with one head"
            )
        last._get_predictions = _as_they_are

    def forward(self, batch: Tensor) -> Tensor:
        """Return logits `(B, K)`."""
        classifier: Any = self.classifier
        if getattr(classifier, "head", None) is None:  # timm's and Hugging Face's models in mmcls' clothes
            logits: Tensor = classifier.predict(batch)
        else:
            logits = classifier.head.predict(classifier.extract_feat(batch))
        return logits


def _as_they_are(logits: Tensor, *_: Any) -> Tensor:
    return logits


def load_teacher(settings: TeacherSettings, num_classes: int, student: InputFormat) -> Teacher:
    """Build the teacher and load its weights, on the CPU.

    Args:
        settings: which teacher.
        num_classes: the student's class count.
        student: format of the student's batches.

    Raises:
        LskdError: unknown model, a checkpoint that is missing, unsafe or of another architecture, another
            count of classes or channels.
    """
    weights = load_teacher_weights(settings.checkpoint)  # first: a missing file is the commonest mistake
    build = {"timm": _timm, "torchvision": _torchvision, "mmcls": _mmcls}[settings.library]
    model, own, image_size = build(settings, num_classes, len(student.mean))
    if settings.mean is not None and settings.std is not None:
        own = InputFormat(tuple(map(float, settings.mean)), tuple(map(float, settings.std)), own.rgb)
    if len(own.mean) != len(student.mean):
        raise LskdError(
            f"teacher '{settings.name}' takes {len(own.mean)} input channels, the student "
            f"{len(student.mean)}; give a teacher that was trained on the student's images."
        )
    _load(model, weights, settings, num_classes)
    if settings.library == "mmcls":
        model = LogitsOf(model)
    return Teacher(model, own, student, settings.image_size or image_size)


def _timm(
    settings: TeacherSettings, num_classes: int, channels: int
) -> tuple[nn.Module, InputFormat, int | None]:
    try:
        import timm
    except ImportError:
        raise LskdError(
            f"the teacher is a timm model and timm is not installed here; {how_to_install('timm')}"
        ) from None
    name = str(settings.model)
    _check_name(name, name.partition(".")[0], timm.list_models(), "timm")
    run = _run_settings(Path(settings.checkpoint), name)
    trained = int(run.get("in_chans") or (run.get("input_size") or (channels,))[0])
    if trained != channels:
        raise LskdError(
            f"teacher '{name}' takes {trained} input channels, the student {channels}; "
            "give a teacher that was trained on the student's images."
        )
    arguments = {**(run.get("model_kwargs") or {}), **(settings.kwargs or {})}
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, in_chans=channels, **arguments
        )
        data = timm.data.resolve_data_config(run, model=model)
    except Exception as error:  # timm and its models raise whatever they like
        raise LskdError(f"teacher '{name}' cannot be created: {_one_line(error)}") from None
    own = InputFormat(_scaled(data["mean"], channels), _scaled(data["std"], channels), rgb=True)
    return model, own, int(data["input_size"][-1]) if run.get("img_size") else None


def _torchvision(
    settings: TeacherSettings, num_classes: int, channels: int
) -> tuple[nn.Module, InputFormat, int | None]:
    from torchvision import models

    name = str(settings.model)
    _check_name(name, name, models.list_models(module=models), "torchvision")
    try:
        model: nn.Module = models.get_model(
            name, weights=None, num_classes=num_classes, **(settings.kwargs or {})
        )
    except (TypeError, ValueError) as error:
        raise LskdError(f"teacher '{name}' cannot be created: {_one_line(error)}") from None
    return model, _IMAGENET, None


def _mmcls(
    settings: TeacherSettings, num_classes: int, channels: int
) -> tuple[nn.Module, InputFormat, int | None]:
    path = str(settings.config)
    if not Path(path).is_file():
        raise LskdError(f"the teacher's config {path} does not exist; give the path of an mmcls config.")
    try:
        config = Config.fromfile(path)
        # Weights come from the checkpoint alone: nothing is to be fetched or drawn for it.
        description = deployable(config.model.to_dict(), config.get("data_preprocessor"))
        description["data_preprocessor"] = {**description["data_preprocessor"], "type": "ClsDataPreprocessor"}
        model: nn.Module = MODELS.build(description)
    except LskdError:
        raise
    except Exception as error:  # a config is a program, and the registry raises whatever its classes raise
        raise LskdError(f"the teacher cannot be built from {path}: {_one_line(error)}") from None
    found = getattr(getattr(model, "head", None), "num_classes", num_classes)
    if found != num_classes:
        raise LskdError(_other_classes(path, found, num_classes))
    return model, InputFormat.of_preprocessor(model.data_preprocessor, channels), None


def _load(
    model: nn.Module, weights: Mapping[str, Tensor], settings: TeacherSettings, num_classes: int
) -> None:
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unexpected:
        example = (
            f"it has no '{missing[0]}'" if missing else f"it has '{unexpected[0]}', which the model has not"
        )
        raise CheckpointError(
            f"{settings.checkpoint} holds weights of another architecture than {settings.name}: {example} "
            f"({len(missing)} missing, {len(unexpected)} unexpected); name the model it was saved from."
        )
    for key, tensor in weights.items():
        if tensor.shape == wanted[key].shape:
            continue
        # The classifier is what has as many rows as there are classes, and for the rest the same shape.
        if wanted[key].shape[:1] == (num_classes,) and tensor.shape[1:] == wanted[key].shape[1:]:
            raise CheckpointError(_other_classes(settings.checkpoint, tensor.shape[0], num_classes))
        raise CheckpointError(
            f"{settings.checkpoint} does not fit {settings.name}: '{key}' is {list(tensor.shape)}, the "
            f"model's is {list(wanted[key].shape)}; give model.teacher the kwargs it was trained with."
        )
    model.load_state_dict(dict(weights))


def _other_classes(where: str, found: int, wanted: int) -> str:
    return (
        f"the teacher in {where} has {found} classes, the student {wanted}; "
        "give a teacher that was trained on the student's classes."
    )


def _check_name(name: str, architecture: str, known: list[str], library: str) -> None:
    if architecture in known:
        return
    near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"see the models of {library}."
    raise LskdError(f"unknown teacher '{name}': {library} has no such model; {hint}")


def _run_settings(checkpoint: Path, name: str) -> dict[str, Any]:
    """Read the args.yaml that timm's trainers leave beside a checkpoint; {} when it is not this model's."""
    try:
        content = read_yaml(checkpoint.parent / "args.yaml")
    except LskdError:
        return {}
    if not isinstance(content, dict) or str(content.get("model")).partition(".")[0] != name.partition(".")[0]:
        return {}
    return content


def _scaled(values: Any, channels: int) -> tuple[float, ...]:
    """Turn timm's units (0 to 1) into mmcls' (0 to 255); other channel counts get the average, as in timm."""
    if len(values) != channels:
        values = (sum(values) / len(values),) * channels
    return tuple(255 * float(value) for value in values)


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
