# Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, with the authors'
# settings for two-stage detectors.
distillation = dict(
    fgd=dict(
        type='FGD',
        temp=0.5,
        alpha_fgd=5e-5,  # objects
        beta_fgd=2.5e-5,  # background
        gamma_fgd=5e-5,  # attention
        lambda_fgd=5e-7,  # relations
        pairs=['neck[0]', 'neck[1]', 'neck[2]', 'neck[3]'],  # P2 to P5
    ),
)
runner_type = 'mmkd.DistillationRunner'
