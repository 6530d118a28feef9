# Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
# Normalized Loss and Customized Soft Labels", ICCV 2023. The settings are the authors' for
# classification; none are published for detectors.
distillation = dict(
    nkd=dict(type='NKD', site='rcnn', gamma=1.5, tau=1.0),
)
runner_type = 'mmkd.DistillationRunner'
