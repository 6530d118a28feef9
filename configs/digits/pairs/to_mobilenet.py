# Another backbone family: the MobileNetV2 learns from the ResNet.
_base_ = ['mobilenet.py', '../../_base_/mmkd.py']

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='{{ fileDirname }}/../teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../../checkpoints/digits_teacher.pth',
    distillation=_base_.distillation,
)
