# Distilled by the paper's recipe.
_base_ = ['plain.py', '../_base_/chen2017.py']

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='{{ fileDirname }}/teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../checkpoints/digits_teacher.pth',
    distillation=_base_.distillation,
)
