"""When a term is in force: the factor at every edge, and by whose count."""

from types import SimpleNamespace

import pairs
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.runner import IterBasedTrainLoop
from pairs import LOG_NAMES, distil, losses, recipe

from mmkd.engine.summary import startup_table
from mmkd.engine.training_checks import InputChecksHook
from mmkd.options.schedule import WeightSchedule


@pytest.fixture
def now():
    """Sets the iteration and epoch that the training loop has reached, as RuntimeInfoHook does."""
    hub = MessageHub.get_current_instance()

    def set_count(iteration, epoch=0):
        hub.update_info('iter', iteration)
        hub.update_info('epoch', epoch)

    yield set_count
    hub.runtime_info.pop('iter', None)
    hub.runtime_info.pop('epoch', None)


@pytest.mark.parametrize(
    ('schedule', 'expected'),
    [
        (dict(), {0: 1, 10**6: 1}),
        (dict(begin=10), {0: 0, 9: 0, 10: 1, 11: 1}),
        (dict(end=10), {0: 1, 9: 1, 10: 0, 11: 0}),
        # the rise takes 4 iterations, in which it is above 0 and below 1
        (dict(warmup=4), {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1, 5: 1}),
        (dict(begin=3, warmup=1, end=6), {2: 0, 3: 0.5, 4: 1, 5: 1, 6: 0}),
        (dict(begin=0, warmup=9, end=5), {4: 0.5, 5: 0}),
    ],
)
def test_the_factor_at_every_edge(schedule, expected):
    factor = WeightSchedule(**schedule).factor
    assert {at: factor(at) for at in expected} == pytest.approx(expected)


@pytest.mark.parametrize('wrong', [dict(begin=-1), dict(warmup=-1), dict(begin=5, end=5)])
def test_a_schedule_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match='end must come after begin'):
        WeightSchedule(**wrong)


def test_it_counts_what_the_loop_counts(now):
    now(7, 2)
    assert WeightSchedule(begin=7)() == 1
    assert WeightSchedule(begin=8)() == 0
    assert WeightSchedule(begin=2, by_epoch=True)() == 1
    assert WeightSchedule(begin=3, by_epoch=True)() == 0


def test_it_holds_nothing_that_a_resume_could_lose(now):
    """The factor comes from the loop's count alone, which MMEngine restores."""
    schedule = WeightSchedule(warmup=9)
    first = []
    for i in range(6):
        now(i)
        first.append(schedule())
    now(3)
    assert [WeightSchedule(warmup=9)(), schedule()] == [first[3]] * 2
    with pytest.raises(AttributeError):
        schedule.begin = 1


def test_where_nothing_is_counted_it_says_so(now):
    now(0)
    MessageHub.get_current_instance().runtime_info.pop('iter')
    with pytest.raises(RuntimeError, match='no iter is counted: .*RuntimeInfoHook'):
        WeightSchedule(begin=1)()
    assert WeightSchedule()() == 1


def test_a_scheduled_zero_keeps_the_term_and_leaves_the_hard_loss_whole(now):
    """Before a term begins its mu counts as 1; in between it falls with the term's rise."""
    rise = dict(schedule=dict(begin=5, warmup=1))
    paper = recipe('rcnn_cls', 'hint', rcnn_cls=rise, hint=rise)
    model = distil(pairs.fpn(), pairs.fpn(8), paper).eval()
    plain = losses(pairs.build(pairs.fpn()).eval())
    constant = losses(distil(pairs.fpn(), pairs.fpn(8), recipe('rcnn_cls', 'hint')).eval())
    for iteration, factor in ((0, 0.0), (5, 0.5), (6, 1.0)):
        now(iteration)
        got = losses(model)
        assert torch.equal(got['loss_cls'], plain['loss_cls'] * (1 - 0.5 * factor))
        for term in ('rcnn_cls', 'hint'):
            torch.testing.assert_close(got[LOG_NAMES[term]], factor * constant[LOG_NAMES[term]])
    now(0)
    sum(losses(model)[LOG_NAMES[t]] for t in ('rcnn_cls', 'hint')).backward()
    # Every adapter is in the graph at every step: DDP waits for all of them.
    for parameter in model.kd_terms['hint'].adapters.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_the_teacher_does_not_look_where_no_term_is_in_force(now):
    """The losses and gradients are those of a step at which it looks in vain."""
    schedule = dict(schedule=dict(end=2))
    terms = dict(hint=schedule, rpn_cls=schedule, rpn_bbox=schedule)
    looks, seen = [], {}
    for proven in (True, False):
        now(0)
        torch.manual_seed(0)
        model = distil(pairs.fpn(), pairs.fpn(8), recipe(*terms, **terms))
        model.teacher.network.backbone.register_forward_hook(lambda *a: looks.append(0))
        losses(model)
        assert not model.unproven
        now(2)
        if not proven:
            model.unproven = {'rpn_bbox'}
        looks.clear()
        torch.manual_seed(0)
        values = losses(model)
        pairs.total(model, values).backward()
        assert len(looks) == (not proven)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g is not None for n, g in gradients.items() if 'kd_terms' in n)
        seen[proven] = values, gradients
    for one, other in zip(*seen.values(), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_a_constant_zero_with_a_schedule_is_off():
    paper = recipe('hint', hint=dict(loss_weight=0, schedule=dict(begin=5)))
    assert distil(pairs.fpn(), pairs.fpn(8), paper).teacher is None


def test_the_startup_table_shows_the_schedule():
    paper = recipe('hint', hint=dict(schedule=dict(begin=5, warmup=10)))
    table = startup_table(distil(pairs.fpn(), pairs.fpn(8), paper))
    assert 'begin=5, warmup=10, end=None' in table


def test_epochs_are_refused_where_the_loop_counts_none():
    term = SimpleNamespace(schedule=WeightSchedule(begin=1, by_epoch=True))
    loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    runner = SimpleNamespace(
        model=SimpleNamespace(kd_terms=dict(hint=term), teacher=None),
        train_loop=loop,
        train_dataloader=SimpleNamespace(dataset=None),
        val_loop=None,
    )
    with pytest.raises(ValueError, match='hint.schedule has by_epoch=True.*counts iterations'):
        InputChecksHook().before_train(runner)
    term.schedule = WeightSchedule(begin=1)
    InputChecksHook().before_train(runner)
