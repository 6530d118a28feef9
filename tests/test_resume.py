"""A run that is cut off anywhere and resumed equals one that never was, to the bit."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pairs
import psutil
import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler, worker_init_fn
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from test_checkpoint import same
from tiny import tiny_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

import mmkd.io.checkpoint
from mmkd.engine import loader
from mmkd.engine.exact_resume import latest_checkpoint
from mmkd.engine.runner import DistillationRunner
from mmkd.io.checkpoint import from_plain, install, read_checkpoint


class Noisy(Dataset):
    """Samples with random numbers in them, as augmentation makes them; remembers what was read."""

    def __init__(self, size=10):
        self.size, self.read = size, []

    def __deepcopy__(self, memo):
        return self  # MMEngine copies what it builds a data loader from

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return {'x': torch.tensor([index, np.random.rand(), torch.rand(()).item()]).float()}


class Drawing(BaseModel):
    """Draws random numbers in its step, as samplers of RoIs do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, note=None, mode='loss'):
        if mode == 'predict':
            return [{'steps': int(self.norm.num_batches_tracked)}] * len(x)
        keep = torch.rand_like(x) > 0.3
        return {'loss': (self.linear(self.norm(x) * keep) - np.random.rand()).pow(2).mean()}


class Noted(Noisy):
    """Has more beside its tensors than the pipe of a worker holds, which is 64 KB."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), 'note': bytes(50_000)}


class Listed(Noisy):
    """Its batches are lists."""

    def __getitem__(self, index):
        return [super().__getitem__(index)['x']]


class Cut(RuntimeError):
    pass


class CutHook(Hook):
    """Ends the run after an iteration, or before a validation, without a word."""

    def __init__(self, iters=None, validation=None):
        self.iters, self.validation = iters, validation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iters:
            raise Cut

    def before_val(self, runner):
        if runner.epoch == self.validation:
            raise Cut


def runner(
    work_dir,
    loop='epoch',
    every=None,
    ema=False,
    cut=None,
    shuffle=True,
    infinite=False,
    score=None,
    keep=1,
    workers=0,
    persistent=False,
    data=None,
    seed=0,
    accumulate=1,
    batch_sampler=None,
    sampler=None,
    patience=None,
    epochs=3,
    size=2,
    out_dir=None,
    cls=DistillationRunner,
    given=None,
    start=None,
    **kwargs,
):
    by_epoch = loop == 'epoch'
    torch.manual_seed(0)
    hooks = [dict(type='EMAHook')] if ema else []
    hooks += [each for each in (cut, patience) if each]
    validation = dict(
        val_dataloader=dict(
            batch_size=3, dataset=Noisy(3), sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        val_cfg=dict(type='ValLoop'),
        val_evaluator=[score],
    ) if score else {}  # fmt: skip
    return cls(
        model=Drawing(),
        work_dir=str(work_dir),
        train_dataloader=given
        or dict(
            batch_size=size, dataset=data or Noisy(), num_workers=workers,
            persistent_workers=persistent, multiprocessing_context=start if workers else None,
            sampler=sampler
            or dict(type='InfiniteSampler' if infinite else 'DefaultSampler', shuffle=shuffle),
            collate_fn=dict(type='default_collate'), batch_sampler=batch_sampler,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs) if by_epoch
        else dict(by_epoch=False, max_iters=13, val_interval=4),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.01), accumulative_counts=accumulate
        ),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=15, by_epoch=False),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', by_epoch=every is None and by_epoch, interval=every or 1,
                max_keep_ckpts=keep, out_dir=out_dir, save_best='score' if score else None,
                rule='greater',
            )
        ),
        custom_hooks=hooks, default_scope='mmengine', randomness=dict(seed=seed),
        experiment_name=str(time.time_ns()), **validation, **kwargs,
    )  # fmt: skip


class Score(BaseMetric):
    """Each validation scores better than the last: by how far training has come."""

    default_prefix = None

    def process(self, data_batch, data_samples):
        self.results.append(data_samples[0]['steps'])

    def compute_metrics(self, results):
        return {'score': results[0]}


@pytest.fixture(autouse=True)
def installed():
    install()


def last(work_dir) -> dict:
    return from_plain(read_checkpoint(latest_checkpoint(str(work_dir))))


def assert_equal(a: dict, b: dict) -> None:
    for key in ('state_dict', 'optimizer', 'param_schedulers', 'ema_state_dict', 'mmkd_resume'):
        assert same(a.get(key), b.get(key)), key
    assert a['meta']['iter'] == b['meta']['iter'] and a['meta']['epoch'] == b['meta']['epoch']


@pytest.mark.parametrize('persistent', [False, True], ids=['', 'persistent'])
@pytest.mark.parametrize(
    ('setting', 'cuts', 'workers'),
    [
        (dict(loop='epoch', every=2), [9, 13], 2),
        pytest.param(dict(loop='epoch', every=7), [8], 3, marks=pytest.mark.slow),
        (dict(loop='epoch'), [8], 2),
        pytest.param(dict(loop='iter', every=2), [9], 2, marks=pytest.mark.slow),
        pytest.param(dict(loop='iter', every=5), [8], 3, marks=pytest.mark.slow),
        (dict(loop='iter', every=3, infinite=True), [5, 11], 2),
    ],
    ids=str,
)
def test_workers_draw_on_where_they_were(tmp_path, setting, cuts, workers, persistent):
    """Their random numbers are those of a run that was never cut off."""
    setting = dict(setting, workers=workers, persistent=persistent)
    # Each in a process: one that has ended waits for workers of a loader that was thrown away.
    assert child(tmp_path / 'whole', **setting) == 0
    for cut in cuts:
        assert child(tmp_path / 'parts', cut=CutHook(cut), resume=True, **setting) == 77
    assert child(tmp_path / 'parts', resume=True, **setting) == 0
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))


@pytest.mark.parametrize(
    'setting', [dict(loop='epoch', every=4), dict(loop='iter', infinite=True)], ids=str
)
def test_workers_draw_what_they_draw_in_mmengine(tmp_path, setting):
    """Listening to them changes nothing."""
    setting = dict(workers=2, **setting)
    own = runner(tmp_path / 'own', **setting)
    own.train()
    stock = runner(tmp_path / 'stock', cls=Runner, **setting)
    stock.train()
    assert same(own.model.state_dict(), stock.model.state_dict())


def test_batches_that_are_lists_go_on_where_they_were(tmp_path):
    setting = dict(every=2, workers=2)
    runner(tmp_path / 'whole', data=Listed(), **setting).train()
    with pytest.raises(Cut):
        runner(tmp_path / 'parts', cut=CutHook(9), data=Listed(), **setting).train()
    runner(tmp_path / 'parts', resume=True, data=Listed(), **setting).train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))


def test_hooks_see_the_batches_and_their_numbers_of_a_whole_run(tmp_path):
    class Look(Hook):
        priority = 'VERY_HIGH'

        def __init__(self, seen, cut=None):
            self.seen, self.cut = seen, cut

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.seen.append((runner.iter, batch_idx, sorted(data_batch)))
            if runner.iter + 1 == self.cut:
                raise Cut

    whole, parts, rest = [], [], []
    runner(tmp_path / 'whole', every=3, workers=2, cut=Look(whole)).train()
    with pytest.raises(Cut):
        runner(tmp_path / 'parts', every=3, workers=2, cut=Look(parts, 4)).train()
    runner(tmp_path / 'parts', every=3, workers=2, cut=Look(rest), resume=True).train()
    assert [number for _, number, _ in whole] == 3 * [0, 1, 2, 3, 4]
    assert parts[:3] + rest == whole


@pytest.mark.parametrize(
    ('resume', 'own'),
    [('config', False), ('method', False), ('late', False), ('config', True), ('method', True)],
)
def test_an_endless_stream_with_workers_goes_on_where_it_was(tmp_path, resume, own):
    """The loop starts the workers when it is built, which may be before the file is named."""

    def streaming(name, **kwargs):
        setting = dict(loop='iter', every=3, infinite=True, workers=2)
        if own:  # a loader that somebody has built
            data = Noisy()
            setting['given'] = DataLoader(
                data, 2, sampler=InfiniteSampler(data, seed=0), num_workers=2,
                worker_init_fn=partial(worker_init_fn, num_workers=2, rank=0, seed=0),
            )  # fmt: skip
        return runner(tmp_path / name, **setting, **kwargs)

    streaming('whole').train()
    with pytest.raises(Cut):
        streaming('parts', cut=CutHook(8)).train()
    parts = streaming('parts', resume=resume == 'config')
    if resume != 'config':
        if resume == 'late':
            assert parts.train_dataloader.num_workers == 2  # builds the loop
        parts.resume(latest_checkpoint(parts.work_dir))
    parts.train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))


def test_a_loader_of_another_class_is_named(tmp_path, capfd):
    class OwnLoader(DataLoader):
        pass

    with pytest.raises(Cut):
        runner(tmp_path, every=2, cut=CutHook(7), given=OwnLoader(Noisy(), 2)).train()
    assert 'OwnLoader may' not in ''.join(capfd.readouterr())
    runner(tmp_path, every=2, resume=True, given=OwnLoader(Noisy(), 2)).train()
    assert 'OwnLoader may take its order from state' in ''.join(capfd.readouterr())


def test_random_states_do_not_fill_the_pipe(monkeypatch):
    """It has 64 KB for all that a worker has sent early, but for tensors."""
    monkeypatch.setattr(loader, 'get_worker_info', lambda: SimpleNamespace(id=0))
    batch, worker, state = loader._collate(list, True, [Noisy()[0]])
    assert len(batch) == 1 and worker == 0
    assert isinstance(state, torch.Tensor) and len(state) > 10_000


def test_a_program_that_still_iterates_ends_at_once():
    """Workers outlive the first SIGTERM for two minutes, and Python ends them by SIGTERM."""
    script = """
