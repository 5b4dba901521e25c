"""ReActNet-18 on ImageNet, taught by a ResNet-50 that was trained with label smoothing (Sec. 5, Fig. 6).

    mim train mmcls recipes/reactnet_kd.py
    mim train mmcls recipes/reactnet_kd.py --work-dir work_dirs/reactnet_kd_plain --cfg-options \
        model.teacher.checkpoint=plain.pth model.teacher.smoothing=0

The teacher: any of timm's or torchvision's ResNet-50 files; with smoothing 0.1 by

    timm train.py data/imagenet --model resnet50 --smoothing 0.1 --smoothing-convention paper ...

Single-step: activations and weights are binary from the start. Adam, batch 512, 2.5e-3, 128 epochs, linear
decay, as ReActNet's authors train; on N processes set train_dataloader.batch_size to 512 / N.
Hardware: one or more GPUs with 40 GB at batch 512, less with more processes. Duration: days on one GPU.
Expected: the paper has 63.108 % top-1 and 84.362 % top-5; 63.002 and 84.234 with an unsmoothed teacher.
"""

_base_ = ["reactnet/_base_/imagenet.py", "reactnet/_base_/runtime.py"]

model = dict(
    type="LsKdClassifier",
    backbone=dict(type="ReActNet", depth=18, binarize=("activations", "weights")),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=1000, in_channels=512),
    teacher=dict(
        model="resnet50",
        checkpoint="checkpoints/resnet50_smoothing_0.1.pth",
        smoothing=0.1,  # what it was trained with, in the paper's convention; 0: without
    ),
)
custom_hooks = [*_base_.custom_hooks, dict(type="TeacherHook")]

optim_wrapper = dict(optimizer=dict(type="Adam", lr=2.5e-3, weight_decay=0))
auto_scale_lr = dict(base_batch_size=512)
