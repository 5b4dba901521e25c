"""Fashion-MNIST, 28 x 28: 6,000 training and 2,000 validation images; for testing all 10,000 test images."""

num_classes = 10
data_root = "data/FashionMNIST/raw"
data_preprocessor = dict(type="ClsDataPreprocessor", num_classes=num_classes, mean=[72.9], std=[90.0])
train_pipeline = [
    dict(type="RandomCrop", crop_size=28, padding=2),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackClsInputs"),
]
val_pipeline = [dict(type="PackClsInputs")]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="FashionMnist", data_root=data_root, train=True, indices=6000, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="FashionMnist", data_root=data_root, train=False, indices=2000, pipeline=val_pipeline),
)
test_dataloader = dict(
    batch_size=256,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="FashionMnist", data_root=data_root, train=False, pipeline=val_pipeline),
)
test_evaluator = [dict(type="Accuracy", topk=(1, 5))]
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=64)
