"""What is checked before a study's first run: data, the runs' settings, the output folder."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lskd import LskdError
from lskd.base.images import class_folders, class_images
from lskd_study.base.text import storable
from lskd_study.data.manifest import MANIFEST, read_manifest
from lskd_study.data.options import DERIVED, KEPT, SOURCE, SUBSETS, TEXT, Options
from lskd_study.plan.plan import Plan, Run
from lskd_study.trainers import trainer_of
from lskd_study.trainers.trainer import Trainer, TryOut, quiet


def check_data_folder(folder: Path, name: str, num_classes: int, fix: str = "") -> None:
    """Check for ``train`` and ``val`` with a folder of images for each class; ``fix`` says how to make it.

    Raises:
        LskdError: for a folder that is missing or contains something else; says how to make it.
    """
    if not fix and Path(name).name == "digits":
        fix = f"make it with `lskd data digits --output {name}`"
    fix = fix or "it must contain train/<class>/ and val/<class>/ with images"
    if not folder.is_dir():
        raise LskdError(f"data folder {name} does not exist; {fix}")
    classes: dict[str, dict[str, list[str]]] = {}
    for split in ("train", "val"):
        try:
            names = class_folders(folder / split)
        except OSError as error:
            raise LskdError(f"data folder {name} has no {split} folder; {fix}") from error
        classes[split] = {label: class_images(folder / split / label)[0] for label in names}
        if empty := [label for label, images in classes[split].items() if not images]:
            raise LskdError(f"class folder {name}/{split}/{empty[0]} has no images; {fix}")
        if len(names) != num_classes:
            raise LskdError(
                f"{name}/{split} has {len(names)} class folders but num_classes is {num_classes}; fix one"
            )
    check_names(classes["val"], f"{name}/val")
    if odd := sorted(classes["train"].keys() ^ classes["val"].keys()):
        raise LskdError(
            f"train and val of {name} have different classes, e.g. {odd[0]}; they must be the same"
        )


def check_names(classes: Mapping[str, Sequence[str]], name: str) -> None:
    """Check that the names of classes and of their images can be stored beside what is measured.

    Raises:
        LskdError: naming the first that cannot, and how many more there are.
    """
    odd = [label for label in classes if not storable(label)]
    odd += [f"{label}/{image}" for label, names in classes.items() for image in names if not storable(image)]
    if odd:
        first = f"{name}/{min(odd)}"
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise LskdError(f"{first!r}{more} has a name that is no UTF-8 text in one line; rename it")


def check_data_bin(folder: Path, name: str, options: Options, fix: str = "") -> None:
    """Check for what fairseq-preprocess writes: two dictionaries, and train, valid and test in two languages.

    Args:
        folder: the data-bin.
        name: what it is called in the study file.
        options: of the command that made it, as far as the study file says; others are an error.
        fix: how to make it.

    Raises:
        LskdError: for a folder that is missing or contains something else; says how to make it.
    """
    fix = fix or "make it with fairseq-preprocess, see docs/fairseq.md"
    if not folder.is_dir():
        raise LskdError(f"data-bin {name} does not exist; {fix}")
    if len(list(folder.glob("dict.*.txt"))) < 2:
        raise LskdError(f"{name} is no data-bin, it has no two dictionaries (dict.*.txt); {fix}")
    for split in ("train", "valid", "test"):
        if any(len(list(folder.glob(f"{split}.*-*.*.{kind}"))) != 2 for kind in ("bin", "idx")):
            raise LskdError(f"data-bin {name} has no {split} set in two languages; {fix}")
    made = read_manifest(folder).get("options", {})
    for option, value in options.items():
        if option in made and made[option] != value:
            raise LskdError(
                f"data-bin {name} was made with {option} {made[option]}, the study asks for {value}; "
                "choose another data.path or remove it"
            )


def check_runs(plan: Plan) -> None:
    """Check what the runs to do say of models and classes.

    Raises:
        LskdError: for a model that its trainer does not know, another number of classes than the study's, and
            weights to start from that are not there.
    """
    for run in {(run.config, run.model, run.role): run for run in plan.unfinished()}.values():
        trainer_of(plan.ecosystem, run.role).check_run(plan, run)


def check_last_epochs(plan: Plan) -> None:
    """Check that every run has the epochs whose mean accuracy is judged, and none of them before a decay.

    Raises:
        LskdError: naming the trainer's file.
    """
    last = plan.last_epochs
    if last == 1:
        return
    for run in {(run.config, run.model, run.role): run for run in plan.runs}.values():
        trainer, config = trainer_of(plan.ecosystem, run.role), plan.configs[run.config]
        epochs = trainer.epochs(plan, run)
        if last > epochs:
            trains = f"trains {epochs}" if epochs else "does not say how many it trains"
            raise LskdError(f"{plan.study_file}: last_epochs is {last}, and {run.config} {trains}; lower it")
        decays = [at for at in trainer.decays(plan, run) if epochs - last < at < epochs]
        if decays:
            raise LskdError(
                f"{plan.study_file}: last_epochs is {last} of {epochs}, and the rate in {run.config} steps "
                f"down after {decays[-1]}; set it to {epochs - decays[-1]} at most"
            )
        if any(int(part.get("val_interval") or 1) > 1 for part in (config, config.get("train_cfg") or {})):
            raise LskdError(
                f"{run.config}: last_epochs needs the accuracy of each epoch; remove val_interval"
            )


def try_out(plan: Plan) -> None:
    """Build what unfinished runs are made of, one of each kind: seed and smoothing make none.

    Raises:
        LskdError: naming the trainer's file.
    """
    kinds: dict[tuple[object, ...], Run] = {}
    for run in plan.unfinished():
        teacher = plan.run(run.teacher).config if run.teacher else ""
        kinds.setdefault((run.role, run.model, run.config, teacher), run)
    rehearsals: dict[Trainer, TryOut] = {}
    for run in kinds.values():
        trainer = trainer_of(plan.ecosystem, run.role)
        try:
            with quiet():
                if trainer not in rehearsals:
                    rehearsals[trainer] = trainer.rehearsal(plan)
                rehearsals[trainer](run)
        except LskdError as error:
            raise LskdError(f"{run.config}, {run.role} {run.model}: {error}") from None


def check_output(folder: Path, name: str) -> None:
    """Make a folder that will be written to and check that it can be.

    Raises:
        LskdError: when it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LskdError(f"cannot write the folder {name} ({error.strerror}); choose another one") from error


