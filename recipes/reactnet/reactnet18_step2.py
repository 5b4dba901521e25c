"""ReActNet-18 on ImageNet, step 2 of two: starts from step 1 and binarises the weights too.

    mim train mmcls recipes/reactnet/reactnet18_step2.py

Teacher, hardware and duration as in recipes/reactnet_kd.py.
"""

_base_ = "../reactnet_kd.py"

model = dict(step1_checkpoint="work_dirs/reactnet18_step1/epoch_128.pth")
