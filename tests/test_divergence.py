"""A run whose losses grow without end is stopped, and nothing else is."""

from types import SimpleNamespace

import pairs
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from test_check_pair import tool
from tiny import tiny_config

from mmkd.engine.divergence import DivergedError, DivergenceHook
from mmkd.observers import has_checkpoints, own_parameters, total, warn_of_dwarfing

train = tool('train')


class Model(torch.nn.Module):
    """As a distilling detector, with two terms."""

    teacher = None

    def __init__(self) -> None:
        super().__init__()
        self.kd_terms = {'hint': None, 'rcnn_cls': None}


def feed(*steps, rate=0.02):
    """Gives a hook the losses of these iterations; returns it and the runner."""
    model = Model()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], rate)
    wrapper = SimpleNamespace(optimizer=optimizer)
    hook, runner = DivergenceHook(), SimpleNamespace(iter=0, model=model, optim_wrapper=wrapper)
    for values in steps:
        values = values if isinstance(values, dict) else dict(loss_cls=values)
        outputs = {name: torch.tensor(float(value)) for name, value in values.items()}
        outputs['loss'] = sum(v for k, v in outputs.items() if 'weight' not in k)
        hook.after_train_iter(runner, 0, None, outputs)
        runner.iter += 1
    return hook, runner


def kd(own, hint, **more):
    return dict(loss_cls=own, loss_kd_hint=hint, **more)


SOUND = {
    'high where a warm-up starts': [900.0, 1500.0, 40.0, *[2.0] * 60],
    'a start from trained weights': [0.02, *[1.5] * 60],
    'a spike': [2.0, *[1.5] * 60, 8e4, 9e4, *[1.5] * 60],
    'high for some steps': [2.0, *[900.0] * 40, *[1.5] * 20],
    'a sum instead of a mean': [3e5, *[9e5] * 60],
    'a term that warms up': [
        kd(2, 1e6 * i / 500, weight_kd_hint=i / 500) for i in range(1, 501, 3)
    ],
    'a large term that its schedule turns on': [
        *[kd(2, 0, weight_kd_hint=0)] * 60,
        *[kd(2, 1e7, weight_kd_hint=1)] * 60,
    ],
    'a term that begins at 0': [kd(2, 1e5 * (i > 0)) for i in range(120)],
    'a term of parts': [
        dict(loss_cls=2, loss_kd_hint_fg=1e6, loss_kd_hint_bg=1e-6) for _ in range(60)
    ],
    'a bounded term': [dict(loss_cls=2, loss_kd_cls=i % 2 * 5e3) for i in range(120)],
}


@pytest.mark.parametrize('name', SOUND)
def test_an_ordinary_run_is_not_stopped(name):
    hook, runner = feed(*SOUND[name])
    hook.before_save_checkpoint(runner, {}), hook.before_val(runner), hook.after_train(runner)


LEARNING_RATE = r'losses were 2 in iteration 1 and .* likely cause is the learning rate \(50\)'
DIVERGED = {
    'without end': ([2.0, 1e3, 1e10, 1e28, 1e28], LEARNING_RATE),
    'for long': ([2.0, *[900.0] * 60], LEARNING_RATE),
    'to NaN': ([2.0, 900.0, float('nan')], LEARNING_RATE),
    'to NaN at once': ([2.0, float('nan')], r'loss_cls is nan .*causes are the learning rate \(50'),
    'with its terms': ([kd(2, 1), *[kd(60, 1e9)] * 4], LEARNING_RATE),
    'a term alone': (
        [*[kd(2, 1)] * 60, *[kd(2.5, 1e9)] * 4],
        r'loss_kd_hint was at most 1 .*1e\+09 in iteration 63, and the student.s own losses have '
        r'not grown. Lower distillation\.hint\.loss_weight',
    ),
}


@pytest.mark.parametrize('name', DIVERGED)
def test_growth_without_end_stops_a_run(name):
    steps, says = DIVERGED[name]
    with pytest.raises(DivergedError, match=says) as error:
        feed(*steps, rate=50)
    assert ('loss_kd' in str(error.value)) == (name == 'a term alone')


@pytest.mark.parametrize('when', ['before_save_checkpoint', 'before_val', 'after_train'])
def test_nothing_is_concluded_from_the_first_steps_of_growth(when):
    hook, runner = feed(2.0, 1.5, 1e8)
    arguments = [{}] if 'checkpoint' in when else []
    with pytest.raises(DivergedError, match='learning rate'):
        getattr(hook, when)(runner, *arguments)


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture
def config(tmp_path):
    made = Config.fromfile(tiny_config(tmp_path, epochs=4))
    made.runner_type = 'mmkd.DistillationRunner'
    made.experiment_name = tmp_path.name
    return made


@pytest.mark.parametrize('rate', [1.0, 50.0])
@pytest.mark.parametrize('distilled', [False, True])
def test_a_learning_rate_that_is_too_high(config, tmp_path, distilled, rate):
    """Also of a plain detector, which MMDetection trains to the end on NaN."""
    if distilled:
        config.model = pairs.distilled(config.model, config.model, pairs.recipe())
    written = tmp_path / 'high.py'
    config.optim_wrapper.optimizer.lr = rate
    config.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1, max_keep_ckpts=1)
    config.dump(written)
    with pytest.raises(DivergedError, match=rf'likely cause is the learning rate \({rate:g}\)'):
        train.main([str(written), '--work-dir', str(tmp_path / 'out')])
    log = '\n'.join(path.read_text() for path in (tmp_path / 'out').rglob('*.log'))
    assert 'likely cause' in log and 'dwarfs' not in log
    saved = list((tmp_path / 'out').glob('epoch_*.pth'))
    assert bool(saved) == ('--resume would keep its learning rate' in log)
    for path in saved:
        weights = torch.load(path, weights_only=True)['state_dict']
        assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize('which', ['frozen', 'checkpointed'])
def test_a_student_whose_gradient_cannot_be_measured_is_trained_all_the_same(which):
    student = pairs.fpn()
    student.backbone.with_cp = which == 'checkpointed'
    model = pairs.distil(student, pairs.fpn(8), pairs.recipe(hint=dict(loss_weight=1e6)))
    model.teacher.source, model.steps = 'a file', 49
    model.observers = [warn_of_dwarfing]
    for parameter in own_parameters(model) if which == 'frozen' else ():
        parameter.requires_grad = False
    values = pairs.losses(model)
    assert has_checkpoints(total(values)) == (which == 'checkpointed')
    assert values['loss_kd_hint'] > 0 and not model.dwarfing


def test_growth_is_not_blamed_on_a_term(config, monkeypatch):
    """At the 50th step a term is measured, and by then the student itself may have diverged."""
    said = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'warning', said.append)
    model = pairs.distil(pairs.fpn(), pairs.fpn(8), pairs.recipe(hint=dict(loss_weight=1e6)))
    model.teacher.source = 'a file'
    model.observers = [warn_of_dwarfing]
    for factor in (1e4, 1.0):
        model.first_hard, model.steps = 1.0, 49
        model.rpn_head.loss_cls.loss_weight = factor
        pairs.losses(model)
        assert bool(said) == (factor == 1)
