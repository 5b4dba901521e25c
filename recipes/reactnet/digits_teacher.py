"""A real-valued teacher on scikit-learn's handwritten digits, with label smoothing.

    lskd data digits && mim train mmcls recipes/reactnet/digits_teacher.py
    mim train mmcls recipes/reactnet/digits_teacher.py --work-dir work_dirs/digits_teacher_plain \
        --cfg-options model.head.loss.alpha=0                       # the same without smoothing

Hardware: any CPU. Duration: half a minute. Expected: 98 to 99 % top-1.
"""

_base_ = ["_base_/small_teacher.py", "_base_/digits.py", "_base_/runtime.py"]
