# Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, with the authors' settings
# for two-stage detectors.
distillation = dict(
    reviewkd=dict(
        type='ReviewKD',
        loss_weight=1.0,  # R101 to R50; 1.2 to R18, 2.0 to MobileNetV2
        pairs=['neck'],  # P2 to P6
    ),
)
runner_type = 'mmkd.DistillationRunner'
