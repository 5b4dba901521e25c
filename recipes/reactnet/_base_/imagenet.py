"""ImageNet-1K as image folders: crops of (0.08, 1), lighting and flips, see docs/mmcls.md."""

num_classes = 1000
data_root = "data/imagenet"
hint = (
    "put ImageNet-1K there as train/<wnid>/ and val/<wnid>/, or a link to it. What runs here and now is "
    "`lskd data digits`, then `mim train mmcls recipes/reactnet/digits_teacher.py`, "
    "then `mim train mmcls recipes/reactnet/digits_kd.py`"
)
data_preprocessor = dict(
    type="ClsDataPreprocessor",
    num_classes=num_classes,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=224, crop_ratio_range=(0.08, 1.0)),
    dict(type="PcaLighting", std=0.1),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackClsInputs"),
]
val_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=256, edge="short"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackClsInputs"),
]
train_dataloader = dict(
    batch_size=512,
    num_workers=8,
    persistent_workers=False,
    worker_init_fn=dict(type="seed_worker"),
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
    num_workers=8,
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
val_evaluator = [dict(type="Accuracy", topk=(1, 5)), dict(type="DistillationMetric")]
test_evaluator = [dict(type="Accuracy", topk=(1, 5))]
train_cfg = dict(by_epoch=True, max_epochs=128, val_interval=1)
val_cfg = dict()
test_cfg = dict()
