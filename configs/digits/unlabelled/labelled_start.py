# The student on the 800 labelled images, from the teacher's neck and heads.
_base_ = 'plain.py'

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='{{ fileDirname }}/teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../../checkpoints/digits_first_teacher.pth',
    distillation=dict(start='teacher'),
)
