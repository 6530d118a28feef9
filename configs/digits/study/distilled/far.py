# The far student beside its teacher. It has no terms: a study says which.
_base_ = '../far.py'

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='{{ fileDirname }}/../../teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../../../checkpoints/digits_teacher.pth',
    distillation=dict(),
)
runner_type = 'mmkd.DistillationRunner'
