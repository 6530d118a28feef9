# Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017. No weight is published
# for detectors; this is the authors' for classification.
distillation = dict(
    at=dict(
        type='AT',
        loss_weight=1000.0,
        pairs=['neck[0]', 'neck[1]', 'neck[2]', 'neck[3]'],  # P2 to P5
    ),
)
runner_type = 'mmkd.DistillationRunner'
