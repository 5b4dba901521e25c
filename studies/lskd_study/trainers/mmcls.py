"""mmcls: the command line of a student's run, its configuration, and its logs in the common vocabulary."""

import json
import runpy
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd.base.files import whole_file
from lskd.base.images import class_folders
from lskd.base.install import how_to_install
from lskd.errors import one_line
from lskd_study.plan.plan import CHECKPOINT, Plan, Role, Run, Store, exact
from lskd_study.plan.records import Size
from lskd_study.plan.schema import read_trainer_config
from lskd_study.trainers.timm import Timm
from lskd_study.trainers.trainer import (
    MIXED,
    CannotStoreError,
    Exported,
    TryOut,
    Views,
    check_classes,
    read_epochs,
)

VERIFIED = 16  # stored images
_LATEST = "last_checkpoint"
_HOOKS = ("SafeCheckpointHook", "CurvesHook", "TeacherHook")
# Parts that are read, each after what it is in.
_DICTS = (
    *("model", "model.teacher", "model.distillation", "model.backbone", "model.train_cfg"),
    *("train_cfg", "optim_wrapper", "train_dataloader", "train_dataloader.dataset"),
    *("train_dataloader.sampler", "val_dataloader", "val_dataloader.dataset"),
)
_SAMPLERS = ("DefaultSampler", "SequentialSampler")
# Transforms that draw from Python's, NumPy's or torch's generators, by the package that they come from.
_REPLAYED = ("mmcls.", "mmpretrain.", "mmcv.", "mmengine.", "mmcls_bnn.", "torchvision.")
_NOT_REPLAYED = ("Albumentations", "Albu")
_SET = ("model", "checkpoint", "smoothing", "convention")  # of the teacher, by the study


