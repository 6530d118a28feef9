# The pyramid of Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, without its
# fusion of levels.
distillation = dict(
    reviewkd=dict(
        type='ReviewKD',
        fusion=False,
        loss_weight=1.0,
        pairs=['neck'],  # P2 to P6
    ),
)
runner_type = 'mmkd.DistillationRunner'
