# Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, with the authors' settings for
# detectors.
distillation = dict(
    dkd=dict(type='DKD', site='rcnn', alpha=1.0, beta=0.25, tau=1.0),
)
runner_type = 'mmkd.DistillationRunner'