class Mmcls:
    """mmcls' training script, for students; their teachers are timm's."""

    checkpoint = CHECKPOINT
    # Its own, and the distillation loss on the validation set, which timm does not log: Fig. 6.
    curve_columns: tuple[str, ...] = (
        *Timm.curve_columns,
        *("val_ce", "val_kl", "val_teacher_entropy", "val_agreement", "flip_ratio"),
    )
    # The folders of mmengine's logs, one for each start, stay.
    files: tuple[str, ...] = (CHECKPOINT, _LATEST, "epoch_*.pth", "best_*.pth", "epochs.csv", ".epochs.csv")
    without_effect: tuple[str, ...] = (
        *("*_dataloader.num_workers", "*_dataloader.persistent_workers", "*_dataloader.pin_memory"),
        *("*_dataloader.prefetch_factor", "default_hooks.logger.*", "log_level", "log_processor.*"),
        *("default_hooks.checkpoint.max_keep_ckpts", "vis_backends.*", "visualizer.*", "work_dir"),
        # What the study sets itself for each run.
        *("model.teacher.model", "model.teacher.checkpoint", "model.teacher.smoothing", "randomness.seed"),
        "*_dataloader.dataset.data_root",
    )
    modules: tuple[str, ...] = ("mmcls_bnn.evaluation", "timm_ls_kd.trainer.main", "torch._dynamo")
    stores_while_training = True

    def read_config(self, path: Path) -> dict[str, Any]:
        """Return a configuration's content in plain values, its bases included; or of a YAML file."""
        if path.suffix != ".py":
            return read_trainer_config(path)
        from mmengine.config import Config

        if not path.is_file():
            raise LskdError(f"cannot read the trainer's file {path} (no such file)")
        try:
            content = Config.fromfile(str(path), import_custom_modules=False).to_dict()
        except Exception as error:  # a configuration is a program
            raise LskdError(
                f"{path} is no configuration of mmcls ({one_line(error, 200)}); repair it"
            ) from None
        plain: dict[str, Any] = json.loads(json.dumps(content, default=str))
        return plain

    def check_config(self, config: dict[str, Any], path: str, role: Role, model: str) -> None:
        """Check that it is of a distilled student, and that its hooks leave what a study reads.

        A control, too, is a distilled student's configuration, trained without its teacher.
        """
        _check_parts(config, path)
        if (config.get("model") or {}).get("type") != "LsKdClassifier":
            raise LskdError(f"{path}: its model is not an LsKdClassifier; see recipes/reactnet/digits_kd.py")
        if not (config["model"].get("teacher") or {}).get("model"):
            raise LskdError(f"{path}: model.teacher must name a timm model; the study sets which one")
        if role == "control" and config["model"].get("step1_checkpoint"):
            raise LskdError(
                f"{path}: step1_checkpoint was taught, a control is not; give TwoStepHook in its place, or "
                "leave controls out"
            )
        for needed in _HOOKS:
            if needed not in _hooks(config):
                raise LskdError(f"{path}: custom_hooks lacks {needed}; add dict(type='{needed}')")

    def check_run(self, plan: Plan, run: Run) -> None:
        """Check its options, all places that say how many classes there are, and the classes' order."""
        _check_options(_options(plan, run))
        for key, found in _class_counts(plan.configs[run.config]):
            check_classes(plan, run, key, found)
        if plan.data_dir.exists():
            check_class_order(plan.data_dir, plan.data)

    def rehearsal(self, plan: Plan) -> TryOut:
        """Return what builds a student by mmengine's registries, without its teacher."""
        from mmcls_bnn import compat, register

        assert register  # importing it is what registers
        compat.use_registry()
        return partial(_try_out, plan)

    def epochs(self, plan: Plan, run: Run) -> int:
        """Return how many epochs a student trains; 0 where it trains by iterations."""
        return int((plan.configs[run.config].get("train_cfg") or {}).get("max_epochs") or 0)

    def decays(self, plan: Plan, run: Run) -> list[int]:
        """Return after how many epochs the rate steps down: of its schedules that step by epochs."""
        schedules, found = plan.configs[run.config].get("param_scheduler") or [], set[int]()
        for one in schedules if isinstance(schedules, list) else [schedules]:
            if one.get("by_epoch", True):
                found |= set(one.get("milestones") or ())
                if step := one.get("step_size"):
                    found |= set(range(step, self.epochs(plan, run), step))
        hooks = plan.configs[run.config].get("custom_hooks") or []
        steps = [hook.get("epochs") for hook in hooks if hook.get("type") == "TwoStepHook"]
        found |= {epochs for epochs in steps if isinstance(epochs, int)}  # the hook refuses all else
        return sorted(found)

    def command(self, plan: Plan, run: Run, output: str | None = None) -> list[str]:
        """Return ``mim train mmcls ...``."""
        folder = Path(output, run.id) if output else Path(plan.output, run.folder)
        options = _options(plan, run, output)
        return ["mim", "train", "mmcls", run.config, "--work-dir", str(folder), "--cfg-options", *options]

    def train(self, arguments: list[str]) -> None:
        """Run what ``mim`` runs (``train mmcls CONFIG ...``), and name its last checkpoint."""
        spec = find_spec("mmcls")
        if spec is None or spec.origin is None:
            raise LskdError(f"mmcls is not installed here; {how_to_install('mmcls')}")
        script = Path(spec.origin).parent / ".mim" / "tools" / "train.py"
        options = arguments[2:]
        before, sys.argv = sys.argv, [str(script), *options]
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            sys.argv = before
        folder = Path(options[options.index("--work-dir") + 1])
        latest = Path((folder / _LATEST).read_text(encoding="utf-8").strip())
        with whole_file(folder / CHECKPOINT) as scratch:
            shutil.copyfile(folder / latest.name, scratch)

    def resume(self, folder: Path) -> list[str] | None:
        """Return ``--resume`` where mmengine has noted a checkpoint."""
        return ["--resume"] if (folder / _LATEST).is_file() else None

    def read_curves(self, folder: Path, role: Role) -> list[dict[str, str]]:
        """Return a run's epochs in the common columns, from the table of `CurvesHook`."""
        from mmcls_bnn.distil.curves import FILE

        rows = read_epochs(folder / FILE)
        common = [{name: row.get(name) or "" for name in self.curve_columns} for row in rows]
        return [row | {"epoch": str(int(row["epoch"]) - 1)} for row in common]

    def collect(self, folder: Path, data_dir: Path) -> Any:
        """Return logits, labels and keys of the validation images, an `lskd.teachers.outputs.Evaluation`.

        Raises:
            LskdError: for a run that cannot be evaluated, or whose accuracy is then not the trainer's own.
        """
        from mmcls_bnn.evaluation import evaluate_config

        config = max(folder.glob("*.py"), key=lambda path: path.stat().st_mtime)  # dumped at each start
        found = evaluate_config(config, folder / CHECKPOINT, data_dir, "val").evaluation()
        top1 = 100 * float((found.logits.argmax(-1) == found.labels).float().mean())
        own = self.read_curves(folder, "student")[-1]["val_top1"]
        # Another normalisation or another transform would go unnoticed in a table.
        if own and abs(top1 - float(own)) > 0.5:
            raise LskdError(
                f"{folder}: {top1:.2f} % of the validation images are right, in the trainer's own log {own} "
                "%; the configuration is not evaluated as it was trained, so nothing is stored"
            )
        return found

    def export(
        self, folder: Path, output: Path, class_names: list[str] | None, data_dir: Path | None
    ) -> Exported:
        """Write the packed weights and the configuration of the student alone.

        The validation images are not asked: their pipeline is a program in the run's folder.
        """
        from mmcls_bnn.export import export_run

        model, images = export_run(folder / CHECKPOINT, output, class_names)
        usage = (
            "from mmcls_bnn.binary.packed import load_packed\n\n"
            'model = load_packed("FOLDER/model.safetensors")  # model(images, mode="tensor") gives logits'
        )
        return Exported(model, images, None, "mmcls", usage, any_size=True)

    def size(self, plan: Plan, run: Run) -> Size:
        """Return the student's parameters and operations, as `python -m mmcls_bnn.complexity` counts them.

        How large and fast it is deployed is measured on weights as they are drawn, which changes neither.
        """
        from mmcls_bnn.binary.layers import image_channels
        from mmcls_bnn.binary.packed import build_student
        from mmcls_bnn.complexity import count
        from mmcls_bnn.profile import deployed
        from mmcls_bnn.recipe import read_recipe

        recipe = read_recipe(run.config)
        if run.real:
            recipe["backbone"]["binarize"] = []
        model: Any = build_student(recipe)
        pixels = _image_size(plan.configs[run.config])
        channels = image_channels(model)
        found = count(model, channels, pixels or 64)
        of_file, ms = deployed(model, (1, channels, pixels, pixels)) if pixels else (None, None)
        return Size(
            parameters=found.binary_parameters + found.real_parameters,
            operations=round(2 * found.ops) if pixels else None,
            binary=0 if run.real else found.binary_parameters,
            file_bytes=of_file,
            image_ms=ms,
        )

    def views(self, plan: Plan, run: Run) -> Views:
        """Return what a student's training images follow from: its data set's and its teacher's settings."""
        config = plan.configs[run.config]
        model, loader = config["model"], config.get("train_dataloader") or {}
        loss, dataset = model.get("distillation") or {}, dict(loader.get("dataset") or {})
        sampler = (loader.get("sampler") or {}).get("type", "DefaultSampler")
        obstacles = {
            "has a store of its own": loss.get("soft_labels"),
            "has no SoftLabelsHook in custom_hooks": "SoftLabelsHook" not in _hooks(config),
            "does not train by epochs": not (config.get("train_cfg") or {}).get("by_epoch"),
            f"has {sampler}, and each image must come once in an epoch": sampler not in _SAMPLERS,
            f"has a data set of data sets, {dataset.get('type')}": {"dataset", "datasets"} & dataset.keys(),
        }
        for obstacle, there in obstacles.items():
            if there:
                raise CannotStoreError(f"{run.config} {obstacle}")
        _check_transforms(run.config, dataset.get("pipeline"))
        preprocessors = [
            part["data_preprocessor"] for part in (config, model) if part.get("data_preprocessor")
        ]
        train = model.get("train_cfg") or {}  # mmcls makes its augments those of the preprocessor
        caution = MIXED if any("augments" in key for part in (train, *preprocessors) for key in part) else ""
        epochs = self.epochs(plan, run)
        dataset.pop("data_root", None)
        taught = {name: value for name, value in model["teacher"].items() if name not in _SET}
        wrapper = config.get("optim_wrapper") or {}
        amp = wrapper.get("type") == "AmpOptimWrapper" and (wrapper.get("dtype") or True)
        fast = loss.get("teacher_fast")
        key = json.dumps([dataset, preprocessors, train, taught, fast, amp], sort_keys=True, default=str)
        return Views(key, epochs, epochs, caution)

    def store_command(self, plan: Plan, store: Store, output: str | None = None) -> list[str]:
        """Return ``python -m mmcls_bnn.soft_labels ...``."""
        run = plan.run(store.writer)
        options = _options(plan, run, output)
        return ["python", "-m", "mmcls_bnn.soft_labels", run.config, "--cfg-options", *options]

    def store(self, command: list[str]) -> None:
        """Run such a command."""
        from mmcls_bnn.soft_labels import main

        if status := main(command[3:]):
            raise SystemExit(status)


