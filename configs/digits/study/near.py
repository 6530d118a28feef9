# The near student: three quarters of its teacher's width.
_base_ = 'far.py'

model = dict(
    backbone=dict(
        base_channels=24,
        init_cfg=dict(checkpoint='{{ fileDirname }}/../../../checkpoints/digits_near_backbone.pth'),
    ),
    neck=dict(in_channels=[24, 48, 96]),
)
