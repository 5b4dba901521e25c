"""As binary_student.py, in two steps of one run. Run by binary_two_steps.yaml; by hand:

    mim train mmcls recipes/fashion_mnist/binary_two_steps_student.py \
        --cfg-options model.teacher.checkpoint=output/teacher/last.pth.tar

Step 1 has binary activations, real weights and a weight decay of 1e-5; step 2 binarises the weights too, and
starts with the first learning rate again. Hardware: any CPU.
"""

_base_ = "binary_student.py"

optim_wrapper = dict(
    optimizer=dict(weight_decay=1e-5),
    # As ReActNet's authors: of convolutions and biases, not of BatchNorm, slopes and the classifier.
    paramwise_cfg=dict(
        norm_decay_mult=0, custom_keys={"slope": dict(decay_mult=0), "head": dict(decay_mult=0)}
    ),
)
custom_hooks = [*_base_.custom_hooks, dict(type="TwoStepHook", epochs=3)]
param_scheduler = [dict(type="LinearDecay", end=3), dict(type="LinearDecay", begin=3)]
