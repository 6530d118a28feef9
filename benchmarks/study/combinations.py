"""Combinations of the best methods on the middle student, with the teacher's start, on validation.

Which methods: benchmarks/study/methods.py has said so before the first of these runs. Features at
several shares, most without adaptation layers; then features with terms of the heads, one more at a
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
_features = list(arms)

# Chosen in that stage: features where objects are, at ten times the gradient of the hard losses.
_best = dict(fgfi=dict(_fgfi, share=10.0))
_rows = {name: term for name, term in _paper.items() if name != 'hint'}
_soft_alone = {
    name: dict(term, hard_weight=0.0) if name.endswith('cls') else term
    for name, term in _rows.items()
}
_roi = {name: term for name, term in _rows.items() if name.startswith('rcnn')}
_more_proposals = {
    'model.train_cfg.rcnn.sampler.num': 150
}  # all: 100 proposals at most, and the boxes


def _at(layer):
    """Hints inside the RoI head too, where both networks see the student's proposals."""
    pairs = [dict(student=layer, teacher=layer, adapter='identity')]
    return dict(type='HintL2Loss', normalize=False, pairs=pairs, share=1.0)


arms |= dict(
    rows=_arm(**_best, **_rows),
    rows_lighter=_arm(fgfi=dict(_fgfi, share=3.0), **_rows),
    paper_heavier=_arm(**_rows, hint=dict(_paper['hint'], loss_weight=2.0)),
    rows_roi=_arm(**_best, **_roi),
    rows_soft_alone=_arm(**_best, **_soft_alone),
    rows_added=_arm(**_best, **{k: v for k, v in _v1.items() if k != 'hint'}),
    nkd=_arm(**_best, **_of('nkd')),
    logit_std=_arm(**_best, **_of('logit_std')),
    bounded=_arm(**_best, **{k: v for k, v in _rows.items() if k.endswith('bbox')}),
    crosskd=_arm(**_best, **_of('crosskd_roi')),
    raw_rows=_arm(hint=dict(_raw, share=3.0), **_rows),
    raw_rows_soft_alone=_arm(hint=dict(_raw, share=3.0), **_soft_alone),
    both=_arm(**_best, hint=dict(_raw, share=1.0), **_rows),
    rows_faster=_arm(**_best, **_rows, more={'optim_wrapper.optimizer.lr': 0.004}),
    rows_ends=_arm(fgfi=dict(_best['fgfi'], schedule=dict(end=700)), **_rows),
    rows_roi_features=_arm(**_best, **_rows, at=_at('roi_head.bbox_roi_extractor')),
    rows_fc=_arm(**_best, **_rows, at=_at('roi_head.bbox_head.shared_fcs.1')),
    rows_proposals=_arm(**_best, **_rows, more=_more_proposals),
    start_proposals=_arm(more=_more_proposals),
    rows_unlabelled=_arm(
        **_best,
        **_rows,
        unlabelled=dict(
            ann_file='data/digits_study/unlabelled.json',
            img_prefix='data/digits_study/train/',
            share=0.5,
            threshold=0.5,
        ),
    ),
)
stages = [
    dict(name='features', seeds=[0], arms=_features),
    dict(
        name='together',
        seeds=[0],
        arms=['paper_start', *[arm for arm in arms if arm not in _features]],
        keep='half',
    ),
    dict(name='three seeds', seeds=[0, 1, 2], keep='all'),
]
