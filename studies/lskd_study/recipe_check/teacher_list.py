"""Lists of teachers to measure: each model's weights are written, read back and asked about two images."""

import contextlib
import io
from pathlib import Path

from lskd_study.base.extras import needs_study_extra
from lskd_study.plan.recipes import Recipe
from lskd_study.plan.teacher_list import TeacherEntry, load_teachers
from lskd_study.recipe_check.miniature import DATA_SETS, write_miniature
from lskd_study.recipe_check.report import CheckedRecipe, CheckedRun
from lskd_study.trainers.size import network_size, tensor_size

with needs_study_extra():
    import timm
    import torch
    import torchvision

    from timm_ls_kd.evaluation import evaluate_model
    from timm_ls_kd.models import check_model_name
    from timm_ls_kd.torchvision_models import PREFIX

_SIZE = 224


def check_teacher_list(recipe: Recipe, scratch: Path) -> CheckedRecipe:
    """Check a list of teachers; entries of stored logits and of mmcls have nothing to try but their keys.

    Raises:
        LskdError: one line with what is wrong.
    """
    study = load_teachers(recipe.path)
    folder = scratch / "data" / f"imagenet-{DATA_SETS['imagenet'].classes}"
    if not folder.exists():
        write_miniature(folder, DATA_SETS["imagenet"])
    runs = [_check(entry, folder, scratch) for entry in study.teachers]
    return CheckedRecipe(recipe.name, runs)


def _check(entry: TeacherEntry, folder: Path, scratch: Path) -> CheckedRun:
    if entry.model is None:
        return CheckedRun(entry.name, None, [], 1, None)
    model = entry.model
    if not model.startswith(PREFIX):
        check_model_name(model, "model")

    def create() -> torch.nn.Module:
        if model.startswith(PREFIX):
            return torchvision.models.get_model(model.removeprefix(PREFIX), weights=None)  # type: ignore[no-any-return]
        return timm.create_model(model)  # type: ignore[no-any-return]

    checkpoint = scratch / Path(entry.checkpoint or "weights.pth").name
    # A name that the library does not know is its own error, in one line, with the names there are.
    known = not model.startswith(PREFIX) or model.removeprefix(PREFIX) in torchvision.models.list_models()
    network = network_size(create, tensor_size(3, _SIZE, _SIZE)) if known else None
    if known:
        with torch.device("meta"):
            shapes = create().state_dict()
        torch.save(
            {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}, checkpoint
        )
    else:
        torch.save({}, checkpoint)
    with contextlib.redirect_stdout(io.StringIO()):
        answers = evaluate_model(model, checkpoint, folder, batch_size=2)
        next(iter(answers.batches))
    checkpoint.unlink()
    return CheckedRun(f"{entry.name}, {model}", network, [], 1, None)
