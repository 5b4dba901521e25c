"""mmcls: the command line of a student's run, its configuration, and its logs in the common vocabulary."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lskd import LskdError
from lskd.base.files import read_csv, whole_file
from lskd.base.install import how_to_install
from lskd.errors import one_line
from lskd_study.base.gpus import held_locks
from lskd_study.plan.plan import CHECKPOINT, Plan, Run, exact
from lskd_study.trainers import timm

# Its own, and the distillation loss on the validation set, which timm does not log: Fig. 6.
CURVE_COLUMNS = (
    *timm.CURVE_COLUMNS,
    "val_ce",
    "val_kl",
    "val_teacher_entropy",
    "val_agreement",
    "flip_ratio",
)
# As in timm.py.
WITHOUT_EFFECT = (
    *("*_dataloader.num_workers", "*_dataloader.persistent_workers", "*_dataloader.pin_memory"),
    *("*_dataloader.prefetch_factor", "default_hooks.logger.*", "default_hooks.checkpoint.max_keep_ckpts"),
    *("log_level", "log_processor.*", "vis_backends.*", "visualizer.*", "work_dir"),
    # What the study sets itself for each run.
    *("teacher_model", "teacher_checkpoint", "teacher_smoothing", "model.teacher.model", "randomness.seed"),
    *("model.teacher.checkpoint", "model.teacher.smoothing", "*_dataloader.dataset.data_root"),
)
VERIFIED = 16  # stored images
_LATEST = "last_checkpoint"
# As in timm.py; the folders of mmengine's logs, one for each start, stay.
FILES = (CHECKPOINT, _LATEST, "epoch_*.pth", "best_*.pth", "epochs.csv", ".epochs.csv")


def read_config(path: Path) -> dict[str, Any]:
    """Return a configuration's content in plain values, its bases included.

    Raises:
        LskdError: for a file that is missing or is no configuration of a distilled student.
    """
    from mmengine.config import Config

    if not path.is_file():
        raise LskdError(f"cannot read the trainer's file {path} (no such file)")
    try:
        content = Config.fromfile(str(path), import_custom_modules=False).to_dict()
    except Exception as error:  # a configuration is a program
        reason = " ".join(str(error).split())[:200]
        raise LskdError(f"{path} is no configuration of mmcls ({reason}); repair it") from None
    plain: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return plain


def check_config(config: dict[str, Any], path: str, role: Literal["teacher", "student"]) -> None:
    """Check a student's file before any run.

    Raises:
        LskdError: naming the file and what it lacks.
    """
    if config.get("model", {}).get("type") != "LsKdClassifier":
        raise LskdError(f"{path}: its model is not an LsKdClassifier; see recipes/reactnet/digits_kd.py")
    if not config["model"].get("teacher", {}).get("model"):
        raise LskdError(f"{path}: model.teacher must name a timm model; the study sets which one")
    hooks = {str(hook.get("type")) for hook in config.get("custom_hooks") or []}
    for needed in ("SafeCheckpointHook", "CurvesHook", "TeacherHook"):
        if needed not in hooks:
            raise LskdError(f"{path}: custom_hooks lacks {needed}; add dict(type='{needed}')")


def command(plan: Plan, run: Run, output: str | None = None) -> list[str]:
    """Return the shell command of a run from scratch, paths relative to ``plan.cwd``.

    ``output``: folder to make the run's folder in, instead of the study's own.
    """
    teacher = plan.run(run.teacher)
    checkpoint = Path(plan.output, teacher.folder, CHECKPOINT)
    folder = Path(output, run.id) if output else Path(plan.output, run.folder)
    options = {
        "randomness.seed": run.seed,
        "model.teacher.model": teacher.model,
        "model.teacher.checkpoint": checkpoint,
        "model.teacher.smoothing": exact(teacher.smoothing),
        "model.teacher.convention": plan.convention,
        "model.distillation.temperature": f"{exact(run.temperature)}",
        "model.distillation.hard_weight": f"{exact(run.hard_weight)}",
        "train_dataloader.dataset.data_root": plan.data,
        "val_dataloader.dataset.data_root": plan.data,
    }
    if plan.temperature_squared:
        options["model.distillation.temperature_squared"] = True
    if store := plan.store_of(run):
        stored = {"path": plan.labels(store, output), "top_k": store.top_k, "values": store.values}
        # The teacher is shown some images again: so it is there for the validation images, too (Fig. 6).
        stored |= {"seed": store.seed, "verify": VERIFIED}
        options |= {f"model.distillation.soft_labels.{name}": value for name, value in stored.items()}
    words = ["mim", "train", "mmcls", run.config, "--work-dir", str(folder), "--cfg-options"]
    return [*words, *(f"{key}={value}" for key, value in options.items())]


def resume(folder: Path) -> list[str] | None:
    """Return the arguments that let a run go on, None where it has no checkpoint yet."""
    return ["--resume"] if (folder / _LATEST).is_file() else None


def train(arguments: list[str]) -> None:
    """Run what ``mim`` with these arguments (``train mmcls CONFIG ...``) runs, and name its last checkpoint.

    Raises:
        SystemExit: as the command would exit.
    """
    spec = find_spec("mmcls")
    if spec is None or spec.origin is None:
        raise LskdError(f"mmcls is not installed here; {how_to_install('mmcls')}")
    script = Path(spec.origin).parent / ".mim" / "tools" / "train.py"
    words = arguments[2:]
    # With the locks of its GPUs: it may outlive this process.
    done = subprocess.run([sys.executable, str(script), *words], check=False, pass_fds=held_locks())
    code = done.returncode
    if code:
        raise SystemExit(code)
    folder = Path(words[words.index("--work-dir") + 1])
    latest = Path((folder / _LATEST).read_text(encoding="utf-8").strip())
    with whole_file(folder / CHECKPOINT) as scratch:
        shutil.copyfile(folder / latest.name, scratch)


def read_curves(folder: Path, role: str) -> list[dict[str, str]]:
    """Return a run's epochs in the common columns; epochs count from 0.

    Raises:
        LskdError: when the trainer left no usable log.
    """
    from mmcls_bnn.distil.curves import FILE

    # The study's own table of curves has the same name and comes last.
    path = folder / FILE
    if not path.is_file():
        raise LskdError(f"the trainer left no {path}; see {folder / 'train.log'}")
    rows = read_csv(path, ("epoch",))
    if not rows:
        raise LskdError(f"{path} has no epochs; see {folder / 'train.log'}")
    return [
        {**{name: row.get(name) or "" for name in CURVE_COLUMNS}, "epoch": str(int(row["epoch"]) - 1)}
        for row in rows
    ]


def collect_logits(folder: Path, checkpoint: str, data_dir: Path) -> Any:
    """Return logits, labels and keys of the validation images, as timm's `Evaluation` has them.

    Raises:
        LskdError: for a run that cannot be evaluated, or whose accuracy is then not the trainer's own.
    """
    import torch

    from mmcls_bnn.evaluation import evaluate_config
    from timm_ls_kd import Evaluation

    config = max(folder.glob("*.py"), key=lambda path: path.stat().st_mtime)  # dumped at each start
    answers = evaluate_config(config, folder / checkpoint, data_dir, "val")
    positions, logits, labels, _ = zip(*answers.batches, strict=True)
    order = torch.cat(positions).argsort()
    found = Evaluation(torch.cat(logits)[order].cpu(), torch.cat(labels)[order].cpu(), answers.keys)
    top1 = 100 * float((found.logits.argmax(-1) == found.labels).float().mean())
    own = read_curves(folder, "student")[-1]["val_top1"]
    # Another normalisation or another transform would go unnoticed in a table.
    if own and abs(top1 - float(own)) > 0.5:
        raise LskdError(
            f"{folder}: {top1:.2f} % of the validation images are right, in the trainer's own log {own} %; "
            "the configuration is not evaluated as it was trained, so nothing is stored"
        )
    return found


class Rehearsal:
    """Builds students by mmengine's registries, without their teachers; see `lskd_study.trainers`."""

    def __init__(self, plan: Plan) -> None:
        """Register what configurations name."""
        from mmcls_bnn import compat, register

        assert register  # importing it is what registers
        compat.use_registry()
        self.plan = plan
        self._part = "configuration"

    def try_out(self, run: Run) -> None:
        """Build a student's model, loaders, optimiser and schedule, and load its first image.

        Raises:
            LskdError: in one line, whatever the registries raise.
        """
        from mmengine.config import Config, DictAction

        words = command(self.plan, run)
        options = dict(word.split("=", 1) for word in words[words.index("--cfg-options") + 1 :])
        try:
            cfg = Config.fromfile(run.config, import_custom_modules=False)
            cfg.merge_from_dict({key: DictAction._parse_iterable(text) for key, text in options.items()})
            self._build(cfg)
        except LskdError:
            raise
        except Exception as error:  # a configuration is a program
            raise LskdError(f"its {self._part} cannot be made ({one_line(error)}); check it") from None

    def _build(self, cfg: Any) -> None:
        from mmengine.optim import build_optim_wrapper
        from mmengine.registry import PARAM_SCHEDULERS
        from mmengine.runner import Runner

        from mmcls_bnn.compat import MODELS

        self._part = "model"
        model = MODELS.build({"data_preprocessor": cfg.get("data_preprocessor"), **cfg.model.to_dict()})
        steps = 1
        if self.plan.data_dir.exists():
            self._part = "train_dataloader"
            train = Runner.build_dataloader(cfg.train_dataloader.copy())
            train.dataset[0]
            Runner.build_dataloader(cfg.val_dataloader.copy())
            steps = len(train)
            if not steps:
                raise LskdError(
                    f"{len(train.dataset)} training images do not fill one batch; lower batch_size"
                )
        self._part = "optim_wrapper"
        wrapper = {**cfg.optim_wrapper.to_dict(), "type": "OptimWrapper"}
        for key in ("dtype", "loss_scale", "use_fp16"):  # of mixed precision, which needs a GPU
            wrapper.pop(key, None)
        optimizer = build_optim_wrapper(model, wrapper).optimizer
        self._part = "param_scheduler"
        schedules = cfg.get("param_scheduler") or []
        loop = cfg.get("train_cfg") or {}
        epochs = loop.get("max_epochs", 1)
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            settings = {**schedule.to_dict(), "optimizer": optimizer}
            by_epoch = settings.get("by_epoch", True)
            settings.setdefault(
                "end", epochs if by_epoch else loop.get("max_iters", epochs * steps)
            )  # as Runner
            if settings.get("convert_to_iter_based"):
                settings["epoch_length"] = steps
            PARAM_SCHEDULERS.build(settings)
