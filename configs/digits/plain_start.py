# No distillation: the plain student, started from the teacher's neck and heads.
_base_ = 'plain.py'

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='{{ fileDirname }}/teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../checkpoints/digits_teacher.pth',
    distillation=dict(start='teacher'),
)
