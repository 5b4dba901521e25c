"""The model card of an exported run: a README with front matter as the Hugging Face hub reads it."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from lskd_study.base.provenance import versions
from lskd_study.base.text import escaped
from lskd_study.claims.contrasts import estimate_contrast, measure_of
from lskd_study.export.choice import Chosen
from lskd_study.pages.page import counted, number
from lskd_study.pages.verdicts import VERDICTS_FILE, read_record
from lskd_study.plan.plan import Plan, exact
from lskd_study.trainers.trainer import Exported

_VERSIONS = ("python", "lskd", "torch", "timm", "mmcls")
_MEASURES = {"top1": "top-1 accuracy (%)", "top5": "top-5 accuracy (%)"}
_KINDS = {
    "teacher": "Teacher",
    "student": "Student",
    "control": "Control, a student’s network without a teacher,",
}


class _Whole(str):
    """Text that is of several lines and no Markdown: front matter, code."""


def model_card(plan: Plan, chosen: Chosen, exported: Exported, checks: list[str], onnx: bool) -> str:
    """Return the card's text: what it is, how good, how trained, what the study found, how to repeat it.

    Args:
        checks: what was compared, a line each.
        onnx: whether there is a model.onnx.
    """
    run, job = chosen.run, chosen.result.job
    environment = Environment(
        finalize=lambda value: value if isinstance(value, _Whole) else escaped(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        front_matter=_front_matter(plan, chosen, exported),
        run=run,
        teacher=plan.by_id.get(run.teacher),
        kind=_KINDS[run.role],
        plan=plan,
        chosen=chosen,
        images=counted(len(chosen.result.keys), "validation image"),
        data=_data_name(plan),
        seeds=counted(len(chosen.seeds), "seed"),
        results=list(_results(plan, chosen)),
        exact=exact,
        found=list(_found(plan)),
        usage=_code(exported.usage),
        onnx=onnx,
        any_size=exported.any_size,
        versions=lambda found: ", ".join(f"{name} {found[name]}" for name in _VERSIONS if name in found),
        here=versions(),
        job=job,
        checks=checks,
        command=_code(str(job.get("rerun_command") or job["command"])),
    )


def _front_matter(plan: Plan, chosen: Chosen, exported: Exported) -> str:
    task = "image-classification"
    score = EvalResult(
        task_type=task,
        dataset_type="image-folder",
        dataset_name=_data_name(plan),
        dataset_split="validation",
        metric_type="accuracy",
        metric_name="top-1 accuracy of this run",
        metric_value=round(chosen.result.top1 / 100, 6),
    )
    card = ModelCardData(
        library_name=exported.library,
        pipeline_tag=task,
        tags=[task, *["knowledge-distillation"] * bool(chosen.run.teacher), "label-smoothing"],
        model_name=chosen.run.id,
        eval_results=[score],
    )
    return _Whole(card.to_yaml())


def _results(plan: Plan, chosen: Chosen) -> Iterator[tuple[str, ...]]:
    for quantity, name in _MEASURES.items():
        if quantity == "top5" and plan.num_classes <= 5:
            continue
        mean = estimate_contrast(measure_of(quantity), [[(1.0, chosen.seeds)]], sorted(chosen.seeds))
        ends = f"{number(max(mean.low, 0), 2)} to {number(min(mean.high, 100), 2)}" if mean.known else "–"
        yield name, number(chosen.result.value(quantity), 2), number(mean.estimate, 2), ends


def _found(plan: Plan) -> Iterator[str]:
    if not (plan.root / VERDICTS_FILE).exists():
        yield "The study has no page yet, so no verdict."
        return
    record = read_record(plan.root)
    for finding in record.findings:
        if finding.claim == record.headline.claim:
            yield f"{finding.text}: {record.headline.verdict}"
            break
    yield record.headline.answer
    if record.recommendation.sentence:
        yield record.recommendation.sentence
    yield from record.notices


def _data_name(plan: Plan) -> str:
    return plan.data.rstrip("/").rpartition("/")[2]


def _code(text: str) -> str:
    """Return text as code, by indentation: no character of it ends that."""
    return _Whole("\n".join(f"    {line}".rstrip() for line in text.splitlines()))