from torch.utils.data import DataLoader
from mmkd.engine.loader import ResumableLoader
batches = iter(ResumableLoader(DataLoader(range(9), num_workers=2)))
next(batches)
"""
    # The imports take seconds.
    subprocess.run([sys.executable, '-c', script], check=True, timeout=100)


def test_another_number_of_workers_is_said(tmp_path, capfd):
    with pytest.raises(Cut):
        runner(tmp_path, cut=CutHook(7), every=2, workers=2).train()
    runner(tmp_path, resume=True, every=2, workers=3).train()
    said = capfd.readouterr()
    assert (
        'the checkpoint has the random states of 2 data-loader workers and this run has 3'
        in said.out + said.err
    )


@pytest.mark.parametrize('ema', [False, True], ids=['plain', 'ema'])
@pytest.mark.parametrize(
    'setting',
    [
        dict(loop='epoch'),
        dict(loop='epoch', every=2),
        dict(loop='epoch', every=5),  # the end of an epoch, saved by iterations
        dict(loop='iter', every=2),
        dict(loop='iter', every=5, infinite=True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    'cut', [pytest.param(6, marks=pytest.mark.slow), 8, pytest.param(11, marks=pytest.mark.slow)]
)
def test_cut_off_and_resumed_equals_never_cut_off(tmp_path, setting, cut, ema):
    whole = Noisy()
    runner(tmp_path / 'whole', ema=ema, data=whole, **setting).train()
    parts = Noisy()
    with pytest.raises(Cut):
        runner(tmp_path / 'parts', ema=ema, cut=CutHook(cut), data=parts, **setting).train()
    saved = read_checkpoint(latest_checkpoint(str(tmp_path / 'parts')))['meta']['iter']
    rest = Noisy()
    resumed = runner(tmp_path / 'parts', ema=ema, resume=True, data=rest, **setting)
    resumed.train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))
    # Nothing is loaded again, and nothing is left out.
    assert len(whole.read) == 2 * (15 if setting['loop'] == 'epoch' else 13)
    assert rest.read == whole.read[2 * saved :]


def test_each_file_names_a_whole_one_and_nothing_older_goes_first(tmp_path, monkeypatch):
    """A save that fails: the one before is still there, and last_checkpoint names it."""
    put = mmkd.io.checkpoint.AtomicLocalBackend.put
    count = [0]

    def failing(self, obj, path):
        if str(path).endswith('.pth'):
            count[0] += 1
            if count[0] == 2:
                raise OSError(28, 'No space left on device', str(path))
        put(self, obj, path)

    monkeypatch.setattr(mmkd.io.checkpoint.AtomicLocalBackend, 'put', failing)
    with pytest.raises(OSError, match='No space left'):
        runner(tmp_path).train()
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_1.pth')
    monkeypatch.undo()
    install()
    runner(tmp_path, resume=True).train()
    runner(tmp_path / 'whole').train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path))
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_3.pth']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('loop', ['epoch', 'iter'])
def test_told_to_stop_it_saves_and_goes_on_in_mid_epoch(tmp_path, number, loop):
    class Tell(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter + 1 == 7:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    infinite = loop == 'iter'
    every = 5 if infinite else None
    with pytest.raises(SystemExit) as stopped:
        runner(tmp_path, loop, cut=Tell(), infinite=infinite, every=every).train()
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_7.pth')
    runner(tmp_path, loop, resume=True, infinite=infinite, every=every).train()
    runner(tmp_path / 'whole', loop, infinite=infinite, every=every).train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path))


@pytest.mark.parametrize('loop', ['epoch', 'iter'])
def test_cut_off_in_a_validation_it_is_made_up_for(tmp_path, loop):
    """The score, the best file and all that follows are those of a run that was never cut off."""

    class CutInValidation(Hook):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == (10 if loop == 'epoch' else 8):
                raise Cut

    setting = dict(loop=loop, every=None if loop == 'epoch' else 2, infinite=loop == 'iter')
    runner(tmp_path / 'whole', score=Score(), **setting).train()
    with pytest.raises(Cut):
        runner(tmp_path / 'parts', score=Score(), cut=CutInValidation(), **setting).train()
    resumed = runner(tmp_path / 'parts', score=Score(), resume=True, **setting)
    scores = []
    resumed.register_hook(Scores(scores))
    resumed.train()
    assert scores == ([10, 15] if loop == 'epoch' else [8, 12, 13])
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))
    names = [sorted(p.name for p in (tmp_path / d).glob('*.pth')) for d in ('whole', 'parts')]
    assert names[0] == names[1]
    assert [name for name in names[0] if name.startswith('best_score')] == names[0][:1]


class Scores(Hook):
    def __init__(self, scores):
        self.scores = scores

    def after_val_epoch(self, runner, metrics=None):
        self.scores.append(metrics['score'])


def test_the_best_checkpoint_is_there_until_a_better_one_is(tmp_path, monkeypatch):
    runner(tmp_path, score=Score()).train()
    best = [p.name for p in tmp_path.glob('best_*')]
    put = mmkd.io.checkpoint.AtomicLocalBackend.put

    def failing(self, obj, path):
        if 'best_' in str(path):
            raise OSError(5, 'Input/output error', str(path))
        put(self, obj, path)

    monkeypatch.setattr(mmkd.io.checkpoint.AtomicLocalBackend, 'put', failing)
    longer = runner(tmp_path, score=Score(), resume=True)
    longer.train_loop._max_epochs = 4
    with pytest.raises(OSError, match='Input/output'):
        longer.train()
    assert [p.name for p in tmp_path.glob('best_*')] == best


@pytest.mark.parametrize(
    'setting', [dict(loop='epoch', every=2), dict(loop='iter', every=2, infinite=True)], ids=str
)
def test_a_run_without_a_seed_goes_on_in_the_same_order(tmp_path, setting):
    """The seed is drawn, and MMEngine builds the sampler before it reads it from the file."""
    parts, rest = Noisy(), Noisy()
    with pytest.raises(Cut):
        runner(tmp_path, seed=None, cut=CutHook(8), data=parts, **setting).train()
    runner(tmp_path, seed=None, resume=True, data=rest, **setting).train()
    read = parts.read[:12] + rest.read  # saved after iteration 6, of five an epoch
    assert sorted(read[:10]) == sorted(read[10:20]) == list(range(10))


class Shaped(Noisy):
    """Some images are wide, some high."""

    def get_data_info(self, index):
        return dict(width=10 if index % 3 else 20, height=15)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('loop, infinite', [('epoch', False), ('iter', False), ('iter', True)])
def test_batches_of_one_shape_go_on_where_they_were(tmp_path, loop, infinite, workers):
    """MMEngine starts the workers of an iteration-based run early, and they take from buckets."""
    setting = dict(
        loop=loop, every=2, infinite=infinite, workers=workers,
        batch_sampler=dict(type='mmdet.AspectRatioBatchSampler'),
    )  # fmt: skip
    whole, rest = Shaped(), Shaped()
    runner(tmp_path / 'whole', data=whole, **setting).train()
    with pytest.raises(Cut):
        runner(tmp_path / 'parts', cut=CutHook(9), data=Shaped(), **setting).train()
    runner(tmp_path / 'parts', resume=True, data=rest, **setting).train()
    if not workers:
        assert rest.read == whole.read[16:]
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))


class Sources(Shaped):
    """Two sets in one."""

    def __init__(self):
        super().__init__(16)
        self.datasets, self.cumulative_sizes = [range(7), range(9)], [7, 16]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('cuts', [[3], [9], [5, 11]], ids=str)
def test_a_stream_of_several_sources_goes_on_where_it_was(tmp_path, cuts, workers):
    def distinct(name, **kwargs):
        sampler = dict(type='mmdet.MultiSourceSampler', batch_size=2, source_ratio=[1, 1])
        setting = dict(loop='iter', every=2, workers=workers, data=Sources(), sampler=sampler)
        return runner(tmp_path / name, **setting, **kwargs)

    distinct('whole').train()
    for at in cuts:
        with pytest.raises(Cut):
            distinct('parts', cut=CutHook(at), resume=True).train()
    distinct('parts', resume=True).train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))


class OwnSampler(SequentialSampler):
    def __iter__(self):
        return iter(torch.randperm(len(self.data_source)).tolist())


@pytest.mark.parametrize('own', [False, True])
def test_a_sampler_that_cannot_be_put_back_is_named(tmp_path, capfd, own):
    data = Noisy()
    kind = OwnSampler(data) if own else dict(type='DefaultSampler', shuffle=True)
    with pytest.raises(Cut):
        runner(tmp_path, cut=CutHook(8), every=7, data=data, sampler=kind).train()
    assert 'OwnSampler may' not in ''.join(capfd.readouterr())
    runner(tmp_path, resume=True, every=7, data=data, sampler=kind).train()
    assert ('OwnSampler may take its order' in ''.join(capfd.readouterr())) == own


def test_an_early_stop_comes_when_it_would_have_come(tmp_path):
    class Same(Score):
        def compute_metrics(self, results):
            return {'score': 0.5}

    def waiting(name, **kwargs):
        hook = EarlyStoppingHook(monitor='score', rule='greater', patience=2)
        return runner(tmp_path / name, score=Same(), patience=hook, epochs=9, **kwargs)

    whole = waiting('whole')
    whole.train()
    assert whole.epoch == 3  # the first, and two that are no better
    with pytest.raises(Cut):
        waiting('parts', cut=CutHook(12)).train()
    parts = waiting('parts', resume=True)
    parts.train()
    assert parts.epoch == 3
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))


class TellHook(Hook):
    def __init__(self, *iters):
        self.iters = iters

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 in self.iters:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    class Impatient(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter + 1 == 7:
                os.kill(os.getpid(), signal.SIGINT)
                assert runner._checkpoints.signal == signal.SIGINT
                os.kill(os.getpid(), signal.SIGINT)
                pytest.fail('the second was heeded too late')

    # Where tests run in the background it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            runner(tmp_path, cut=Impatient()).train()
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.glob('iter_*.pth'))


def test_told_to_stop_it_takes_the_step_that_it_accumulates_for(tmp_path):
    with pytest.raises(SystemExit):
        runner(tmp_path, cut=TellHook(7), accumulate=2).train()
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_8.pth')
    runner(tmp_path, resume=True, accumulate=2).train()
    runner(tmp_path / 'whole', accumulate=2).train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path))


def test_what_a_stop_has_saved_goes_with_the_next_save(tmp_path):
    for told in (2, 4, 7):
        with pytest.raises(SystemExit):
            runner(tmp_path, cut=TellHook(told), resume=True).train()
        stopped = [p.name for p in tmp_path.glob('iter_*.pth')]
        assert stopped == [f'iter_{told}.pth']
    runner(tmp_path, resume=True).train()
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_3.pth']


def test_a_stop_keeps_what_the_schedule_saves(tmp_path):
    setting = dict(loop='iter', every=4, infinite=True, keep=-1)
    with pytest.raises(SystemExit):
        runner(tmp_path, cut=TellHook(8), **setting).train()
    runner(tmp_path, resume=True, **setting).train()
    assert {p.name for p in tmp_path.glob('*.pth')} == {
        f'iter_{at}.pth' for at in (4, 8, 12, 13)
    }  # fmt: skip


def child(work_dir, pids=None, **setting) -> int:
    """The exit status of a process of its own group that trains; 77 for an exception.

    Its number is added to ``pids``.
    """
    pid = os.fork()
    if pids is not None:
        pids.append(pid)
    if pid == 0:
        status = 77
        try:
            os.setpgid(0, 0)
            runner(work_dir, **setting).train()
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_signal_to_all_processes_leaves_the_workers_until_the_run_has_saved(tmp_path):
    class TellAll(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter + 1 == 7:
                # By another process: workers take it from their parent in another way.
                subprocess.run(['setsid', 'kill', '-TERM', '--', f'-{os.getpid()}'], check=True)
                time.sleep(0.3)

    assert child(tmp_path, workers=2, cut=TellAll()) == 128 + signal.SIGTERM
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_7.pth')


class KillHook(Hook):
    """Kills the run once its workers have filled their pipe."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)


