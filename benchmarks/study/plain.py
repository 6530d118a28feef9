"""The three plain students by the length of their schedule: which regime is each in?

`make study` runs it, `make study-table` prints its tables.
"""

config = 'configs/digits/study/{student}.py'
students = ['far', 'middle', 'near']


def _iterations(length):
    return {
        'train_cfg.max_iters': length,
        'train_cfg.val_interval': length,
        'param_scheduler.1.T_max': length,
        'param_scheduler.1.end': length,
    }


arms = {
    f'{length} iterations': dict(overrides=_iterations(length))
    for length in (1000, 250, 500, 2000, 4000)
}
stages = [
    dict(name='validation', seeds=[0]),
    dict(name='test', split='test', seeds=[0]),
]
