# Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, with the authors'
# settings for COCO. For VOC they have 3 and 12, and no head.
distillation = dict(
    defeat=dict(
        type='DeFeat',
        object_weight=4.0,
        background_weight=16.0,
        pairs=['neck'],  # P2 to P6
    ),
    defeat_head=dict(type='DeFeatHead', object_weight=2.0, background_weight=2.0, tau=1.0),
)
runner_type = 'mmkd.DistillationRunner'
