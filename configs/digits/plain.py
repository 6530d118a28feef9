# The plain student: the teacher's neck and heads on a backbone of an eighth of its width, which
# `python tools/pretrain_digits.py` has pretrained as ImageNet pretrains a zoo detector's.
_base_ = ['_base_/detector.py', '_base_/data.py', '_base_/schedule.py']

model = dict(
    backbone=dict(
        base_channels=4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{ fileDirname }}/../../checkpoints/digits_student_backbone.pth',
        ),
    ),
    neck=dict(in_channels=[4, 8, 16]),
)
