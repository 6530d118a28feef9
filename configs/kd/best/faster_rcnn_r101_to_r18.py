# mmkd's recipe, R101 to R18, 1x. Not yet run on COCO. No result of this pair is published; the
# nearest, which it is meant to pass, is DSIG's 37.25 mAP from an R50 of 40.2 in Detectron2.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../../_base_/mmkd.py']

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    backbone=dict(depth=18, init_cfg=dict(checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512]),
    teacher_config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py',
    teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_1x_coco/faster_rcnn_r101_fpn_1x_coco_20200130-f513f705.pth',
    distillation=_base_.distillation,
)
