# Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, with
# the authors' settings for Faster R-CNN, there on one map.
distillation = dict(
    fgfi=dict(
        type='FGFI',
        psi=0.5,
        loss_weight=0.01,
        schedule=dict(begin=400),
        pairs=['neck'],  # P2 to P6
    ),
)
runner_type = 'mmkd.DistillationRunner'
