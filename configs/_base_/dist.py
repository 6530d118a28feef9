# Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, with MMRazor's
# settings for detectors.
distillation = dict(
    dist=dict(type='DIST', site='rcnn', inter_loss_weight=1.0, intra_loss_weight=1.0, tau=1.0),
)
runner_type = 'mmkd.DistillationRunner'
