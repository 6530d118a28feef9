"""A run that is cut off anywhere and resumed equals one that never was, to the bit."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from test_checkpoint import same
from torch import nn
from torch.utils.data import Dataset

import mmkd.checkpoint
from mmkd.checkpoint import from_plain, install, read_checkpoint
from mmkd.runner import DistillationRunner, latest_checkpoint


class Noisy(Dataset):
    """Samples with random numbers in them, as augmentation makes them; remembers what was read."""

    def __init__(self, size=10):
        self.size, self.read = size, []

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

    def forward(self, x, mode='loss'):
        if mode == 'predict':
            return [{'steps': int(self.norm.num_batches_tracked)}] * len(x)
        keep = torch.rand_like(x) > 0.3
        return {'loss': (self.linear(self.norm(x) * keep) - np.random.rand()).pow(2).mean()}


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
    data=None,
    **kwargs,
):
    by_epoch = loop == 'epoch'
    torch.manual_seed(0)
    hooks = [dict(type='EMAHook')] if ema else []
    hooks += [cut] if cut else []
    validation = dict(
        val_dataloader=dict(
            batch_size=3, dataset=Noisy(3), sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        val_cfg=dict(type='ValLoop'),
        val_evaluator=[score],
    ) if score else {}  # fmt: skip
    return DistillationRunner(
        model=Drawing(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2, dataset=data or Noisy(), num_workers=workers,
            sampler=dict(type='InfiniteSampler' if infinite else 'DefaultSampler', shuffle=shuffle),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3) if by_epoch
        else dict(by_epoch=False, max_iters=13, val_interval=4),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=15, by_epoch=False),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', by_epoch=every is None and by_epoch, interval=every or 1,
                max_keep_ckpts=keep, save_best='score' if score else None, rule='greater',
            )
        ),
        custom_hooks=hooks, default_scope='mmengine', randomness=dict(seed=0),
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
def installed(monkeypatch):
    install()
    # MMEngine waits for two seconds between the epochs of an iteration-based run.
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)


def last(work_dir) -> dict:
    return from_plain(read_checkpoint(latest_checkpoint(str(work_dir))))


def assert_equal(a: dict, b: dict) -> None:
    for key in ('state_dict', 'optimizer', 'param_schedulers', 'ema_state_dict', 'mmkd_resume'):
        assert same(a.get(key), b.get(key)), key
    assert a['meta']['iter'] == b['meta']['iter'] and a['meta']['epoch'] == b['meta']['epoch']


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
@pytest.mark.parametrize('cut', [6, 8, 11])
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
    assert rest.read == whole.read[2 * saved :]


def test_each_file_names_a_whole_one_and_nothing_older_goes_first(tmp_path, monkeypatch):
    """A save that fails: the one before is still there, and last_checkpoint names it."""
    put = mmkd.checkpoint.AtomicLocalBackend.put
    count = [0]

    def failing(self, obj, path):
        if str(path).endswith('.pth'):
            count[0] += 1
            if count[0] == 2:
                raise OSError(28, 'No space left on device', str(path))
        put(self, obj, path)

    monkeypatch.setattr(mmkd.checkpoint.AtomicLocalBackend, 'put', failing)
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
    put = mmkd.checkpoint.AtomicLocalBackend.put

    def failing(self, obj, path):
        if 'best_' in str(path):
            raise OSError(5, 'Input/output error', str(path))
        put(self, obj, path)

    monkeypatch.setattr(mmkd.checkpoint.AtomicLocalBackend, 'put', failing)
    longer = runner(tmp_path, score=Score(), resume=True)
    longer.train_loop._max_epochs = 4
    with pytest.raises(OSError, match='Input/output'):
        longer.train()
    assert [p.name for p in tmp_path.glob('best_*')] == best
