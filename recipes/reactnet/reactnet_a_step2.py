"""ReActNet-A on ImageNet, step 2 of two: starts from step 1 and binarises the weights too.

    mim train mmcls recipes/reactnet/reactnet_a_step2.py

Hardware and duration as in recipes/reactnet/reactnet_a_kd.py.
"""

_base_ = "reactnet_a_kd.py"

model = dict(step1_checkpoint="work_dirs/reactnet_a_step1/epoch_128.pth")
