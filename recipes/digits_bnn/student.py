"""A small ReActNet-18 on handwritten digits, taught by a timm model. Run by study.yaml; by hand:

    mim train mmcls recipes/digits_bnn/student.py \
        --cfg-options model.teacher.checkpoint=output/teacher/last.pth.tar

The teacher comes from the command in recipes/digits/teacher.yaml. Hardware: any CPU. Duration: one minute.
"""

_base_ = "../reactnet/digits_kd.py"

model = dict(
    teacher=dict(_delete_=True, model="test_resnet", checkpoint="output/teacher/last.pth.tar", smoothing=0.1)
)
train_cfg = dict(max_epochs=15)
