# Box regression towards the teacher's deltas, whichever of the two is better: the unbounded
# counterpart of rcnn_bbox in chen2017.py.
distillation = dict(
    regression=dict(type='PlainRegression', site='rcnn', beta=1.0, loss_weight=1.0),
)
runner_type = 'mmkd.DistillationRunner'
