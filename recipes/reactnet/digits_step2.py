"""Handwritten digits, step 2 of two: starts from step 1 and binarises the weights too.

    mim train mmcls recipes/reactnet/digits_step2.py

Teacher, hardware and duration as in digits_kd.py.
"""

_base_ = "digits_kd.py"

model = dict(step1_checkpoint="work_dirs/digits_step1/epoch_20.pth")
