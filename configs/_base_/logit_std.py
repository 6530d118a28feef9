# Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024. The settings are the
# authors' for classification; none are published for detectors.
distillation = dict(
    logit_std=dict(type='KL', site='rcnn', standardise=True, tau=2.0, loss_weight=9.0),
)
runner_type = 'mmkd.DistillationRunner'
