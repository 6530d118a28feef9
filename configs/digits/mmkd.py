# mmkd's own recipe: the same terms, standardised hints, from the teacher's neck and heads.
_base_ = ['plain.py', '../_base_/mmkd.py']

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='{{ fileDirname }}/teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../checkpoints/digits_teacher.pth',
    distillation=_base_.distillation,
)
