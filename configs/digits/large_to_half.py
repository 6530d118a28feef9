# The same network for both: the teacher sees the image whole, the student at half its size. The
# student begins as its teacher, whose weights fit it in full.
_base_ = ['half.py', '../_base_/mmkd.py']

load_from = '{{ fileDirname }}/../../checkpoints/digits_large_teacher.pth'

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='{{ fileDirname }}/large.py',
    teacher_ckpt='{{ fileDirname }}/../../checkpoints/digits_large_teacher.pth',
    distillation=dict(_base_.distillation, resolution=dict(teacher=(192, 192), student=(96, 96))),
)
