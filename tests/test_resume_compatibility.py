"""What a resumed file says is done only where a run like this one could have written it."""

import os

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from test_resume import Noisy, Score, runner
from torch import nn

from mmkd.engine.exact_resume import _tell_changes, settings
from mmkd.engine.random_state import random_state, set_random_state
from mmkd.engine.resume_compatibility import check_loaded_states, own_file, own_ids
from mmkd.io.checkpoint import CheckpointError


@pytest.fixture
def written(tmp_path):
    """A run of three epochs with its best checkpoint, and what changes a copy of the second."""
    runner(tmp_path / 'one', score=Score(), keep=-1).train()

    def change(do, to='two'):
        checkpoint = torch.load(tmp_path / 'one/epoch_2.pth', weights_only=True)
        do(checkpoint)
        os.makedirs(tmp_path / to, exist_ok=True)
        torch.save(checkpoint, tmp_path / 'changed.pth')
        return str(tmp_path / 'changed.pth')

    return tmp_path, change


def test_only_its_own_files_are_deleted(written):
    tmp_path, change = written
    victim = tmp_path / 'somebody/best_thesis.pth'
    (tmp_path / 'somebody').mkdir()
    victim.write_text('mine')

    def name(checkpoint):
        info = checkpoint['message_hub']['runtime_info']
        checkpoint['message_hub']['resumed_keys']['keep_ckpt_ids'] = True
        assert info['best_ckpt']
        info.update(best_ckpt=str(victim), best_score=-1, keep_ckpt_ids=[7, 8, 9, 2])

    path = change(name)
    for number in (7, 8, 9):
        (tmp_path / f'two/epoch_{number}.pth').write_text('mine')
    runner(tmp_path / 'two', score=Score(), keep=1, resume=True, load_from=path).train()
    assert victim.read_text() == 'mine'
    assert all((tmp_path / f'two/epoch_{number}.pth').exists() for number in (3, 7, 8, 9))


@pytest.mark.parametrize(
    ('path', 'found'),
    [
        ('w/best_score_epoch_2.pth', 'w/best_score_epoch_2.pth'),
        ('elsewhere/best_score_epoch_2.pth', 'w/best_score_epoch_2.pth'),
        ('/home/somebody', None),
        ('w/epoch_2.pth', None),
        ('w/best_/..', None),
        (['w'], None),
        (None, None),
    ],
)
def test_a_path_from_a_file_is_one_of_the_runs_folder(path, found):
    assert own_file(path, 'w', ['best_']) == found


def test_numbers_of_files_are_numbers_of_the_same_folder():
    assert own_ids([1, 2], True) == [1, 2]
    assert own_ids([1, 2], False) == own_ids([1, '../x'], True) == own_ids('12', True) == []


@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize('forged', ['short', 'expanded'])
def test_kernels_are_the_runs_and_go_over_whole_tensors(kind, forged):
    """A fused kernel writes as many numbers as the parameter has, from where the state begins."""
    options = dict(lr=0.1, momentum=0.9) if kind is torch.optim.SGD else dict(lr=0.1)
    layer = nn.Linear(16, 16, bias=False)
    optimizer = kind(layer.parameters(), **options)
    layer(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for key, value in state['state'][0].items():
        if value is not None and value.ndim:
            small = torch.zeros(1)
            state['state'][0][key] = small if forged == 'short' else small.expand(16, 16)
    state['param_groups'][0].update(fused=True, foreach=False, maximize=True)
    check_loaded_states(optimizer)
    if forged == 'short':
        with pytest.raises(CheckpointError, match=r'of shape \(1,\) for a parameter of shape'):
            optimizer.load_state_dict(state)
        return
    optimizer.load_state_dict(state)
    assert not optimizer.param_groups[0]['fused'] and optimizer.param_groups[0]['maximize']
    for value in optimizer.state[layer.weight].values():
        assert not value.ndim or value.is_contiguous()


@pytest.mark.parametrize(
    ('other', 'says'),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 'another optimizer than AdamW: one with'),
        (lambda p: torch.optim.AdamW(p[:1]), 'an optimizer of 1 parameters in 1 groups'),
        (
            lambda p: torch.optim.AdamW([dict(params=[each]) for each in p]),
            'of 2 parameters in 2 groups, this run one of 2 in 1',
        ),
    ],
)
def test_another_optimizer_is_named(other, says):
    parameters = list(nn.Linear(2, 2).parameters())
    optimizer = torch.optim.AdamW(parameters)
    check_loaded_states(optimizer)
    with pytest.raises(CheckpointError, match=says):
        optimizer.load_state_dict(other(parameters).state_dict())
    optimizer.load_state_dict(torch.optim.AdamW(parameters).state_dict())


