# A Cascade R-CNN of the teacher's width, trained as long. `make cascade-teacher` writes its
# checkpoint.
_base_ = '../teacher.py'

head = dict(
    type='Shared2FCBBoxHead',
    in_channels=32,
    fc_out_channels=128,
    roi_feat_size=7,
    num_classes=10,
    reg_class_agnostic=True,
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0),
)
coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0])
assigner = dict(type='MaxIoUAssigner', match_low_quality=False, ignore_iof_thr=-1)
sampler = dict(
    type='RandomSampler', num=48, pos_fraction=0.33, neg_pos_ub=-1, add_gt_as_proposals=True
)

model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(head, bbox_coder=dict(coder, target_stds=[0.1, 0.1, 0.2, 0.2])),
            dict(head, bbox_coder=dict(coder, target_stds=[0.05, 0.05, 0.1, 0.1])),
            dict(head, bbox_coder=dict(coder, target_stds=[0.033, 0.033, 0.067, 0.067])),
        ],
    ),
    train_cfg=dict(
        rcnn=[
            dict(
                assigner=dict(assigner, pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
                sampler=sampler, pos_weight=-1, debug=False,
            ),
            dict(
                assigner=dict(assigner, pos_iou_thr=0.6, neg_iou_thr=0.6, min_pos_iou=0.6),
                sampler=sampler, pos_weight=-1, debug=False,
            ),
            dict(
                assigner=dict(assigner, pos_iou_thr=0.7, neg_iou_thr=0.7, min_pos_iou=0.7),
                sampler=sampler, pos_weight=-1, debug=False,
            ),
        ],
    ),
)  # fmt: skip
