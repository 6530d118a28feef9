# Hard pseudo-labels: the teacher's boxes on the 7,200 images, and none of its answers.
_base_ = 'all_images.py'

model = dict(
    distillation=dict(
        rpn_cls=dict(loss_weight=0),
        rpn_bbox=dict(loss_weight=0),
        rcnn_cls=dict(loss_weight=0),
        rcnn_bbox=dict(loss_weight=0),
        hint=dict(loss_weight=0),
    )
)
