# A student of another family: MobileNetV2, a quarter as wide.
_base_ = ['../_base_/detector.py', '../_base_/data.py', '../_base_/schedule.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        widen_factor=0.25,
        out_indices=(1, 2, 4),  # strides 4, 8 and 16
    ),
    neck=dict(in_channels=[8, 8, 24]),
)
find_unused_parameters = True  # its last three stages are not read