@pytest.mark.parametrize('position', [-5, 625, 2_000_000_000, 3.0])
def test_random_numbers_of_numpy_lie_within_its_state(position):
    state = random_state()
    state['numpy'][2] = position
    with pytest.raises(CheckpointError, match=r'no state of its generator \(MT19937, 624 numbers'):
        set_random_state(state)
    state = random_state()
    drawn = np.random.rand()
    set_random_state(state)
    assert np.random.rand() == drawn


@pytest.mark.parametrize(
    ('do', 'says'),
    [
        (lambda c: c['meta'].update(iter=-5), 'has iter -5, which is no count'),
        (lambda c: c['meta'].update(epoch='2'), "has epoch '2', which is no count"),
        (lambda c: c.pop('optimizer'), 'holds no optimizer'),
        (lambda c: c.update(meta=[1]), 'holds no meta'),
        (
            lambda c: c['state_dict'].update({'linear.weight': torch.zeros(1, 7)}),
            r'another network: linear.weight is \(1, 7\) in it and \(1, 3\) here',
        ),
        (
            lambda c: c['state_dict'].update({'kd_adapters.0.weight': torch.zeros(1)}),
            'has kd_terms.hint.adapters.0.weight, a weight of a distillation term: it was written '
            'with other terms',
        ),
    ],
)
def test_the_state_of_another_run_is_refused(written, do, says):
    tmp_path, change = written
    with pytest.raises(CheckpointError, match=says):
        runner(tmp_path / 'two', load_from=change(do), resume=True).train()


def test_an_endless_count_of_iterations_ends(written, tmp_path):
    _, change = written
    path = change(lambda c: c['meta'].update(iter=10**12))
    runner(tmp_path / 'two', load_from=path, resume=True).train()
    with pytest.raises(CheckpointError, match='train_cfg.max_iters is 13: nothing would be'):
        runner(tmp_path / 'three', loop='iter', load_from=path, resume=True).train()


@pytest.mark.parametrize(
    ('every', 'file', 'size', 'read', 'says'),
    [
        (None, 'epoch_1', 10, 10 + 10, None),
        (None, 'epoch_1', 20, 20 + 20, 'Epoch 2 is run from its start'),
        (None, 'epoch_1', 6, 6 + 6, 'batch 0 of an epoch of 5, and here an epoch has 3'),
        (1, 'iter_5', 20, 20 + 20, 'continues after batch 10 of 10'),
        (1, 'iter_7', 10, 6 + 10, None),
        (1, 'iter_7', 20, 12 + 20, 'Epoch 2 continues after batch 4 of 10'),
        (1, 'iter_7', 6, 4 + 6, 'Epoch 2 continues after batch 1 of 3'),
    ],
)
def test_an_epoch_of_another_length_is_no_other_epoch(
    tmp_path, capfd, every, file, size, read, says
):
    """Other data, another batch size or more GPUs: of 3 epochs of 5 batches of 2, those left."""
    runner(tmp_path / 'one', every=every, keep=-1).train()
    capfd.readouterr()
    data, two = Noisy(size), tmp_path / 'two'
    path = tmp_path / 'one' / f'{file}.pth'
    again = runner(two, every=every, keep=-1, data=data, resume=True, load_from=str(path))
    again.train()
    assert again.epoch == 3
    assert len(data.read) == read
    said = ''.join(capfd.readouterr())
    assert says in said if says else 'an epoch of' not in said
    # And a run that goes on from that one is where that one was.
    begun = again.iter - size // 2
    path = two / (f'iter_{begun + 1}.pth' if every else 'epoch_2.pth')
    data = Noisy(size)
    runner(
        tmp_path / 'three', every=1, keep=-1, data=data, resume=True, load_from=str(path)
    ).train()
    assert len(data.read) == size - (2 if every else 0)
    assert 'an epoch of' not in ''.join(capfd.readouterr())


