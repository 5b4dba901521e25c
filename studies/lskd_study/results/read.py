"""Read a study's run folders: each finished run as what its trainer's kind of model leaves."""

from functools import partial
from typing import Any

from lskd import DivergedError, LskdError
from lskd.base.files import read_json
from lskd_study.base.cores import over_cores
from lskd_study.plan.kinds import TRANSLATION
from lskd_study.plan.plan import JOB, Plan, Run
from lskd_study.results.images import read_image_result
from lskd_study.results.results import Failure, Result, Results


def read_results(plan: Plan) -> Results[Any]:
    """Read every finished run of the plan, as ``ImageResult`` or ``TranslationResult``.

    Raises:
        LskdError: for a run folder that is damaged or runs that were measured on different samples.
    """
    finished, missing, failed = {}, [], {}
    ended = []
    for run in plan.runs:
        if not plan.done(run):
            missing.append(run.id)
        elif plan.failed(run):
            failed[run.id] = Failure(run, read_json(plan.folder(run) / JOB))
        else:
            ended.append(run)
    for run, found in zip(ended, over_cores(partial(_read, plan), ended), strict=True):
        if isinstance(found, DivergedError):  # recorded as finished by a version that did not look
            record = read_json(plan.folder(run) / JOB)
            failed[run.id] = Failure(run, record | {"failed": str(found)})
        else:
            finished[run.id] = found
    for result in finished.values():
        first = next(iter(finished.values()))
        if not result.same_samples(first):
            samples = plan.kind.samples if plan.kind is TRANSLATION else "validation samples"
            raise LskdError(
                f"{result.run.id} and {first.run.id} were measured on different {samples}; "
                "the data changed in between: remove the older runs"
            )
    return Results(plan, finished, missing, failed)


def _read(plan: Plan, run: Run) -> Result | DivergedError:
    folder = plan.folder(run)
    try:
        if plan.kind is TRANSLATION:
            from lskd_study.results.translation import read_translation_result  # needs sacreBLEU

            return read_translation_result(folder, run)
        return read_image_result(folder, run, plan.num_classes, plan.last_epochs)
    except DivergedError as error:
        return error
    except LskdError:
        raise
    except Exception as error:  # safetensors has an exception class of its own
        reason = " ".join(str(error).split())
        raise LskdError(f"run folder {folder} is damaged ({reason}); remove it to run it again") from error
