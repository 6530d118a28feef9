# Distilled on the 800 labelled images: the paper's terms, from the teacher's neck and heads.
_base_ = ['plain.py', '../../_base_/chen2017.py']

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='{{ fileDirname }}/teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../../checkpoints/digits_first_teacher.pth',
    distillation=dict(_base_.distillation, start='teacher'),
)
