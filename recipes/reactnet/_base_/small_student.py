"""What the students of small grey images share: ReActNet-18 of width 0.25, and how it is trained."""

model = dict(
    type="LsKdClassifier",
    backbone=dict(
        type="ReActNet",
        depth=18,
        width=0.25,
        stem="cifar",
        in_channels=1,
        binarize=("activations", "weights"),
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=128),
)
val_evaluator = [dict(type="Accuracy", topk=(1, 5)), dict(type="DistillationMetric")]
optim_wrapper = dict(optimizer=dict(type="Adam", lr=2.5e-3, weight_decay=0))
