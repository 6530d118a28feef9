# Another kind of head: a Cascade R-CNN teaches the plain student.
_base_ = '../mmkd.py'

model = dict(
    teacher_config='{{ fileDirname }}/cascade_teacher.py',
    teacher_ckpt='{{ fileDirname }}/../../../checkpoints/digits_cascade_teacher.pth',
)