def check_class_order(folder: Path, name: str) -> None:
    """Check that timm, whose model teaches, and mmcls, whose model learns, number the classes alike.

    timm sorts by the numbers in names (2 before 10) and without case, mmcls by letters (10 before 2).

    Raises:
        LskdError: for folders that the two sort differently.
    """
    from timm.utils.misc import natural_key

    names = class_folders(folder / "train")
    numbered: list[str] = sorted(names, key=natural_key)
    for ours, theirs in zip(numbered, names, strict=True):
        if ours != theirs:
            raise LskdError(
                f"the class folders of {name} are numbered differently by timm ({ours} before {theirs}) and "
                "by mmcls; rename them in train and val: zeros in front of numbers (02, 10), lower case"
            )


def _options(plan: Plan, run: Run, output: str | None = None) -> list[str]:
    """Return what a study changes in a student's configuration, as `--cfg-options` takes it."""
    options = {
        "randomness.seed": run.seed,
        **_learns_from(plan, run),
        "train_dataloader.dataset.data_root": plan.data,
        "val_dataloader.dataset.data_root": plan.data,
    }
    if plan.temperature_squared and run.role == "student":
        options["model.distillation.temperature_squared"] = True
    if store := plan.store_of(run):
        stored = {"path": plan.labels(store, output), "values": store.values}
        stored |= {"sampled" if store.sampled else "top_k": store.top_k}
        # The teacher is shown some images again: so it is there for the validation images, too (Fig. 6).
        stored |= {"seed": store.seed, "verify": VERIFIED}
        stored |= {"views": store.epochs} if store.views else {}
        stored |= {"rest": plan.rest} if plan.rest else {}
        options |= {f"model.distillation.soft_labels.{name}": value for name, value in stored.items()}
    return [f"{key}={value}" for key, value in options.items()]


