# Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. No weight is published for
# detectors.
distillation = dict(
    kl=dict(type='KL', site='rcnn', tau=1.0, loss_weight=1.0),
)
runner_type = 'mmkd.DistillationRunner'
