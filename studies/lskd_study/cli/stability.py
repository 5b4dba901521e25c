"""``lskd stability``: which of several teachers, measured on one data set, promises to teach best."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lskd import LskdError

_teacher_option = partial(typer.Option, rich_help_panel="Teachers")
_data_option = partial(typer.Option, rich_help_panel="What models are asked about")
_result_option = partial(typer.Option, rich_help_panel="Results")


def stability(
    logits: Annotated[
        list[Path] | None,
        _teacher_option(
            help="File of logits and labels: .npz, .safetensors or .parquet. Repeat for several teachers."
        ),
    ] = None,
    model: Annotated[
        list[str] | None, _teacher_option(help="Model of timm, or torchvision:NAME, with --data-dir. Repeat.")
    ] = None,
    config: Annotated[
        list[str] | None,
        _teacher_option(help="Configuration file of mmcls. It is Python and is run. Repeat."),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        _teacher_option(
            help="Weights, one for each --model and then each --config, in their order; without any, timm's "
            "pretrained weights."
        ),
    ] = None,
    teacher_list: Annotated[
        Path | None,
        _teacher_option(
            "--list", help="YAML file with a list of teachers, e.g. recipes/stability/study.yaml."
        ),
    ] = None,
    name: Annotated[
        list[str] | None, _teacher_option(help="What reports call them, one for each teacher.")
    ] = None,
    data_dir: Annotated[Path | None, _data_option(help="Folder of images, one folder a class.")] = None,
    split: Annotated[str | None, _data_option(help="Its sub-folder, as timm finds it; validation.")] = None,
    batch_size: Annotated[int, _data_option(min=1)] = 64,
    workers: Annotated[int, _data_option(min=0, help="Loading processes.")] = 2,
    device: Annotated[str | None, _data_option(help="e.g. cuda or cpu; the GPU where there is one.")] = None,
    amp: Annotated[bool, _data_option("--amp", help="Mixed precision.")] = False,
    img_size: Annotated[int | None, _data_option(min=1, help="Instead of the model's own.")] = None,
    crop_pct: Annotated[float | None, _data_option(min=0.01, help="Instead of the model's own.")] = None,
    temperature: Annotated[
        list[float] | None,
        _result_option(help="Temperature at which you would distil: what is left for the own class? Repeat."),
    ] = None,
    small_class_correction: Annotated[
        bool,
        _result_option(
            "--small-class-correction", help="Correct the stabilities for the bias of small classes."
        ),
    ] = False,
    replicates: Annotated[int, _result_option(min=100, help="Bootstrap draws for the differences.")] = 2000,
    seed: Annotated[int, _result_option(min=0, help="Of the draws.")] = 0,
    json_file: Annotated[Path | None, _result_option("--json", help="One object for each teacher.")] = None,
    csv_file: Annotated[Path | None, _result_option("--csv", help="One line for each value.")] = None,
    output: Annotated[Path | None, _result_option(help="Folder of results instead of the list's.")] = None,
    save_outputs: Annotated[
        Path | None,
        _result_option(help="Folder to keep what each model says in, for --logits and for figures."),
    ] = None,
    features: Annotated[
        bool,
        _result_option(
            "--features",
            help="Keep the classifier's input and weights there too, for `lskd figure projection`.",
        ),
    ] = False,
) -> None:
    """Measure teachers side by side: accuracy, calibration, entropy, and stability by all its definitions.

    Differences between teachers that saw the same samples come with 95 % intervals. Models run under torchrun
    on several processes too.
    """
    from lskd_study.pages.teachers import run_teacher_list
    from lskd_study.plan.plan import PLAN
    from lskd_study.plan.recipes import find_study_file
    from lskd_study.plan.teacher_list import load_teachers
    from lskd_study.teachers.evaluate import teacher_specs
    from lskd_study.teachers.run import ComparisonSettings, run_teachers

    if features and save_outputs is None:
        raise LskdError("--features is about what is kept; name a folder with --save-outputs")
    temperatures = list(dict.fromkeys(temperature or [1.0]))
    settings = ComparisonSettings(
        temperatures=temperatures,
        replicates=replicates,
        seed=seed,
        small_class_correction=small_class_correction,
        save_outputs=save_outputs,
        evaluation={
            "data_dir": data_dir,
            "split": split,
            "batch_size": batch_size,
            "workers": workers,
            "device": device,
            "amp": amp,
            "img_size": img_size,
            "crop_pct": crop_pct,
            "features": features,
        },
    )
    if teacher_list is not None:
        if logits or model or config or checkpoint or name:
            raise LskdError("--list names the teachers in a file; leave out the other teacher options")
        study = load_teachers(find_study_file(str(teacher_list)))
        if temperature is not None:
            study = study.model_copy(update={"temperatures": temperatures})
        if output is not None:
            study = study.model_copy(update={"output": str(output)})
        if Path(study.output, PLAN).exists():
            raise LskdError(
                f"{study.output} contains the results of a study that trains; choose another --output"
            )
        if (file := json_file or csv_file) is not None:
            own = Path(study.output)
            raise LskdError(f"a list of teachers writes into its own folder, {own}; leave out {file}")
        run_teacher_list(study, settings)
        return
    if output is not None:
        raise LskdError("--output is for a list of teachers (--list); name files with --json and --csv")
    specs = teacher_specs(
        logits,
        model,
        checkpoint,
        name,
        config or [],
        files_option="--logits",
        numbered=True,
        order="in the order of --model and then --config, or list the teachers in a file (--list)",
    )
    run_teachers(specs, settings, {".json": json_file, ".csv": csv_file})
