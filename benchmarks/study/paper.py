"""The paper's own ablation on the middle student, term by term and head by head."""

from mmengine.config import Config

config = 'configs/digits/study/distilled/middle.py'
reference = 'plain'

_paper = Config.fromfile('configs/_base_/chen2017.py').distillation.to_dict()
_paper.pop('start')
_heads = dict(rpn=['rpn'], roi=['rcnn'], both=['rpn', 'rcnn'])
_beta = 100.0  # beyond any delta, so that smooth L1 is the square: 1/2 x^2 / beta


def _terms(**terms):
    """The overrides of an arm that has these terms and no other."""
    return {f'model.distillation.{name}': term for name, term in terms.items()}


def _of(term, heads, **changes):
    """One of the paper's terms in some heads, with changes."""
    return _terms(**{f'{head}_{term}': dict(_paper[f'{head}_{term}'], **changes) for head in heads})


def _l2(heads):
    """The squared distance to the teacher's deltas with the paper's ν, never bounded."""
    weight = 2 * _beta * _paper['rcnn_bbox']['loss_weight']
    term = dict(type='PlainRegression', beta=_beta, loss_weight=weight)
    return _terms(**{f'l2_{head}': dict(term, site=head) for head in heads})


_no_adapter = [dict(student='neck', teacher='neck', adapter='identity')]
arms = dict(plain=dict(config='configs/digits/study/middle.py'))
for _name, _where in _heads.items():
    arms[f'soft_{_name}'] = dict(overrides=_of('cls', _where, background_weight=1.0))
    arms[f'weighted_{_name}'] = dict(overrides=_of('cls', _where))
    arms[f'l2_{_name}'] = dict(overrides=_l2(_where))
    arms[f'bounded_{_name}'] = dict(overrides=_of('bbox', _where))
_all = {}
for _name, _where in _heads.items():
    _all[_name] = _terms(hint=_paper['hint']) | _of('cls', _where) | _of('bbox', _where)
arms['hint_without'] = dict(overrides=_terms(hint=dict(_paper['hint'], pairs=_no_adapter)))
arms['hint'] = dict(overrides=_terms(hint=_paper['hint']))
arms['all_rpn'] = dict(overrides=_all['rpn'])
arms['all_roi'] = dict(overrides=_all['roi'])
arms['all'] = dict(overrides=_all['both'])

_first = list(arms)
_values = dict(
    temperature=('cls', [0.5, 2.0, 4.0]),
    background_weight=('cls', [0.5, 1.0, 3.0]),
    hard_weight=('cls', [0.0, 0.25, 0.75]),
    margin=('bbox', [-0.1, 0.1, 1.0]),
    loss_weight=('bbox', [0.1, 2.0]),
)
for _key, (_term, _those) in _values.items():
    for _value in _those:
        _changed = {**_terms(**_paper), **_of(_term, _heads['both'], **{_key: _value})}
        arms[f'all, {_key} {_value}'] = dict(overrides=_changed)
for _value in (0.1, 2.0):
    _hint = dict(_paper['hint'], loss_weight=_value)
    arms[f'all, hint {_value}'] = dict(overrides=_terms(**{**_paper, 'hint': _hint}))

stages = [
    dict(name='one at a time', seeds=[0], arms=['all', *[a for a in arms if a not in _first]]),
    dict(name='terms', seeds=[0, 1, 2], arms=_first[1:]),
]
contrasts = [
    ('weighted_both', 'soft_both'),
    ('bounded_both', 'l2_both'),
    ('hint', 'hint_without'),
    ('weighted_both', 'plain'),
    ('bounded_both', 'plain'),
    ('hint', 'plain'),
    ('all', 'plain'),
    ('all', 'hint'),
]
