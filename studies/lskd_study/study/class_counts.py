"""Class counts that cannot match, found before the first run: else they fail hours later, in a student."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd_study.base.extras import needs_study_extra
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import Plan, Run
from lskd_study.trainers import timm, trainer_of


def check_class_counts(plan: Plan) -> None:
    """Compare what the trainers' files of the runs to do say of classes with the study's number.

    Raises:
        LskdError: for another number, and for weights to start from that are not there.
    """
    if plan.kind is TRANSLATION:
        return
    for run in {(run.config, run.model, run.role): run for run in plan.unfinished()}.values():
        if trainer_of(plan.ecosystem, run.role) is timm:
            _check_timm(plan, run)
        else:
            for key, found in _stated(plan.configs[run.config]):
                _compare(plan, run, key, found)


def _compare(plan: Plan, run: Run, what: str, found: object) -> None:
    if found != plan.num_classes:
        raise LskdError(
            f"{run.config}: {what} is {found}, the study's num_classes {plan.num_classes}; mend one of them"
        )


def _check_timm(plan: Plan, run: Run) -> None:
    config = plan.configs[run.config]
    arguments = config.get("model_kwargs") or {}
    if isinstance(arguments, Mapping) and "num_classes" in arguments:
        raise LskdError(f"{run.config}: model_kwargs sets num_classes, which the study sets; remove it there")
    weights = config.get("initial_checkpoint")
    if weights:
        _check_weights(plan, run, str(weights))


def _check_weights(plan: Plan, run: Run, name: str) -> None:
    with needs_study_extra():
        from timm.models import get_pretrained_cfg

        from timm_ls_kd.models import read_weights
    path = Path(plan.cwd, name)
    if not path.is_file():
        raise LskdError(
            f"{run.config}: initial_checkpoint {name} is not there; make it first, or remove the key"
        )
    known = None if ":" in run.model else get_pretrained_cfg(run.model)
    classifiers = getattr(known, "classifier", None) or ()
    content = read_weights(str(path))
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        weight = content.get(f"{classifier}.weight")
        if weight is not None:
            _compare(plan, run, f"the number of classes in initial_checkpoint {name}", len(weight))


def _stated(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield where a configuration of mmcls says how many classes there are, and what it says."""
    model = config.get("model") or {}
    heads = model.get("head") or {}
    for head in heads if isinstance(heads, list) else [heads]:
        if "num_classes" in head:
            yield "model.head.num_classes", head["num_classes"]
    if "num_classes" in (model.get("data_preprocessor") or {}):
        yield "model.data_preprocessor.num_classes", model["data_preprocessor"]["num_classes"]
    if "num_classes" in (config.get("data_preprocessor") or {}):
        yield "data_preprocessor.num_classes", config["data_preprocessor"]["num_classes"]
    for loader in ("train_dataloader", "val_dataloader"):
        dataset = (config.get(loader) or {}).get("dataset") or {}
        if "num_classes" in dataset:
            yield f"{loader}.dataset.num_classes", dataset["num_classes"]
