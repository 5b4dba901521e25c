"""A small ReActNet-18 on Fashion-MNIST, taught by fashion_teacher.py: the paper's Sec. 5 in small.

    mim train mmcls recipes/reactnet/fashion_kd.py
    mim train mmcls recipes/reactnet/fashion_kd.py --work-dir work_dirs/fashion_kd_plain --cfg-options \
        model.teacher.checkpoint=work_dirs/fashion_teacher_plain/epoch_10.pth model.teacher.smoothing=0

Hardware: any CPU. Duration: 6 to 10 minutes. Expected: 81 to 84 % top-1.
"""

_base_ = ["_base_/small_student.py", "_base_/fashion.py", "_base_/runtime.py"]

model = dict(
    teacher=dict(
        config="recipes/reactnet/fashion_teacher.py",
        checkpoint="work_dirs/fashion_teacher/epoch_10.pth",
        smoothing=0.1,  # what it was trained with, in the paper's convention; 0: without
    ),
)
custom_hooks = [*_base_.custom_hooks, dict(type="TeacherHook")]
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