def left_of(group, seconds=60) -> list[int]:
    """The processes of a group that live on; gives them time to end."""
    end = time.monotonic() + seconds
    while True:
        living = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process.pid)
        if not living or time.monotonic() > end:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
            return living
        time.sleep(0.1)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A temporary folder with a short name: those of sockets have at most 108 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv('TMPDIR', folder)
        monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
        monkeypatch.setattr(tempfile, 'tempdir', None)
        yield Path(folder)


@pytest.mark.parametrize(
    'start', ['fork', *(pytest.param(s, marks=pytest.mark.slow) for s in ('spawn', 'forkserver'))]
)
@pytest.mark.parametrize(
    'setting',
    [dict(loop='epoch'), dict(loop='iter', persistent=True, infinite=True)],
    ids=['epoch', 'persistent'],
)
def test_a_kill_leaves_no_process_and_no_temporary_file(
    tmp_path, temporary, monkeypatch, setting, start
):
    theirs = temporary / 'theirs' if setting['loop'] == 'iter' else None
    if theirs:
        theirs.mkdir()  # of a process that lives: this one
    process = multiprocessing.current_process()
    monkeypatch.setitem(process._config, 'tempdir', theirs and str(theirs))
    shared = set(os.listdir('/dev/shm'))
    pids = []
    status = child(
        tmp_path / 'run', pids, workers=2, start=start, data=Noted(), cut=KillHook(), **setting
    )
    assert status == -signal.SIGKILL
    assert not left_of(pids[0])
    assert os.listdir(temporary) == (['theirs'] if theirs else [])
    assert not [name for name in set(os.listdir('/dev/shm')) - shared if f'_{pids[0]}_' in name]


