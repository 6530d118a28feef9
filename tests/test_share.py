"""A weight given as a share of the student's gradient."""

from dataclasses import FrozenInstanceError

import pairs
import pytest
import torch
from mmengine.logging import MessageHub
from pairs import LOG_NAMES, distil, recipe

from mmkd.engine.summary import startup_table
from mmkd.options.share import GradientShare, gradient_norm
from mmkd.recipe import TERM_PREFIXES


def forget():
    MessageHub.get_current_instance().runtime_info.pop('mmkd_gradient_shares', None)


@pytest.fixture(autouse=True)
def nothing_measured():
    forget()  # what a test of another file measured
    yield
    forget()


def norms(model, values):
    """Norms of the gradients of the term and of the hard losses, by backward passes."""
    own = [p for n, p in model.named_parameters() if not n.startswith(TERM_PREFIXES)]
    found = []
    for keys in (
        ['loss_kd_hint'],
        [k for k in values if 'loss' in k and '_kd_' not in k],
    ):
        model.zero_grad()
        pairs.total(model, {k: values[k] for k in keys}).backward(retain_graph=True)
        found.append(sum(float(p.grad.pow(2).sum()) for p in own if p.grad is not None) ** 0.5)
    model.zero_grad()
    return found


def shared(share, weight=0.5):
    paper = recipe('hint', hint=dict(share=share, loss_weight=weight))
    return distil(pairs.fpn(), pairs.fpn(8), paper)


def test_the_terms_gradient_is_the_share_from_the_first_step_on():
    model = shared(0.2)
    values = pairs.losses(model)
    term, hard = norms(model, values)
    assert term / hard == pytest.approx(0.2, rel=1e-3)


def test_the_weight_in_the_config_does_not_matter():
    """It only scales what is then scaled to the share; the log has what is in force."""
    values = []
    for weight in (0.5, 40.0):
        forget()
        values.append(pairs.losses(shared(0.2, weight)))
    for name in ('loss_kd_hint', 'weight_kd_hint'):
        torch.testing.assert_close(values[0][name], values[1][name], rtol=1e-4, atol=0)


def test_the_median_of_the_measured_steps_is_kept():
    share = GradientShare(0.5, iters=3)
    one = torch.ones(())
    for ratio in (4.0, 2.0, 8.0):  # neither the first, nor the last, nor the mean
        assert not share.done('loss_kd_hint')
        share.measure('loss_kd_hint', ratio * one, one)
    assert share.done('loss_kd_hint')
    assert share.factor('loss_kd_hint') == 0.5 / 4
    assert share.factor('loss_kd_cls') == 1


def test_fifty_steps_are_measured_by_default():
    share, one = GradientShare(0.5), torch.ones(())
    for step in range(50):
        assert not share.done('loss_kd_hint'), step
        share.measure('loss_kd_hint', one, one)
    assert share.done('loss_kd_hint')


def test_one_step_is_enough_and_what_is_wanted_stays():
    share = GradientShare(0.5, iters=1)
    with pytest.raises(FrozenInstanceError):
        share.share = 1.0


def test_a_step_that_tells_nothing_is_passed_over():
    share = GradientShare(0.5)
    for term, hard in ((0.0, 1.0), (1.0, 0.0), (float('nan'), 1.0), (1.0, float('inf'))):
        share.measure('loss_kd_hint', torch.tensor(term), torch.tensor(hard))
    assert share.measured('loss_kd_hint') == []


def test_once_fixed_it_is_measured_no_more_and_costs_nothing(monkeypatch):
    model = shared(dict(share=0.2, iters=2))
    for seed in (0, 1):
        pairs.losses(model, pairs.batch(seed=seed))
    fixed = model.kd_terms['hint'].share.factor(LOG_NAMES['hint'])

    def never(*args):
        raise AssertionError('a gradient was measured')

    monkeypatch.setattr('mmkd.observers.gradient_norm', never)
    values = pairs.losses(model, pairs.batch(seed=2))
    assert values['weight_kd_hint'].item() == pytest.approx(0.5 * fixed)


def test_it_leaves_no_gradient_behind():
    model = shared(0.2)
    pairs.losses(model)
    assert all(p.grad is None for p in model.parameters())


def test_a_resumed_run_goes_on_with_what_was_measured():
    """The hub's state is in every checkpoint that MMEngine writes."""
    hub = MessageHub.get_current_instance()
    model = shared(dict(share=0.2, iters=2))
    pairs.losses(model)
    state = hub.state_dict()
    ratios = model.kd_terms['hint'].share.measured(LOG_NAMES['hint'])
    hub.runtime_info.pop('mmkd_gradient_shares')
    assert model.kd_terms['hint'].share.measured(LOG_NAMES['hint']) == []
    hub.load_state_dict(state)
    assert model.kd_terms['hint'].share.measured(LOG_NAMES['hint']) == ratios
    assert len(ratios) == 1


def test_a_term_that_has_not_begun_is_not_measured():
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', 0)
    paper = recipe('hint', hint=dict(share=0.2, schedule=dict(begin=5)))
    model = distil(pairs.fpn(), pairs.fpn(8), paper)
    try:
        values = pairs.losses(model)
        assert values['loss_kd_hint'] == values['weight_kd_hint'] == 0
        assert model.kd_terms['hint'].share.measured(LOG_NAMES['hint']) == []
        hub.update_info('iter', 5)
        pairs.losses(model)
        assert len(model.kd_terms['hint'].share.measured(LOG_NAMES['hint'])) == 1
    finally:
        hub.runtime_info.pop('iter', None)


def test_a_weight_of_zero_is_off_whatever_the_share():
    paper = recipe('hint', hint=dict(loss_weight=0, share=0.2))
    assert distil(pairs.fpn(), pairs.fpn(8), paper).teacher is None


@pytest.mark.parametrize(
    ('share', 'message'),
    [
        (0, 'share=0 must be a number above 0'),
        (-1.0, 'share=-1.0 must be'),
        ('half', "share='half' must be"),
        (dict(share=True), 'share=True must be'),
        (float('inf'), 'share=inf must be'),
        (dict(share=0.1, iters=False), 'iters=False must be a number of steps'),
        (dict(share=0.1, iters=0), 'iters=0 must be a number of steps'),
        (dict(share=0.1, steps=5), "hint.share has no entry 'steps'; did you mean"),
    ],
)
def test_a_share_that_cannot_be_is_refused(share, message):
    with pytest.raises(ValueError, match=message):
        shared(share)


def test_the_startup_table_says_it():
    table = startup_table(shared(0.2))
    assert 'its gradient is 0.2 of the hard losses' in table


def test_the_norm_of_what_has_no_gradient_is_zero():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    assert gradient_norm(torch.zeros(()), [weight]) == 0
    assert gradient_norm((weight**2).sum() / 2, [weight]) == 5
    assert gradient_norm((weight**2).sum(), [torch.nn.Parameter(torch.ones(1))]) == 0


def test_the_norm_of_a_half_precision_gradient_does_not_overflow():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    # The square of 300 is more than float16 holds.
    value = (weight * torch.tensor([300.0, 400.0], dtype=torch.float16)).sum()
    assert gradient_norm(value, [weight]).item() == pytest.approx(500, rel=1e-3)