@pytest.mark.parametrize(
    ('loop', 'every', 'says'),
    [('epoch', None, None), ('iter', 5, None), ('iter', 50, 'AT THE END, after 13 iterations')],
)
def test_a_run_without_a_checkpoint_before_its_end_says_so(tmp_path, capfd, loop, every, says):
    runner(tmp_path, loop, every=every).train()
    said = ''.join(capfd.readouterr())
    assert says in said if says else 'ONE CHECKPOINT' not in said
    assert 'IS OF AN EARLIER RUN' not in said
    runner(tmp_path, loop, every=every).train()
    assert '.pth IS OF AN EARLIER RUN, whose files' in ''.join(capfd.readouterr())


def test_mmengines_own_checkpoint_begins_the_next_epoch(tmp_path, capfd):
    runner(tmp_path / 'one', keep=-1, cls=Runner).train()
    data = Noisy(20)
    runner(
        tmp_path / 'two', data=data, resume=True, load_from=str(tmp_path / 'one/epoch_1.pth')
    ).train()
    assert len(data.read) == 2 * 20
    assert 'batch 0 of an epoch of 5, and here an epoch has 10' in ''.join(capfd.readouterr())


def test_what_the_config_no_longer_decides_is_said(tmp_path, capfd):
    def train(name, steps, **kwargs):
        run = runner(tmp_path / name, keep=-1, **kwargs)
        run.cfg.param_scheduler = dict(T_max=steps)  # one built from a config has it
        run.train()

    train('one', 15)
    path = str(tmp_path / 'one/epoch_2.pth')
    train('two', 15, load_from=path, resume=True)
    assert 'ARE NOT USED' not in ''.join(capfd.readouterr())
    train('three', 99, load_from=path, resume=True)
    said = ''.join(capfd.readouterr())
    assert 'param_scheduler of the config ARE NOT USED' in said and 'from here on' not in said


@pytest.mark.parametrize('other', ['Adam', torch.optim.Adam])
def test_an_optimizer_with_the_same_state_is_said(tmp_path, capfd, other):
    """Adam goes on from what AdamW has gathered."""
    run = runner(tmp_path)
    run.cfg.optim_wrapper = dict(optimizer=dict(type=torch.optim.AdamW, lr=0.01))
    before = settings(run)
    _tell_changes(before, settings(run), run)
    assert 'from here on' not in ''.join(capfd.readouterr())
    run.cfg.optim_wrapper.optimizer.lr = 0.02
    _tell_changes(before, settings(run), run)
    said = ''.join(capfd.readouterr())
    assert 'optim_wrapper.optimizer of the config ARE NOT USED' in said and 'here on' not in said
    run.cfg.optim_wrapper.optimizer.update(lr=0.01, type=other)
    _tell_changes(before, settings(run), run)
    said = ''.join(capfd.readouterr())
    assert 'optim_wrapper.optimizer.type differ from those of the checkpoint, and are used' in said
    assert 'ARE NOT USED' not in said


def test_another_teacher_is_said(tmp_path, capfd):
    before = {'the teacher': 'a', 'model.distillation': 'b', 'param_scheduler': 'c'}
    now = runner(tmp_path)
    _tell_changes({**before}, before, now)
    _tell_changes(None, before, now)
    assert 'from here on' not in ''.join(capfd.readouterr())
    _tell_changes({**before, 'the teacher': 'z'}, before, now)
    said = ''.join(capfd.readouterr())
    assert 'the teacher differ from those of the checkpoint, and are used from here on' in said
    assert 'ARE NOT USED' not in said


def test_a_run_that_has_nothing_left_says_so(tmp_path, capfd):
    runner(tmp_path).train()
    data = Noisy()
    runner(tmp_path, data=data, resume=True).train()
    assert not data.read
    assert 'at 3 of 3 that train_cfg asks for: NOTHING IS TRAINED' in ''.join(capfd.readouterr())
