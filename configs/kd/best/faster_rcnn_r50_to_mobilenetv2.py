# mmkd's recipe, R50 to MobileNetV2, 1x. Not yet run on COCO. It is meant to pass 34.44 mAP, DSIG's
# published result from an R50 of 40.2 in Detectron2.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../../_base_/mmkd.py']

model = dict(
    type='mmkd.KnowledgeDistillationTwoStageDetector',
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 6),  # strides 4, 8, 16 and 32
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2'),
    ),
    neck=dict(in_channels=[24, 32, 96, 320]),
    teacher_config='mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth',
    distillation=_base_.distillation,
)

find_unused_parameters = True  # MobileNetV2 builds a last convolution that out_indices leaves out