def _check_options(options: Sequence[str]) -> None:
    """Check that mmengine reads them as they are: it drops blanks and takes commas and brackets for lists."""
    from mmengine.config import DictAction

    parser = ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    for option in options:
        key, _, value = option.partition("=")
        try:
            read = parser.parse_args(["--cfg-options", option]).cfg_options[key]
        except (AssertionError, RecursionError):  # brackets without their other half, or within a name
            read = None
        if str(read) != value or (key.endswith("data_root") and not isinstance(read, str)):
            raise LskdError(
                f"mmcls cannot be told {key} {value!r}, since mmengine drops blanks and takes commas and "
                "brackets for lists, digits for numbers; rename that folder"
            )


def _learns_from(plan: Plan, run: Run) -> dict[str, Any]:
    if run.role == "control":
        labels = {"alpha": exact(run.smoothing), "convention": plan.convention}
        return {
            "model.type": "UntaughtClassifier",
            **{f"model.distillation.{name}": value for name, value in labels.items()},
            **({"model.backbone.binarize": "[]"} if run.real else {}),
        }
    teacher = plan.run(run.teacher)
    return {
        "model.teacher.model": teacher.model,
        "model.teacher.checkpoint": Path(plan.output, teacher.folder, CHECKPOINT),
        "model.teacher.smoothing": exact(teacher.smoothing),
        "model.teacher.convention": plan.convention,
        "model.distillation.temperature": exact(run.temperature),
        "model.distillation.hard_weight": exact(run.hard_weight),
    }


def _image_size(config: Mapping[str, Any]) -> int | None:
    """Return how large validation images are, by the last step of their pipeline that says it."""
    dataset = (config.get("val_dataloader") or {}).get("dataset") or {}
    pipeline = dataset.get("pipeline") or []
    sizes = [step.get("crop_size") or step.get("scale") for step in pipeline]
    return next((size for size in reversed(sizes) if isinstance(size, int)), None)