def check_preparation(plan: Plan) -> None:
    """Check what a study's data are made from, or that those which are there are what it asks for.

    Raises:
        LskdError: for a source that is not there or has other classes, and for data made otherwise.
    """
    if not plan.prepare or plan.prepare in TEXT:
        return
    if plan.data_dir.exists():
        _check_made(plan)
    elif SOURCE in plan.prepare_options:
        _check_source(plan)


def _check_made(plan: Plan) -> None:
    manifest = read_manifest(plan.data_dir)
    if not manifest:
        raise LskdError(
            f"data folder {plan.data} was not made by `lskd data {plan.prepare}`, it has no {MANIFEST}; "
            "remove data.prepare from the study, or the folder"
        )
    expected = "subset" if plan.prepare in SUBSETS else plan.prepare
    if manifest.get("name", expected) != expected:
        raise LskdError(
            f"data folder {plan.data} contains {manifest['name']}, the study asks for {expected}; "
            "choose another data.path or remove it"
        )
    for option, value in plan.prepare_options.items():
        key = KEPT.get(option)
        if key in manifest and manifest[key] != value:
            raise LskdError(
                f"data folder {plan.data} was made with {option} {manifest[key]}, the study asks for "
                f"{value}; choose another data.path or remove it"
            )


def _check_source(plan: Plan) -> None:
    name = str(plan.prepare_options[SOURCE])
    source = Path(plan.cwd, name)
    if not source.exists():
        raise LskdError(
            f"{name}, which `lskd data {plan.prepare}` is to read, is not there; see docs/data.md"
        )
    if plan.prepare not in DERIVED - SUBSETS.keys():
        return
    classes = read_manifest(source).get("num_classes")
    if classes is None and (source / "train").is_dir():
        classes = len(class_folders(source / "train"))
    if classes is not None and classes != plan.num_classes:
        raise LskdError(f"{name} has {classes} classes but num_classes is {plan.num_classes}; fix one")
