# Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
# Coefficient", NeurIPS 2022, with MMRazor's settings for Faster R-CNN.
distillation = dict(
    pkd=dict(
        type='PKD',
        loss_weight=6.0,
        pairs=['neck[0]', 'neck[1]', 'neck[2]', 'neck[3]'],  # P2 to P5
    ),
)
runner_type = 'mmkd.DistillationRunner'
