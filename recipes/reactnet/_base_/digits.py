"""scikit-learn's handwritten digits at 16 x 16, written by `lskd data digits`."""

num_classes = 10
data_root = "data/digits"
hint = "write it with `lskd data digits`"
data_preprocessor = dict(type="ClsDataPreprocessor", num_classes=num_classes, mean=[127.5], std=[127.5])
train_pipeline = [
    dict(type="LoadImageFromFile", color_type="grayscale"),
    dict(type="RandomResizedCrop", scale=16, crop_ratio_range=(0.7, 1.0), aspect_ratio_range=(0.85, 1.18)),
    dict(type="PackClsInputs"),
]
val_pipeline = [
    dict(type="LoadImageFromFile", color_type="grayscale"),
    dict(type="Resize", scale=16),
    dict(type="PackClsInputs"),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CheckedImageFolder",
        data_root=data_root,
        data_prefix="train",
        num_classes=num_classes,
        hint=hint,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CheckedImageFolder",
        data_root=data_root,
        data_prefix="val",
        num_classes=num_classes,
        hint=hint,
        pipeline=val_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
test_evaluator = [dict(type="Accuracy", topk=(1, 5))]
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=64)
