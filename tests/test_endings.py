"""How a run ends that cannot go on: in one sentence, with all that could be kept."""

import copy
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pairs
import pytest
import torch
import warm
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS

from mmkd.engine import exit as ends
from mmkd.engine.memory import OutOfMemoryError, is_out_of_memory
from mmkd.engine.runner import DistillationRunner
from mmkd.engine.work_dir import WorkDirError
from mmkd.recipe import TeacherError

# ------------------------------------------------------------------------------------ out of memory


@pytest.mark.parametrize(
    ('error', 'is_one'),
    [
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate'), True),
        (MemoryError('Unable to allocate 8.00 GiB for an array with shape (1,)'), True),
        (OSError(errno.ENOMEM, 'Cannot allocate memory'), True),
        (cv2.error('Insufficient memory: Failed to allocate 8 bytes'), True),
        (OSError(errno.ENOSPC, 'No space left on device'), False),
        (ValueError('this would run out of memory'), False),
        (RuntimeError('size mismatch'), False),
    ],
)
def test_what_is_out_of_memory(error, is_one):
    assert is_out_of_memory(error) == is_one


class Exhausted(Hook):
    def __init__(self, at, error):
        self.at, self.error = at, error

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.fail(runner.iter)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.fail('val')

    def fail(self, now):
        if now == self.at:
            raise self.error


@pytest.mark.parametrize('at', [0, 2, 'val'])
def test_out_of_memory_is_one_sentence(config, at):
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")
    config.train_dataloader.batch_size = 4
    config.val_dataloader.batch_size = 2
    config.model = pairs.distilled(config.model, config.model, pairs.recipe())
    config.default_hooks.checkpoint.update(interval=1, by_epoch=False)
    runner = RUNNERS.build(config)
    runner.register_hook(Exhausted(at, error), 'LOWEST')
    with pytest.raises(OutOfMemoryError) as raised:
        runner.train()
    said = str(raised.value)
    part, size = ('val', 2) if at == 'val' else ('train', 4)
    assert f'with {part}_dataloader.batch_size={size} (' in said and '--resume' in said
    assert 'the teacher ' in said and '\n' not in said
    if at == 2:
        assert 'in iteration 3 (epoch 1)' in said and '64x64 pixels' in said
        assert 'continue from ' in said and 'iter_2.pth' in said
    if at == 0:
        assert 'nothing was saved yet' in said


# ------------------------------------------------------------------------------- the work directory


class Delete(Hook):
    """Somebody else, at one place of a run."""

    def __init__(self, place, at=2):
        self.place, self.at = place, at

    def _gone(self, runner, what):
        if runner.iter == self.at:
            shutil.rmtree(what(runner))

    def before_train_iter(self, runner, *args, **kwargs):
        if self.place == 'train':
            self._gone(runner, lambda r: r.work_dir)
        if self.place == 'log':
            self._gone(runner, lambda r: r.log_dir)

    def before_val_iter(self, runner, *args, **kwargs):
        if self.place == 'val' and Path(runner.work_dir).is_dir():
            self._gone(runner, lambda r: r.work_dir)


