# The plain student: the teacher's neck and heads on a backbone of an eighth of its width.
_base_ = ['_base_/detector.py', '_base_/data.py', '_base_/schedule.py']

model = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16]))
