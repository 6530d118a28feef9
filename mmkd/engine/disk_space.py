"""A run that has no room on the disk for its checkpoints stops at its start."""

from __future__ import annotations

import errno
import shutil
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

from .processes import unwrap


class RoomHook(Hook):
    """What cannot take one checkpoint now cannot take it when it is due, which may be hours away.

    Args:
        save_optimizer: whether its state is a part of each.

    Raises:
        OSError: no room for the weights before the first step, or for all of it behind that step.
    """

    priority = 'LOWEST'

    def __init__(self, save_optimizer: bool = True) -> None:
        self.save_optimizer = save_optimizer
        self.complete = False

    def before_train(self, runner: Runner) -> None:
        """The weights."""
        self._require(runner, 'the weights in each checkpoint take', [])

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """The optimizer's state too: before its first step it has none."""
        if self.complete:
            return
        self.complete = True
        found: list[Any] = []
        if self.save_optimizer:
            wrapper = runner.optim_wrapper
            for each in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
                found += [v for state in each.optimizer.state.values() for v in state.values()]
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
        if disk.total and disk.free < size:  # some file systems do not tell
            raise OSError(
                errno.ENOSPC,
                f'{disk.free / 2**20:.1f} MiB are free, and {what} {size / 2**20:.1f} MiB',
                runner.work_dir,
            )
