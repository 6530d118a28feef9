# The network of the teacher on images of half their size (192x192 in the files, 96x96 here).
_base_ = ['_base_/detector.py', '_base_/data_large.py', '_base_/schedule.py']

model = dict(
    backbone=dict(base_channels=32),
    neck=dict(in_channels=[32, 64, 128]),
    # The same digits, in half as many pixels.
    rpn_head=dict(anchor_generator=dict(scales=[1.75])),
)
optim_wrapper = dict(optimizer=dict(lr=0.001, weight_decay=0.05))
