"""A hook that stops a run at its start if the disk has no room for a checkpoint."""

from __future__ import annotations

import errno
import shutil
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor

from .wrappers import optimizers, unwrap


class DiskSpaceHook(Hook):
    """Compares the size of one checkpoint with the free space of the work directory.

    Args:
        save_optimizer: whether checkpoints contain the state of the optimizer.

    Raises:
        OSError: no room for the weights, before the first step; no room for a whole checkpoint,
            after the first step.
    """

    priority = 'LOWEST'

    def __init__(self, save_optimizer: bool = True) -> None:
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
