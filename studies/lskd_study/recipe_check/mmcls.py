"""mmcls' recipes: mmengine's own Runner with the recipe's hooks, two steps and one evaluation."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lskd import LskdError
from lskd_study.plan.recipes import Recipe, recipes_folder
from lskd_study.recipe_check import cost
from lskd_study.recipe_check.miniature import FASHION, data_set, write_fashion, write_miniature
from lskd_study.recipe_check.report import CheckedRecipe, CheckedRun
from lskd_study.trainers.size import Network, network_size, tensor_size

STEPS = 2
BATCH = 2
_SMALL = 64
# Keys by which a transform says how large its images are, to be scaled together.
_SIZES = ("scale", "crop_size")


class MmclsChecks:
    """Checks recipes one after the other."""

    def __init__(self, scratch: Path) -> None:
        """Keep a folder for miniatures, teachers and runs."""
        from mmcls_bnn import compat, register

        assert register  # importing it is what registers
        compat.use_registry()
        self.scratch = scratch
        self._at_real_size = False
        self._networks: dict[str, Network] = {}

    def check(self, recipe: Recipe) -> CheckedRecipe:
        """Check a configuration that is run by hand.

        Raises:
            LskdError: one line with what is wrong.
        """
        return CheckedRecipe(recipe.name, [self.check_file(recipe.path, f"run {recipe.path.name}")])

    def check_file(
        self, path: Path, name: str, changes: dict[str, Any] | None = None, runs: int = 1
    ) -> CheckedRun:
        """Check one configuration.

        Args:
            path: its file.
            name: what to call it.
            changes: options of the study that runs it, as ``--cfg-options`` has them.
            runs: how many such runs the recipe has.

        Raises:
            LskdError: one line with what is wrong.
        """
        from mmengine.config import Config

        try:
            cfg = Config.fromfile(str(path), import_custom_modules=False)
            if changes:
                cfg.merge_from_dict(changes)
        except Exception as error:  # a configuration is a program
            raise LskdError(f"{path} is no configuration of mmcls ({_line(error)}); repair it") from None
        epochs, classes = int(cfg.train_cfg.max_epochs), int(cfg.num_classes)
        data = data_set(str(cfg.train_dataloader.dataset.data_root), classes)
        size = _image_size(cfg.train_dataloader.dataset.pipeline) or 28
        corners = cost.corner_points(_rates(cfg, epochs))
        with _quiet():
            try:
                binary, student, teacher = self._sizes(cfg, size)
                self._run(cfg, path.stem, size)
            except LskdError:
                raise
            except Exception as error:  # mmengine's registries and pipelines raise whatever they like
                raise LskdError(f"{path.name}: {type(error).__name__}: {_line(error)}") from None
        # Binary products are trained in real numbers.
        real = Network(student.parameters, student.flops + binary)
        hours = cost.gpu_hours(
            epochs, data.train, data.validation, real.flops, teacher.flops if teacher else 0.0
        )
        return CheckedRun(name, real, corners, epochs, hours, runs)

    def _sizes(self, cfg: Any, size: int) -> tuple[float, Network, Network | None]:
        """Return the student's binary operations, the rest of it, and its teacher's size."""
        from mmcls_bnn.compat import MODELS
        from mmcls_bnn.complexity import count

        channels = len(cfg.data_preprocessor.mean)
        model = {**cfg.model.to_dict(), "data_preprocessor": cfg.data_preprocessor.to_dict()}
        key = f"{model['backbone']} {model['head']} {size}"
        if key not in self._networks:
            if model["type"] == "LsKdClassifier":
                found = count(MODELS.build(model), channels, size)
                parameters = found.binary_parameters + found.real_parameters
                self._networks[key] = Network(parameters, 2 * found.flops)
                self._networks[f"binary {key}"] = Network(0, 2 * found.bops)
            else:
                self._networks[key] = _plain_size(MODELS.build(model), channels, size)
        binary = self._networks.get(f"binary {key}", Network(0, 0.0)).flops
        return binary, self._networks[key], self._teacher_size(cfg, channels, size)

    def _teacher_size(self, cfg: Any, channels: int, size: int) -> Network | None:
        teacher = cfg.model.get("teacher")
        if not teacher:
            return None
        key = f"{teacher.get('model')} {teacher.get('config')} {size}"
        if key not in self._networks:
            if teacher.get("config"):
                self._networks[key] = _plain_size(_mmcls_teacher(str(teacher.config)), channels, size)
            else:
                import timm

                self._networks[key] = network_size(
                    lambda: timm.create_model(teacher.model, num_classes=cfg.num_classes, in_chans=channels),
                    tensor_size(channels, size, size),
                )
        return self._networks[key]

    def _run(self, cfg: Any, name: str, size: int) -> None:
        """Train for two steps and validate one batch, with the recipe's hooks."""
        from mmengine.runner import Runner

        # The first recipe of ImageNet's size keeps it; the others differ in layers, which smaller images try.
        if size > _SMALL and self._at_real_size:
            _shrink(cfg, _SMALL / size)
        self._at_real_size = self._at_real_size or size > _SMALL
        root = self._data(cfg)
        for split, count in (("train", STEPS * BATCH), ("val", BATCH)):
            loader = cfg[f"{split}_dataloader"]
            loader.merge(
                {"batch_size": BATCH, "num_workers": 0, "persistent_workers": False, "pin_memory": False}
            )
            loader.dataset.merge({"data_root": str(root), "indices": count})
        cfg.pop("test_dataloader", None), cfg.pop("test_evaluator", None), cfg.pop("test_cfg", None)
        cfg.train_cfg.max_epochs = 1
        cfg.work_dir, cfg.experiment_name = str(self.scratch / "work" / name), f"check_{name}"
        cfg.log_level = "ERROR"
        for hook in cfg.custom_hooks:
            if hook["type"] == "TeacherHook":
                hook["samples"] = 0  # it has learnt nothing
        if cfg.model.get("teacher"):
            self._write_teacher(cfg)
        if cfg.model.get("step1_checkpoint"):
            self._write_step1(cfg)
        Runner.from_cfg(cfg).train()

    def _data(self, cfg: Any) -> Path:
        dataset = cfg.train_dataloader.dataset
        data = data_set(str(dataset.data_root), int(cfg.num_classes))
        folder = self.scratch / "data" / f"{Path(dataset.data_root).name}-{data.classes}"
        if not folder.exists():
            if folder.name.startswith(f"{FASHION}-"):
                write_fashion(folder)
            else:
                write_miniature(folder, data)
        return folder

    def _write_teacher(self, cfg: Any) -> None:
        import torch

        teacher, channels = cfg.model.teacher, len(cfg.data_preprocessor.mean)
        path = self.scratch / "teacher.pth"
        if teacher.get("config"):
            model = _mmcls_teacher(str(teacher.config))
            teacher.config = str(_packaged(str(teacher.config)))
        else:
            import timm

            from timm_ls_kd.models import check_model_name

            check_model_name(str(teacher.model), "teacher")
            model = timm.create_model(teacher.model, num_classes=cfg.num_classes, in_chans=channels)
        torch.save({"state_dict": model.state_dict()}, path)
        teacher.checkpoint = str(path)

    def _write_step1(self, cfg: Any) -> None:
        import torch

        from mmcls_bnn.compat import MODELS
        from mmcls_bnn.distil.step1 import NOTE

        model = cfg.model.to_dict()
        model["backbone"]["binarize"] = ("activations",)
        model["data_preprocessor"] = cfg.data_preprocessor.to_dict()
        path = self.scratch / "step1.pth"
        weights = MODELS.build({**model, "step1_checkpoint": None}).state_dict()
        torch.save({"state_dict": weights, "meta": {NOTE: {"binarize": ["activations"]}}}, path)
        cfg.model.step1_checkpoint = str(path)


