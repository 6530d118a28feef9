# The middle student: three eighths of its teacher's width.
_base_ = 'far.py'

model = dict(
    backbone=dict(
        base_channels=12,
        init_cfg=dict(
            checkpoint='{{ fileDirname }}/../../../checkpoints/digits_middle_backbone.pth'
        ),
    ),
    neck=dict(in_channels=[12, 24, 48]),
)
