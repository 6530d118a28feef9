"""The work directory: it can be written, has room for a checkpoint, and is locked by its run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import os.path as osp
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor

from .exit import stop
from .wrappers import optimizers, unwrap

MIN_FREE = 2**20
"""Bytes that are written on trial before the network is built: the size of log and configs."""


@contextlib.contextmanager
def reporting_full_disk(work_dir: str) -> Iterator[None]:
    """Turns "no space left" in this block into a message, if the file is in ``work_dir``.

    Raises:
        SystemExit: The disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Not all errors name a file: the semaphores of data-loader workers are in /dev/shm.
        if error.filename and not _lies_in(error.filename, work_dir):
            raise
        unsure = (
            '' if error.filename else '; if it has room, /dev/shm or the temporary folder has none'
        )
        _stop_unwritten(work_dir, error, unsure)


def _lies_in(path: str | bytes, folder: str) -> bool:
    return Path(os.fsdecode(path)).resolve().is_relative_to(Path(folder).resolve())


def _stop_unwritten(work_dir: str, error: OSError, more: str = '') -> NoReturn:
    stop(
        f'work_dir {work_dir} cannot be written ({error.strerror}): name a folder on a disk with '
        f'space, that you may write to, with --work-dir, or make room{more}'
    )


def check_work_dir(path: str) -> None:
    """Creates the work directory and writes a temporary file to it.

    Raises:
        SystemExit: It cannot be created or written.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(MIN_FREE))
    except OSError as error:
        _stop_unwritten(path, error)


_RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}


@contextlib.contextmanager
def locked(work_dir: str, launcher: str = 'none') -> Iterator[None]:
    """Locks ``work_dir`` against other jobs: two would delete each other's checkpoints.

    The first process of a job holds the lock; the system releases it when the process ends, even
    if it is killed. On a file system without locks nothing is locked.

    Raises:
        SystemExit: Another job holds the lock.
    """
    first = os.environ.get(_RANKS.get(launcher, ''), '0') == '0'
    with contextlib.ExitStack() as stack:
        # check_work_dir() reports a folder that cannot be written.
        with contextlib.suppress(OSError):
            if first:
                os.makedirs(work_dir, exist_ok=True)
                path = osp.join(work_dir, '.training')
                _lock(stack.enter_context(open(path, 'ab+', buffering=0)), work_dir)
        yield


def _lock(file: io.FileIO, work_dir: str) -> None:
    try:
        # Not flock: data-loader workers would inherit it, and may outlive a process that is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        stop(
            f'work_dir {work_dir}: another run is training in it '
            f'({file.read(200).decode(errors="replace").strip()}), and each would write over the '
            'other. Wait for it or stop it, or take another --work-dir'
        )
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n'.encode())


class DiskSpaceHook(Hook):
    """Compares the size of one checkpoint with the free space of the work directory.

    Args:
        save_optimizer: whether checkpoints contain the state of the optimizer.

    Raises:
        OSError: no room for the weights, before the first step; no room for a whole checkpoint,
            after the first step.
    """

    priority = 'LOWEST'

    def __init__(self, save_optimizer: bool) -> None:
        self.save_optimizer = save_optimizer
        self.complete = False

    def before_train(self, runner: Runner) -> None:
        """Checks the size of the weights."""
        self._require(runner, 'the weights in each checkpoint take', [])

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Adds the state of optimizer and EMA, which the optimizer creates in its first step."""
        if self.complete:
            return
        self.complete = True
        found: list[Any] = []
        if self.save_optimizer:
            states = [s for o in optimizers(runner.optim_wrapper) for s in o.state.values()]
            found += [v for state in states for v in state.values()]
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                found += hook.ema_model.state_dict().values()
        self._require(runner, 'each checkpoint takes', found)

    def _require(self, runner: Runner, what: str, more: list[Any]) -> None:
        if not is_main_process():
            return
        tensors = [*unwrap(runner.model).state_dict().values(), *more]
        size = sum(v.nbytes for v in tensors if isinstance(v, Tensor))
        disk = shutil.disk_usage(runner.work_dir)
        if disk.total and disk.free < size:  # some file systems report 0 for both
            raise OSError(
                errno.ENOSPC,
                f'{disk.free / 2**20:.1f} MiB are free, and {what} {size / 2**20:.1f} MiB',
                runner.work_dir,
            )


class WorkDirError(OSError):
    """The work directory was deleted while a run was training in it."""


class WorkDirHook(Hook):
    """Recreates folders of a run that were deleted, before a hook writes there.

    If ``work_dir`` itself is gone, calls ``when_lost``, and the run continues to the next point
    where it can be saved; if only log folders are gone, logs a warning.

    Raises:
        WorkDirError: the folders cannot be made again.
    """

    priority = 'HIGHEST'

    def __init__(self) -> None:
        self.when_lost: Callable[[], None] | None = None
        self.folders: list[str] = []
        self.seen: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Notes the folders: the visualizer's backends have one each, for scalars."""
        backends = getattr(runner.visualizer, '_vis_backends', {}).values()
        own = [runner.work_dir, runner.log_dir, *(getattr(b, '_save_dir', '') for b in backends)]
        self.folders = [f for f in own if f and _lies_in(f, runner.work_dir)]

    def _look(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        here = {folder for folder in self.folders if osp.isdir(folder)}
        gone = [folder for folder in self.folders if folder in self.seen - here]
        self.seen |= here  # a backend makes its folder when it first writes
        if not gone or not is_main_process():
            return
        lost = runner.work_dir in gone
        try:
            for folder in self.folders:
                os.makedirs(folder, exist_ok=True)
            for handler in runner.logger.handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.setStream(open(handler.baseFilename, 'a'))  # noqa: SIM115 (the logger's)
            runner.dump_config()
        except OSError as error:
            raise WorkDirError(
                f'{gone[0]} was deleted while the run trained in it, and cannot be made again '
                f'({error.strerror}), so what was trained after the last checkpoint is lost'
            ) from error
        if not lost:
            runner.logger.warning(f'{gone[0]} WAS DELETED, with its logs: it is made again, empty')
        elif self.when_lost is None:
            raise WorkDirError(
                f'work_dir {runner.work_dir} was deleted while the run trained in it, and there is '
                'no CheckpointHook to save it anew'
            )
        else:
            self.when_lost()

    before_train_iter = after_train_iter = before_train_epoch = after_train_epoch = _look
    before_val_epoch = after_val_iter = after_val_epoch = after_train = _look