def _mmcls_teacher(config: str) -> Any:
    from mmengine.config import Config

    from mmcls_bnn.compat import MODELS

    cfg = Config.fromfile(str(_packaged(config)), import_custom_modules=False)
    return MODELS.build({**cfg.model.to_dict(), "data_preprocessor": cfg.data_preprocessor.to_dict()})


def _packaged(config: str) -> Path:
    """Return a configuration that a recipe names from the folder above ``recipes``.

    Raises:
        LskdError: when there is none.
    """
    path = Path(config)
    if not path.is_file() and path.parts[:1] == ("recipes",):
        path = recipes_folder().joinpath(*path.parts[1:])
    if not path.is_file():
        raise LskdError(f"model.teacher.config {config} does not exist; name a recipe of a teacher")
    return path


def _plain_size(model: Any, channels: int, size: int) -> Network:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, channels, size, size), mode="tensor")
    return Network(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops())


def _image_size(pipeline: list[Any]) -> int | None:
    """Return the side of a training image, what its last transform with a size says."""
    sizes = [step[key] for step in pipeline for key in _SIZES if isinstance(step.get(key), int)]
    return sizes[-1] if sizes else None


def _shrink(cfg: Any, factor: float) -> None:
    for split in ("train", "val"):
        for step in cfg[f"{split}_dataloader"].dataset.pipeline:
            for key in _SIZES:
                if isinstance(step.get(key), int):
                    step[key] = round(step[key] * factor)


def _rates(cfg: Any, epochs: int) -> list[float]:
    """Return the real schedules' learning rate in each epoch."""
    import torch
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import PARAM_SCHEDULERS

    wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), cfg.optim_wrapper.copy())
    schedulers = [
        PARAM_SCHEDULERS.build({"end": epochs, **schedule.to_dict(), "optimizer": wrapper.optimizer})
        for schedule in cfg.param_scheduler
    ]
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that moves before the optimiser
        for _ in range(epochs):
            rates.append(float(wrapper.optimizer.param_groups[0]["lr"]))
            for scheduler in schedulers:
                scheduler.step()
    return rates


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep mmengine's own words to itself."""
    said = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        warnings.simplefilter("ignore")
        yield
