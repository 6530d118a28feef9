# The recipe of Chen et al., "Learning Efficient Object Detection Models with Knowledge
# Distillation", NIPS 2017, each value once. A pair wires it with
# `model = dict(..., distillation=_base_.distillation)`, see configs/kd/.
#
#   L = L_RPN + L_RCN + γ · L_hint                                          (1)
#
# λ, the weight of regression, is MMDetection's own `loss_bbox.loss_weight` of each head (1, as in
# the paper); the terms below are multiplied by the weight of the head's loss that they join.
# `loss_weight=0` turns a term off. `schedule=dict(begin=0, warmup=500, end=None)` lets it rise.
soft = dict(
    type='WeightedSoftCELoss',
    hard_weight=0.5,  # μ of (2), the soft loss has 1 - μ; our default, the paper gives none
    background_weight=1.5,  # w_c of the background in (3); 1 for every other class
    temperature=1.0,  # T: none, as the paper found best
)
bounded = dict(
    type='TeacherBoundedL2Loss',
    loss_weight=0.5,  # ν of (5)
    margin=0.0,  # m of (4) (our default)
)
distillation = dict(
    rpn_cls=soft,
    rpn_bbox=bounded,
    rcnn_cls=soft,
    rcnn_bbox=bounded,
    hint=dict(
        type='HintL2Loss',
        loss_weight=0.5,  # γ of (1)
        normalize=False,  # raw features, as in the paper
        pairs=['neck'],  # guided and hint layers, each output of the neck with its counterpart
    ),
    start=None,  # 'teacher': neck and heads begin as the teacher's (not in the paper)
)
runner_type = 'mmkd.DistillationRunner'