def test_a_folder_that_a_worker_is_making_as_its_run_ends_is_not_left(temporary):
    """The window is a few instructions wide, so it is held open."""

    def worker():
        made, make = threading.Event(), tempfile.mkdtemp

        def slowly(*args, **kwargs):
            folder = make(*args, **kwargs)
            made.set()
            time.sleep(1)
            return folder

        def end():
            made.wait()
            loader._end_with_run(-1, None)  # its parent is another

        tempfile.mkdtemp = slowly
        multiprocessing.current_process()._config['tempdir'] = None
        threading.Thread(target=end).start()
        resource_sharer.DupFd(0)
        time.sleep(60)

    process = multiprocessing.get_context('fork').Process(target=worker)
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert os.listdir(temporary) == []


def test_what_a_kill_in_a_save_leaves_goes_when_the_run_goes_on(tmp_path):
    class KillInSave(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 7:
                os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)

    assert child(tmp_path, cut=KillInSave()) == -signal.SIGKILL
    assert len(list(tmp_path.glob('epoch_2.pth.*.partial'))) == 1
    runner(tmp_path, resume=True).train()
    assert not list(tmp_path.glob('*.partial'))
    runner(tmp_path / 'whole').train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path))


def test_a_distilling_detector_goes_on_in_mid_epoch(tmp_path):
    """With images that are flipped at random, and a weight that is measured as it trains."""
    register_all_modules()
    cfg = Config.fromfile(tiny_config(tmp_path, epochs=2))

    def distilling(name, **kwargs):
        MessageHub.get_current_instance().runtime_info.pop('mmkd_gradient_shares', None)
        paper = pairs.recipe(hint=dict(share=0.2))
        return DistillationRunner(
            model=pairs.distil(pairs.fpn(), pairs.fpn(8), paper, seed=1),
            work_dir=str(tmp_path / name),
            train_dataloader=cfg.train_dataloader,
            train_cfg=cfg.train_cfg,
            optim_wrapper=cfg.optim_wrapper,
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
            default_scope='mmdet',
            randomness=dict(seed=0),
            experiment_name=str(time.time_ns()),
            **kwargs,
        )

    distilling('whole').train()
    with pytest.raises(Cut):
        distilling('parts', custom_hooks=[CutHook(7)]).train()
    distilling('parts', resume=True).train()
    assert_equal(last(tmp_path / 'whole'), last(tmp_path / 'parts'))
