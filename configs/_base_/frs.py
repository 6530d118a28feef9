# Du et al., "Distilling Object Detectors with Feature Richness", NeurIPS 2021, with the authors'
# settings for Faster R-CNN.
distillation = dict(
    frs=dict(
        type='FRS',
        feature_weight=0.002,
        rpn_weight=0.1,
        schedule=dict(warmup=500),
        pairs=['neck'],  # P2 to P6
    ),
)
runner_type = 'mmkd.DistillationRunner'
