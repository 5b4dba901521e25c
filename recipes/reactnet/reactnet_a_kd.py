"""ReActNet-A (MobileNet's layout) on ImageNet, single-step.

    mim train mmcls recipes/reactnet/reactnet_a_kd.py

Batch 256, 1.25e-3, 128 epochs, as ReActNet's authors train it. Teacher as in recipes/reactnet_kd.py.
Hardware: one or more GPUs. Duration: days on one GPU. The paper has no figures for it.
"""

_base_ = "../reactnet_kd.py"

model = dict(
    backbone=dict(_delete_=True, type="ReActNetA", binarize=("activations", "weights")),
    head=dict(in_channels=1024),
)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=1.25e-3))
auto_scale_lr = dict(base_batch_size=256)
