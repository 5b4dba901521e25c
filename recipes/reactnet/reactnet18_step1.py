"""ReActNet-18 on ImageNet, step 1 of two: binary activations, real weights, weight decay 1e-5.

    mim train mmcls recipes/reactnet/reactnet18_step1.py

Teacher, hardware and duration as in recipes/reactnet_kd.py. Then recipes/reactnet/reactnet18_step2.py.
"""

_base_ = "../reactnet_kd.py"

model = dict(backbone=dict(binarize=("activations",)))
optim_wrapper = dict(
    optimizer=dict(weight_decay=1e-5),
    # As ReActNet's authors: of convolutions and biases, not of BatchNorm, slopes and the classifier.
    paramwise_cfg=dict(
        norm_decay_mult=0, custom_keys={"slope": dict(decay_mult=0), "head": dict(decay_mult=0)}
    ),
)
