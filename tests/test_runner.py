"""Training, saving and resuming with a toy model: as stock MMEngine, and readable by it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from test_checkpoint import same
from torch import nn

from mmkd.engine.exact_resume import latest_checkpoint
from mmkd.engine.runner import DistillationRunner
from mmkd.io.checkpoint import CheckpointError, from_plain, install, read_checkpoint


class Toy(BaseModel):
    """One linear layer, drawn towards zero."""

    def __init__(self, adapters: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        if adapters:
            self.kd_terms = nn.ModuleDict({'hint': nn.Linear(1, 1)})

    def forward(self, x, mode='loss'):
        return {'loss': self.linear(x).pow(2).mean()}


class Distilled(Toy):
    """A distilling detector, as far as the hooks look."""

    def __init__(self) -> None:
        super().__init__()
        self.kd_terms, self.teacher = nn.ModuleDict(), None


def run(work_dir, cls=DistillationRunner, model=None, epochs=2, **kwargs) -> Runner:
    """A Runner over 8 fixed samples, 4 iterations an epoch."""
    generator = torch.manual_seed(0)
    model = model or Toy()
    hooks = {'logger': {'type': 'LoggerHook', 'interval': 1}, **kwargs.pop('hooks', {})}
    return cls(
        model=model,
        work_dir=str(work_dir),
        train_dataloader={
            'batch_size': 2,
            'dataset': [{'x': torch.randn(2, generator=generator)} for _ in range(8)],
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
            'collate_fn': {'type': 'default_collate'},
        },
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9}},
        param_scheduler={'type': 'MultiStepLR', 'milestones': [1]},
        default_hooks=hooks,
        default_scope='mmengine',
        randomness={'seed': 0},
        experiment_name=str(time.time_ns()),  # or else runs of the same second share a log
        log_level='WARNING' if cls is Runner else 'INFO',
        **kwargs,
    )


@pytest.fixture(autouse=True)
def installed():
    install()


def log_of(runner: Runner) -> str:
    for handler in runner.logger.handlers:
        handler.flush()
    return next(Path(runner.log_dir).glob('*.log')).read_text()


def test_a_stock_checkpoint_is_read_to_the_bit(tmp_path):
    run(tmp_path, Runner).train()
    path = tmp_path / 'epoch_2.pth'
    stock = torch.load(path, weights_only=False)  # written by the line above
    assert isinstance(stock['message_hub']['log_scalars']['train/loss'], HistoryBuffer)
    del stock['meta']['cfg'], stock['message_hub']['runtime_info']['cfg']
    assert same(read_checkpoint(path), stock)


def test_ours_holds_what_stock_holds_and_stock_torch_reads_it(tmp_path):
    run(tmp_path / 'stock', Runner).train()
    run(tmp_path / 'ours').train()
    ours = from_plain(torch.load(tmp_path / 'ours' / 'epoch_2.pth', weights_only=True))
    stock = torch.load(tmp_path / 'stock' / 'epoch_2.pth', weights_only=False)
    assert list(ours) == [*stock, 'mmkd_resume']
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        assert same(ours[key], stock[key])
    for key, buffer in stock['message_hub']['log_scalars'].items():
        if 'time' not in key:
            assert same(ours['message_hub']['log_scalars'][key], buffer)
    assert set(ours['message_hub']['runtime_info']) == set(stock['message_hub']['runtime_info'])


@pytest.mark.parametrize('first', [Runner, DistillationRunner])
def test_resume_equals_no_interruption(tmp_path, first):
    run(tmp_path / 'whole').train()
    run(tmp_path / 'first', first).train()
    path = str(tmp_path / 'first' / 'epoch_1.pth')
    resumed = run(tmp_path / 'parts', load_from=path, resume=True)
    resumed.train()
    whole, parts = (
        from_plain(read_checkpoint(tmp_path / name / 'epoch_2.pth')) for name in ('whole', 'parts')
    )
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        assert same(parts[key], whole[key])
    buffers = whole['message_hub']['log_scalars']
    for key in ('train/loss', 'train/lr'):
        assert len(buffers[key].data[0]) == 8
        assert same(parts['message_hub']['log_scalars'][key], buffers[key])
        assert type(resumed.message_hub.get_scalar(key)) is HistoryBuffer
    assert 'resumed epoch: 1, iter: 4' in log_of(resumed)


_STOCK = """
import sys
from unittest.mock import MagicMock
sys.path.insert(0, {tests!r})
mocked = ('mmkd', 'mmkd.engine.exact_resume', 'mmkd.engine.runner', 'mmkd.io.checkpoint')
sys.modules.update(dict.fromkeys(mocked, MagicMock()))
from test_runner import Runner, run
runner = run({work_dir!r}, Runner, resume=True, load_from={path!r})
runner.train()
print('ITER', runner.iter, 'LR', runner.optim_wrapper.get_lr()['lr'])
"""


def test_stock_mmengine_resumes_from_ours(tmp_path):
    run(tmp_path).train()
    script = _STOCK.format(
        tests=str(Path(__file__).parent),
        work_dir=str(tmp_path / 'stock'),
        path=str(tmp_path / 'epoch_1.pth'),
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'ITER 8 LR [0.010000000000000002]'


_KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from mmengine.hooks import Hook
from test_runner import run
class Halt(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.epoch == 1 and batch_idx == 1:
            print('HERE', flush=True)
            time.sleep(900)
run({work_dir!r}, epochs=3, custom_hooks=[Halt()]).train()
"""


