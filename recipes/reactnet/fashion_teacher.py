"""A real-valued teacher on Fashion-MNIST, with label smoothing.

    mim train mmcls recipes/reactnet/fashion_teacher.py
    mim train mmcls recipes/reactnet/fashion_teacher.py --work-dir work_dirs/fashion_teacher_plain \
        --cfg-options model.head.loss.alpha=0                       # the same without smoothing

Hardware: any CPU. Duration: 2 to 5 minutes. Expected: 83 to 85 % top-1.
"""

_base_ = ["_base_/small_teacher.py", "_base_/fashion.py", "_base_/runtime.py"]
