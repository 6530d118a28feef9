"""Every published method on the middle student, at an equal budget of search, on validation.

Each method has the authors' weights and two shares of the gradient to choose from, and the plain
student as many learning rates: one seed and half the schedule; then the better half, three seeds;
then the same from the teacher's neck and heads. The authors' delays and warm-ups, of a few hundred
iterations in schedules ninety times as long, are left out.
"""

from pathlib import Path

from mmengine.config import Config

config = 'configs/digits/study/distilled/middle.py'
reference = 'plain'

_LEVELS = 3
_SHARES = [None, 0.3, 1.0]  # None: the authors' weights


def _recipe(name):
    """The terms of configs/_base_/NAME.py, on the levels that these necks have."""
    terms = Config.fromfile(f'configs/_base_/{name}.py').distillation.to_dict()
    terms.pop('start', None)
    for term in terms.values():
        term.pop('schedule', None)
        pairs = term.get('pairs', ['neck'])
        if len(pairs) > 1:
            for key in ('pairs', 'reduction', 'pool'):
                if key in term:
                    term[key] = term[key][:_LEVELS]
    return {f'model.distillation.{key}': term for key, term in terms.items()}


arms = dict(plain=dict(search={'optim_wrapper.optimizer.lr': [0.001, 0.002, 0.004]}))
for _path in sorted(Path('configs/_base_').glob('*.py')):
    _terms = _recipe(_path.stem)
    # Of several terms that on features has the share; the others keep their weights.
    _main = 'model.distillation.hint' if 'model.distillation.hint' in _terms else next(iter(_terms))
    arms[_path.stem] = dict(overrides=_terms, search={f'{_main}.share': _SHARES})

_half = {
    'train_cfg.max_iters': 500,
    'train_cfg.val_interval': 500,
    'param_scheduler.1.T_max': 500,
    'param_scheduler.1.end': 500,
}
stages = [
    dict(name='half', seeds=[0], options=_half, keep='half'),
    dict(name='whole', seeds=[0, 1, 2], keep='all'),
    dict(
        name='start',
        seeds=[0, 1, 2],
        options={'model.distillation.start': 'teacher'},
        arms=['winners'],
    ),
]
