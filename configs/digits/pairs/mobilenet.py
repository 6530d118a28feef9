# Another backbone family: a MobileNetV2 of a quarter of its width learns from the ResNet.
_base_ = [
    '../_base_/detector.py',
    '../_base_/data.py',
    '../_base_/schedule.py',
    '../../_base_/mmkd.py',
]

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        widen_factor=0.25,
        out_indices=(1, 2, 4),  # strides 4, 8 and 16
    ),
    neck=dict(in_channels=[8, 8, 24]),
    teacher_config='{{ fileDirname }}/../teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../../checkpoints/digits_teacher.pth',
    distillation=_base_.distillation,
)
find_unused_parameters = True  # its last three stages are not read