def _check_parts(config: Mapping[str, Any], path: str) -> None:
    """Refuse a configuration in which a part that a study reads is no dict, or no list of them."""
    for place in _DICTS:
        part: Any = config
        for name in place.split("."):
            part = (part or {}).get(name)
        if part is not None and not isinstance(part, dict):
            raise LskdError(f"{path}: {place} is no dict; fix it")
    hooks = config.get("custom_hooks") or []
    if not isinstance(hooks, list) or not all(isinstance(hook, dict) for hook in hooks):
        raise LskdError(f"{path}: custom_hooks is no list of dicts; fix it")


def _hooks(config: Mapping[str, Any]) -> set[str]:
    return {str(hook.get("type")) for hook in config.get("custom_hooks") or []}


def _class_counts(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield where a configuration says how many classes there are, and what it says."""
    model = config.get("model") or {}
    heads = model.get("head") or {}
    parts = [("model.head", head) for head in (heads if isinstance(heads, list) else [heads])]
    parts += [("model.data_preprocessor", model.get("data_preprocessor"))]
    parts += [("data_preprocessor", config.get("data_preprocessor"))]
    for loader in ("train_dataloader", "val_dataloader"):
        parts += [(f"{loader}.dataset", (config.get(loader) or {}).get("dataset"))]
    for place, part in parts:
        if part and "num_classes" in part:
            yield f"{place}.num_classes", part["num_classes"]


def _check_transforms(path: str, part: Any) -> None:
    """Check a pipeline, transforms within transforms too."""
    from mmcls_bnn import data
    from mmcls_bnn.compat import TRANSFORMS, use_registry

    assert data  # importing it registers its transforms
    if isinstance(part, list):
        for inner in part:
            _check_transforms(path, inner)
    elif isinstance(part, Mapping):
        if "type" in part:
            use_registry()
            name = str(part["type"])
            found = TRANSFORMS.get(name)
            if found is None or name in _NOT_REPLAYED or not found.__module__.startswith(_REPLAYED):
                raise CannotStoreError(f"{path} has {name}, which may draw from a generator of its own")
        _check_transforms(path, list(part.values()))


@contextmanager
def _making(part: str) -> Iterator[None]:
    try:
        yield
    except LskdError:
        raise
    except Exception as error:  # a configuration is a program
        raise LskdError(f"its {part} cannot be made ({one_line(error)}); check it") from None


def _try_out(plan: Plan, run: Run) -> None:
    from mmengine.config import Config, DictAction
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import PARAM_SCHEDULERS
    from mmengine.runner import Runner

    from mmcls_bnn.compat import MODELS

    with _making("configuration"):
        cfg = Config.fromfile(run.config, import_custom_modules=False)
        options = (option.split("=", 1) for option in _options(plan, run))
        cfg.merge_from_dict({key: DictAction._parse_iterable(text) for key, text in options})
    with _making("model"):
        model = MODELS.build({"data_preprocessor": cfg.get("data_preprocessor"), **cfg.model.to_dict()})
    steps = 1
    if plan.data_dir.exists():
        with _making("train_dataloader"):
            train = Runner.build_dataloader(cfg.train_dataloader.copy())
            train.dataset[0]
            Runner.build_dataloader(cfg.val_dataloader.copy())
            steps = len(train)
            if not steps:
                raise LskdError(
                    f"{len(train.dataset)} training images do not fill one batch; lower batch_size"
                )
    with _making("optim_wrapper"):
        wrapper = {**cfg.optim_wrapper.to_dict(), "type": "OptimWrapper"}
        for key in ("dtype", "loss_scale", "use_fp16"):  # of mixed precision, which needs a GPU
            wrapper.pop(key, None)
        optimizer = build_optim_wrapper(model, wrapper).optimizer
    with _making("param_scheduler"):
        schedules, loop = cfg.get("param_scheduler") or [], cfg.get("train_cfg") or {}
        epochs = loop.get("max_epochs", 1)
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            settings = {**schedule.to_dict(), "optimizer": optimizer}
            last = epochs if settings.get("by_epoch", True) else loop.get("max_iters", epochs * steps)
            settings.setdefault("end", last)  # as Runner
            if settings.get("convert_to_iter_based"):
                settings["epoch_length"] = steps
            PARAM_SCHEDULERS.build(settings)
