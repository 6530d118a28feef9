# Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, for RoI
# heads as in the authors' code, with its settings for R50 to R18.
distillation = dict(
    crosskd=dict(
        type='CrossKD',
        site='rcnn',
        tau=3.0,
        cls_weight=0.5,
        reg_weight=1.0,
        pairs=['neck'],  # what the teacher's head is run on
    ),
)
runner_type = 'mmkd.DistillationRunner'
