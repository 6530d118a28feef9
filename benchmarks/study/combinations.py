"""Combinations of the best methods on the middle student, with the teacher's start, on validation.

Which methods: benchmarks/study/methods.py has said so before the first of these runs. Features at
three shares and without adaptation layers; then features with terms of the heads, one more at a
time; and other ways to spend the same iterations. Lengths of the schedule are another study.
"""

from mmengine.config import Config

config = 'configs/digits/study/distilled/middle.py'
reference = 'start'

_START = {'model.distillation.start': 'teacher'}
_SAME = [dict(student='neck', teacher='neck', adapter='identity')]


def _of(recipe):
    """The terms of configs/_base_/RECIPE.py by name."""
    found = Config.fromfile(f'configs/_base_/{recipe}.py').distillation.to_dict()
    return {name: term for name, term in found.items() if isinstance(term, dict)}


def _arm(search=None, more=None, **terms):
    overrides = {f'model.distillation.{name}': term for name, term in terms.items()}
    arm = dict(overrides=_START | overrides | (more or {}))
    return arm | (dict(search=search) if search else {})


def _searched(term, shares):
    key = next(iter(term))
    return _arm(search={f'model.distillation.{key}.share': shares}, **term)


_paper, _v1 = _of('chen2017'), _of('mmkd')
_fgfi = dict(type='FGFI', pairs=_SAME)
_hint = dict(type='HintL2Loss', normalize=True, pairs=_SAME)
_raw = dict(_hint, normalize=False)
_pkd = dict(type='PKD', pairs=_SAME)

arms = dict(
    start=_arm(search={'optim_wrapper.optimizer.lr': [0.002, 0.004]}),
    paper_start=_arm(**_paper),
    fgfi=_searched(dict(fgfi=_fgfi), [1.0, 3.0, 10.0]),
    hint=_searched(dict(hint=_hint), [0.3, 1.0, 3.0, 10.0]),
    hint_adapter=_searched(dict(hint=dict(_hint, pairs=['neck'])), [1.0, 3.0]),
    raw=_searched(dict(hint=_raw), [1.0, 3.0, 10.0]),
    pkd=_searched(dict(pkd=_pkd), [1.0, 3.0, 10.0]),
)
stages = [dict(name='features', seeds=[0], keep='all')]