def test_killed_in_mid_epoch_and_resumed_it_finishes(tmp_path):
    script = _KILLED.format(tests=str(Path(__file__).parent), work_dir=str(tmp_path / 'killed'))
    process = subprocess.Popen(
        [warm.python(), '-c', script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    while b'HERE' not in (line := process.stdout.readline()):
        assert line, 'the run ended before it could be killed'
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    run(tmp_path / 'killed', epochs=3, resume=True).train()
    run(tmp_path / 'whole', epochs=3).train()
    killed, whole = (
        read_checkpoint(tmp_path / name / 'epoch_3.pth') for name in ('killed', 'whole')
    )
    assert killed['meta']['iter'] == 12
    assert same(killed['state_dict'], whole['state_dict'])


def test_other_hooks_see_real_objects(tmp_path):
    seen = []

    class Look(Hook):
        priority = 'LOWEST'

        def before_save_checkpoint(self, runner, checkpoint):
            seen.append(type(checkpoint['message_hub']['log_scalars']['train/loss']))

        def after_load_checkpoint(self, runner, checkpoint):
            seen.append(type(checkpoint['message_hub']['log_scalars']['train/loss']))

    run(tmp_path, epochs=1, custom_hooks=[Look()]).train()
    run(tmp_path, resume=True, custom_hooks=[Look()]).train()
    assert seen == [HistoryBuffer] * 3


@pytest.mark.parametrize('resume', [True, False])
def test_a_path_with_nothing_there_stops_before_anything_is_built(tmp_path, resume):
    with pytest.raises(FileNotFoundError, match=r'checkpoint .*nowhere\.pth does not exist'):
        run(tmp_path / 'x', load_from=str(tmp_path / 'nowhere.pth'), resume=resume)
    with pytest.raises(FileNotFoundError, match=r'is a directory'):
        run(tmp_path / 'x', load_from=str(tmp_path), resume=resume)
    assert not (tmp_path / 'x').exists()


def test_bare_resume_with_nothing_there_says_so(tmp_path):
    runner = run(tmp_path, epochs=1, resume=True)
    runner.train()
    assert f'NOTHING TO RESUME in {runner.work_dir}: training starts from scratch' in log_of(runner)
    assert (tmp_path / 'epoch_1.pth').exists()


def test_weights_alone_cannot_be_resumed(tmp_path):
    torch.save({'state_dict': Toy().state_dict()}, tmp_path / 'weights.pth')
    with pytest.raises(CheckpointError, match=r'holds no meta, message_hub, optimizer.*load_from'):
        run(tmp_path, load_from=str(tmp_path / 'weights.pth'), resume=True).train()


def test_resume_does_not_run_the_config_in_the_file(tmp_path):
    run(tmp_path, epochs=1).train()
    path, marker = tmp_path / 'epoch_1.pth', tmp_path / 'marker'
    checkpoint = torch.load(path)
    checkpoint['meta']['config'] = f'open({str(marker)!r}, "w")'
    torch.save(checkpoint, path)
    run(tmp_path, load_from=str(path), resume=True).train()
    assert not marker.exists()


def test_the_latest_checkpoint_is_found_whatever_last_checkpoint_says(tmp_path):
    assert latest_checkpoint(str(tmp_path / 'nowhere')) is None
    assert latest_checkpoint(str(tmp_path)) is None
    for number in (2, 9, 10):
        (tmp_path / f'epoch_{number}.pth').touch()
    (tmp_path / 'epoch_11.pth.123.partial').touch()
    (tmp_path / 'best_coco_bbox_mAP_epoch_12.pth').touch()
    newest = str(tmp_path / 'epoch_10.pth')
    assert latest_checkpoint(str(tmp_path)) == newest
    for record, found in (
        (newest, newest),
        (str(tmp_path / 'epoch_9.pth'), str(tmp_path / 'epoch_9.pth')),
        ('', newest),  # killed while it was written
        ('/moved/away/epoch_9.pth', str(tmp_path / 'epoch_9.pth')),
        ('/deleted/epoch_8.pth', newest),
    ):
        (tmp_path / 'last_checkpoint').write_text(record)
        assert latest_checkpoint(str(tmp_path)) == found


@pytest.mark.parametrize('ema', [False, True])
def test_adapters_are_passed_over_by_a_model_without(tmp_path, ema):
    hooks = {'ema': {'type': 'EMAHook'}} if ema else {}
    run(tmp_path / 'distilled', model=Toy(adapters=True), epochs=1, hooks=hooks).train()
    path = str(tmp_path / 'distilled' / 'epoch_1.pth')
    assert 'kd_terms.hint.weight' in torch.load(path)['state_dict']
    plain = run(tmp_path / 'plain', load_from=path, epochs=1, hooks=hooks)
    plain.call_hook('before_run')
    plain.load_or_resume()
    assert same(plain.model.state_dict()['linear.weight'], torch.load(path)['state_dict'][
        'linear.weight'])  # fmt: skip
    log = log_of(plain)
    assert f"{4 if ema else 2} tensors of a distilled student's terms" in log
    assert 'do not match' not in log
    assert 'unexpected key' not in log


def test_adapters_are_loaded_by_a_model_with(tmp_path):
    run(tmp_path, model=Toy(adapters=True), epochs=1).train()
    runner = run(tmp_path, model=Toy(adapters=True), load_from=str(tmp_path / 'epoch_1.pth'))
    runner.load_or_resume()
    saved = torch.load(tmp_path / 'epoch_1.pth')['state_dict']
    assert same(dict(runner.model.state_dict()), dict(saved))
    assert 'are ignored' not in log_of(runner)


def test_the_startup_table_is_logged_once_with_its_sources(tmp_path, monkeypatch):
    def table(student, load_from=None, resumed=None):
        return f'TABLE load_from={load_from} resumed={resumed}'

    monkeypatch.setattr('mmkd.engine.summary.startup_table', table)
    runner = run(tmp_path, model=Distilled(), epochs=1)
    runner.train()
    assert log_of(runner).count('TABLE') == 1
    assert 'TABLE load_from=None resumed=None' in log_of(runner)
    path = str(tmp_path / 'epoch_1.pth')
    runner = run(tmp_path / 'resumed', model=Distilled(), load_from=path, resume=True)
    runner.train()
    assert f'TABLE load_from=None resumed={path}' in log_of(runner)
    runner = run(tmp_path / 'loaded', model=Distilled(), load_from=path)
    runner.train()
    assert f'TABLE load_from={path} resumed=None' in log_of(runner)


def test_no_temporary_files_are_left(tmp_path):
    run(tmp_path, hooks={'checkpoint': {'type': 'CheckpointHook', 'max_keep_ckpts': 1}}).train()
    assert sorted(name for name in os.listdir(tmp_path) if 'epoch' in name or 'last' in name) == [
        'epoch_2.pth',
        'last_checkpoint',
    ]
