# Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, with
# MMRazor's settings for two-stage detectors.
distillation = dict(
    cwd=dict(
        type='CWD',
        tau=1.0,
        loss_weight=10.0,
        pairs=['neck'],  # P2 to P6
    ),
)
runner_type = 'mmkd.DistillationRunner'