@pytest.mark.parametrize(('place', 'at', 'left'), [('train', 2, 3), ('train', 3, 4), ('val', 4, 4)])
def test_a_work_dir_that_is_deleted_ends_in_one_sentence(config, place, at, left):
    runner = RUNNERS.build(config)
    runner.register_hook(Delete(place, at), 'LOWEST')
    with pytest.raises(WorkDirError, match=rf'was deleted while .*iter_{left}.pth, from which'):
        runner.train()
    work = Path(config.work_dir)
    saved = torch.load(work / f'iter_{left}.pth', weights_only=True)
    assert saved['meta']['iter'] == left and (work / 'tiny.py').is_file()
    assert 'was deleted while the run trained' in ''.join(
        p.read_text() for p in work.glob('*/*.log')
    )
    # And goes on as a run that was never stopped.
    whole = copy.deepcopy(config)
    whole.update(work_dir=f'{work}_whole', experiment_name=f'{place}{at}')
    RUNNERS.build(whole).train()
    again = copy.deepcopy(config)
    again.update(resume=True, experiment_name=f'{place}{at} again')
    RUNNERS.build(again).train()
    one, other = (
        torch.load(path, weights_only=True)['state_dict']
        for path in (f'{whole.work_dir}/epoch_1.pth', saved_last(work))
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def saved_last(work):
    return (work / 'last_checkpoint').read_text()


def test_a_folder_of_logs_that_is_deleted_is_made_again(config):
    config.visualizer.name = config.experiment_name  # its folder is this run's
    runner = RUNNERS.build(config)
    runner.register_hook(Delete('log'), 'LOWEST')
    runner.train()
    assert runner.iter == 4
    assert (Path(config.work_dir) / 'epoch_1.pth').is_file()
    assert list(Path(runner.log_dir).glob('vis_data/*.json'))


def test_a_work_dir_that_stays_is_not_made_again(config, monkeypatch):
    dumped = []
    monkeypatch.setattr(DistillationRunner, 'dump_config', lambda runner: dumped.append(runner))
    runner = RUNNERS.build(config)
    runner.train()
    assert runner.iter == 4 and len(dumped) == 1  # by MMEngine, before the first step


# ------------------------------------------------------------------------------------ the last line


def ended(main, monkeypatch):
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    with pytest.raises(SystemExit) as stopped:
        ends.run(main)
    return stopped.value.code


def raising(error):
    def main():
        raise error

    return main


def test_an_exception_is_one_line_and_its_traceback_is_kept(monkeypatch):
    said = ended(raising(KeyError('no\nsuch key')), monkeypatch)
    line, _, path = said.removesuffix(')').partition(' (traceback: ')
    assert line == r"error: KeyError: 'no\nsuch key'"
    assert 'raise error' in Path(path).read_text()
    os.remove(path)


def test_a_refusal_is_its_sentence(monkeypatch):
    assert ended(raising(TeacherError('two\nlines')), monkeypatch) == 'error: two lines'
    assert ended(lambda: 3, monkeypatch) == 3
    assert ended(lambda: None, monkeypatch) is None
    with pytest.raises(KeyboardInterrupt):
        ends.run(raising(KeyboardInterrupt()))


def test_the_error_of_a_worker_is_its_last_line(monkeypatch):
    text = (
        'Caught TypeError in worker\nOriginal Traceback (most recent call last):\n  File\nTypeE: x'
    )
    said = ended(raising(TypeError(text)), monkeypatch)
    assert said.startswith('error: TypeE: x (traceback: ')
    os.remove(said.partition('traceback: ')[2].removesuffix(')'))


def test_train_ends_in_one_line_and_the_log_has_the_traceback(config, tmp_path):
    """And nothing else is on stderr, such as what MMEngine is told about setuptools."""
    run = subprocess.run(
        [warm.python(), str(pairs.ROOT / 'tools/train.py'), config.filename, '--work-dir',
         str(tmp_path / 'work'), '--cfg-options', 'model.backbone.depth=99'],
        text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=300,
        env={**os.environ, 'PYTHONPATH': str(pairs.ROOT)},
    )  # fmt: skip
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if line]
    said, _, path = line.removesuffix(')').partition(' (traceback: ')
    assert said == "error: KeyError: 'invalid depth 99 for resnet'"
    assert 'Traceback (most recent call last)' in Path(path).read_text()
    assert Path(path).is_relative_to(tmp_path / 'work')


def test_the_warnings_of_others_about_setuptools_are_silenced_alone():
    code = (
        'import warnings, mmkd\n'
        'from mmengine.utils import is_installed\n'
        "is_installed('mmdet'), is_installed('mmdet')\n"
        "warnings.warn('something else')\n"
    )
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONWARNINGS'}
    run = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True, timeout=300,
        env={**env, 'PYTHONPATH': str(pairs.ROOT)},
    )  # fmt: skip
    assert 'something else' in run.stderr and 'pkg_resources' not in run.stderr


def test_spawned_processes_are_quiet_too(monkeypatch):
    monkeypatch.setenv('PYTHONWARNINGS', 'default')
    kept = []
    ended(lambda: kept.append(os.environ['PYTHONWARNINGS']), monkeypatch)
    code = (
        'import warnings\n'
        "warnings.warn('pkg_resources is deprecated as an API. See')\n"
        "warnings.warn('something else')\n"
    )
    run = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True,
        env={**os.environ, 'PYTHONWARNINGS': kept[0]},
    )  # fmt: skip
    assert 'something else' in run.stderr and 'pkg_resources' not in run.stderr
