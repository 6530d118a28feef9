# mmkd's own recipe: the terms of Chen et al. with hints standardised per channel, from a start that
# is the teacher's neck and heads.
_base_ = 'chen2017.py'

distillation = dict(
    hint=dict(normalize=True, loss_weight=1.0),
    start='teacher',
)
