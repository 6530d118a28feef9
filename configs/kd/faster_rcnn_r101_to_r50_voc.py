_base_ = ['mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py', '../_base_/chen2017.py']

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    # OpenMMLab publishes no R101 for VOC. This one is written by
    # tools/train.py configs/kd/faster_rcnn_r101_voc.py
    teacher_config='{{ fileDirname }}/faster_rcnn_r101_voc.py',
    teacher_ckpt='work_dirs/faster_rcnn_r101_voc/epoch_4.pth',
    distillation=_base_.distillation,
)
