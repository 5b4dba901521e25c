"""A small ReActNet-18 on handwritten digits, taught by digits_teacher.py: the paper's Sec. 5 in small.

    mim train mmcls recipes/reactnet/digits_kd.py
    mim train mmcls recipes/reactnet/digits_kd.py --work-dir work_dirs/digits_kd_plain --cfg-options \
        model.teacher.checkpoint=work_dirs/digits_teacher_plain/epoch_10.pth model.teacher.smoothing=0

Hardware: any CPU. Duration: one to two minutes. Expected: 97 to 98.5 % top-1.
"""

_base_ = ["_base_/small_student.py", "_base_/digits.py", "_base_/runtime.py"]

model = dict(
    teacher=dict(
        config="recipes/reactnet/digits_teacher.py",
        checkpoint="work_dirs/digits_teacher/epoch_10.pth",
        smoothing=0.1,  # what it was trained with, in the paper's convention; 0: without
    ),
)
custom_hooks = [*_base_.custom_hooks, dict(type="TeacherHook")]
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
