"""A small ReActNet-18 on Fashion-MNIST, taught by a timm model. Run by studies of this folder; by hand:

    mim train mmcls recipes/fashion_mnist/binary_student.py \
        --cfg-options model.teacher.checkpoint=output/teacher/last.pth.tar

The teacher comes from the command in recipes/fashion_mnist/teacher.yaml; crops and flips are its own. Soft
labels alone, T = 1, as in the paper. One step: weights and activations are binary from the start.
Hardware: any CPU.
"""

_base_ = "../reactnet/digits_kd.py"

data_root = "data/fashion_mnist_10000"
hint = "make it with the commands in recipes/fashion_mnist/binary.yaml"
data_preprocessor = dict(mean=[72.9], std=[90.0])
train_pipeline = [
    dict(type="LoadImageFromFile", color_type="grayscale"),
    dict(type="RandomResizedCrop", scale=28, crop_ratio_range=(0.7, 1.0), aspect_ratio_range=(0.85, 1.18)),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackClsInputs"),
]
val_pipeline = [
    dict(type="LoadImageFromFile", color_type="grayscale"),
    dict(type="Resize", scale=28),
    dict(type="PackClsInputs"),
]
train_dataloader = dict(batch_size=64, dataset=dict(data_root=data_root, hint=hint, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, hint=hint, pipeline=val_pipeline))
test_dataloader = val_dataloader

model = dict(
    teacher=dict(_delete_=True, model="test_resnet", checkpoint="output/teacher/last.pth.tar", smoothing=0.1)
)
train_cfg = dict(max_epochs=6, val_interval=3)
