# mmkd's recipe, Cascade X101 to R50, 2x. Not yet run on COCO. It is meant to pass 42.5 mAP, the
# best published with a stock student (CanKD); the teacher has 45.6, the student alone 38.4.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py', '../../_base_/mmkd.py']

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    teacher_config='mmdet::cascade_rcnn/cascade-rcnn_x101-64x4d_fpn_1x_coco.py',
    teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/cascade_rcnn_x101_64x4d_fpn_1x_coco/cascade_rcnn_x101_64x4d_fpn_1x_coco_20200515_075702-43ce6a30.pth',
    distillation=_base_.distillation,
)
