"""What the teachers of small grey images share: a ResNet-18 of width 0.25, and how it is trained."""

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ResNet_CIFAR", depth=18, in_channels=1, stem_channels=16, base_channels=16, out_indices=(3,)
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=128,
        # Eq. 1 of the paper: 1 - alpha on the label, alpha / (K - 1) on each other class.
        loss=dict(type="SmoothedCrossEntropy", alpha=0.1, convention="paper"),
    ),
)
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_evaluator = [dict(type="Accuracy", topk=(1, 5))]
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=1e-4))
