"""A run's network as a folder to take away, checked against what the run left."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lskd import LskdError
from lskd.base.files import whole_folder, write_text
from lskd.checkpoints import file_checksum
from lskd.terms import centred
from lskd_study.base.extras import require_extra
from lskd_study.claims.contrasts import class_of_key
from lskd_study.export.choice import best_student, named, place, read_last_epochs
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import JOB, Plan, Run
from lskd_study.results.images import ImageResult, read_stored
from lskd_study.trainers import trainer_of
from lskd_study.trainers.trainer import Exported, quiet

FOLDER = "export"
_BATCHES = 8  # of validation images that are tried
_TRIED = 16  # of these by ONNX
_SAME = 0.01  # of the logits' spread: other kernels, and 16 bits in the file


def export(folder: Path, output: Path | None, seed: int | None, onnx: bool) -> Path:
    """Write a run's network, as a folder that appears whole or not at all, and print what was checked.

    Arguments are those of `lskd export`, which names the folder that is returned.

    Raises:
        LskdError: before anything is written, for what the user can fix.
        OnnxError: the network has no ONNX.
    """
    require_extra()
    plan, run = place(folder)
    if plan.kind is TRANSLATION:
        trainer_of(plan.ecosystem, "student").export(folder, folder, None, None)  # refuses
    if onnx:
        require_extra("export", "ONNX", "add --no-onnx, or ")
    if seed is not None and run is not None:
        raise LskdError(f"--seed chooses among a study's runs; {folder} is one of them already, leave it out")
    chosen = named(plan, run) if run else best_student(read_last_epochs(plan), seed)
    run = chosen.run
    target = output or plan.root / FOLDER / run.id
    if os.path.lexists(target):
        raise LskdError(f"{target} exists; remove it or name another folder with --output")
    job, source = chosen.result.job, plan.folder(run)
    trainer = trainer_of(plan.ecosystem, run.role)
    if run.real:
        raise LskdError(
            f"{run.id} is the real-valued control of a binary student, and only binary ones are exported; "
            f"take its {trainer.checkpoint}, which mmcls reads"
        )
    checkpoint, noted = source / trainer.checkpoint, (job.get("checkpoint") or {}).get("sha256")
    if file_checksum(checkpoint) != noted:
        raise LskdError(f"{checkpoint} is not what the run left: its checksum is not that of {JOB}")
    with whole_folder(target) as scratch:
        data_dir = plan.data_dir if plan.data_dir.is_dir() else None
        exported = trainer.export(source, scratch, class_names(chosen.result, plan.num_classes), data_dir)
        said, images = _checked(plan, run, exported)
        checks = [said]
        if onnx:
            from lskd_study.export.onnx_file import write_onnx

            name = f"network {run.model} of {run.id}"
            apart = write_onnx(exported.model, images, scratch / "model.onnx", name, exported.any_size)
            smaller = ", and on smaller ones" * exported.any_size
            checks.append(
                f"model.onnx: logits by onnxruntime and the checkpoint's differ by at most {apart:.1e} of "
                f"their spread, on {len(images)} images and on one{smaller}"
            )
        from lskd_study.export.card import model_card

        write_text(scratch / "README.md", model_card(plan, chosen, exported, checks, onnx))
    print("\n".join([f"run {chosen.because}", *checks]))
    return target


def class_names(result: ImageResult, classes: int) -> list[str] | None:
    """Return the classes' names, from the folders of the validation images; None where there are none."""
    pairs = {
        (label, class_of_key(key)) for key, label in zip(result.keys, result.labels.tolist(), strict=True)
    }
    names = [name for _, name in sorted(pairs)]
    whole = len(names) == len(set(names)) == classes and all(names)
    return names if whole else None


def _checked(plan: Plan, run: Run, exported: Exported) -> tuple[str, torch.Tensor]:
    """Compare what the exported network says of validation images with what the run said of them.

    Returns:
        What was compared, in words, and images `(B, C, H, W)` to try the network on.

    Raises:
        LskdError: they differ.
    """
    alike = "model.safetensors: logits equal the checkpoint's to the bit"
    if exported.answers is None:
        return f"{alike}; not tried on validation images", exported.images
    stored = read_stored(plan.folder(run), plan.num_classes)
    before = dict(zip(stored.keys, stored.sorted(stored.logits.float().numpy()), strict=True))
    named, own, theirs, seen = exported.answers.keys, [], [], []
    hook = exported.model.register_forward_pre_hook(lambda _, taken: seen.append(taken[0][:_TRIED].clone()))
    with quiet():  # of an image that cannot be read timm warns, and the error says so
        for positions, logits, *_ in islice(exported.answers.batches, _BATCHES):
            known = [row for row, p in enumerate(positions.tolist()) if named[p] in before]
            own += [logits[row] for row in known]
            theirs += [before[named[int(positions[row])]] for row in known]
    hook.remove()
    if not own:
        return f"{alike}; the validation images of the run are not there", exported.images
    differences = np.abs(centred(torch.stack(own)).numpy() - np.stack(theirs))
    apart = float(differences.max() / np.ptp(theirs))
    if not apart <= _SAME:
        raise LskdError(
            f"the exported network and run {run.id} differ on its validation images, by {apart:.1%} of the "
            f"logits' spread; are {plan.data_dir} the data that it was trained on?"
        )
    text = (
        f"model.safetensors: logits of {len(own)} validation images and the run's own differ by at most "
        f"{apart:.1e} of their spread (the run's are stored in 16 bits)"
    )
    return text, seen[0]
