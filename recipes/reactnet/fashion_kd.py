"""A small ReActNet-18 on Fashion-MNIST, taught by fashion_teacher.py: the paper's Sec. 5 in small.

    mim train mmcls recipes/reactnet/fashion_kd.py
    mim train mmcls recipes/reactnet/fashion_kd.py --work-dir work_dirs/fashion_kd_plain --cfg-options \
        model.teacher.checkpoint=work_dirs/fashion_teacher_plain/epoch_10.pth model.teacher.smoothing=0

Hardware: any CPU. Duration: 6 to 10 minutes. Expected: 81 to 84 % top-1.
"""

_base_ = ["_base_/fashion.py", "_base_/runtime.py"]

model = dict(
    type="LsKdClassifier",
    backbone=dict(
        type="ReActNet",
        depth=18,
        width=0.25,
        stem="cifar",
        in_channels=1,
        binarize=("activations", "weights"),
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=128),
    teacher=dict(
        config="recipes/reactnet/fashion_teacher.py",
        checkpoint="work_dirs/fashion_teacher/epoch_10.pth",
        smoothing=0.1,  # what it was trained with, in the paper's convention; 0: without
    ),
)
custom_hooks = [*_base_.custom_hooks, dict(type="TeacherHook")]
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_evaluator = [dict(type="Accuracy", topk=(1, 5)), dict(type="DistillationMetric")]
optim_wrapper = dict(optimizer=dict(type="Adam", lr=2.5e-3, weight_decay=0))
