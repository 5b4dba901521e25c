"""The page of a study without students: its teachers side by side (Tables 1, 3 and 4)."""

from lskd_study.plan import LOGITS, Plan
from lskd_study.teachers.run import Settings
from lskd_study.teachers.schema import TeacherEntry, TeacherList
from lskd_study.teachers.study import run_teacher_list

# timm's names of the networks in the paper's Tables 1 and 10, tags aside.
_ROWS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "mobilenetv2_100": "MobileNetV2",
    "densenet121": "DenseNet121",
    "resnext50_32x4d": "ResNeXt50 32x4d",
    "wide_resnet50_2": "Wide ResNet50",
    "resnext101_32x8d": "ResNeXt101 32x8d",
}
# The networks of Tables 1 and 10 have seen ImageNet-1K.
_PAPERS_DATA = "imagenet"


def write_teachers_report(plan: Plan) -> None:
    """Compare the finished teachers, as ``lskd stability`` does, into the study's output folder.

    Tables 1 and 10 show the paper's own figures beside them where the data are ImageNet's and there is one
    run of each kind.

    Raises:
        LskdError: when run folders are damaged or the output cannot be written.
    """
    papers = plan.data_dir.name == _PAPERS_DATA and plan.num_classes == 1000 and len(plan.seeds) == 1
    entries = [
        TeacherEntry(
            name=run.id.removeprefix("teacher-"),
            logits=str(plan.folder(run) / LOGITS),
            network=_ROWS.get(run.model.partition(".")[0]) if papers else None,
            smoothing=run.smoothing,
        )
        for run in plan.runs
        if plan.done(run)
    ]
    study = TeacherList(
        kind="stability", title=plan.title, output=str(plan.root), temperatures=[1.0], teachers=entries
    )
    run_teacher_list(study, Settings(), missing=[run.id for run in plan.unfinished()])
