# Yang et al., "Masked Generative Distillation", ECCV 2022, with the authors' settings for two-stage
# detectors.
distillation = dict(
    mgd=dict(
        type='MGD',
        lambda_mgd=0.45,  # the share of the places that is hidden
        loss_weight=5e-7,
        pairs=['neck[0]', 'neck[1]', 'neck[2]', 'neck[3]'],  # P2 to P5
    ),
)
runner_type = 'mmkd.DistillationRunner'
