# mmkd's own recipe: the terms of Chen et al. with hints standardised per channel, soft losses that
# join the hard ones instead of sharing their weight, and a start that is the teacher's neck and
# heads.
_base_ = 'chen2017.py'

distillation = dict(
    rpn_cls=dict(hard_weight=1.0, loss_weight=1.0),
    rcnn_cls=dict(hard_weight=1.0, loss_weight=1.0),
    hint=dict(normalize=True, loss_weight=0.3),
    start='teacher',
)
