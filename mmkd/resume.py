"""Runs that are cut off anywhere, and go on as if nothing had happened.

What MMEngine does not keep is kept here: the state of the random numbers of every process, and how
many batches of the epoch have been seen. On a CPU a resumed run then equals one that was never cut
off, to the bit, with these exceptions: where data-loader workers draw random numbers
(``num_workers`` > 0 and a random transform), a run cut off in mid-epoch draws others (so does one
with ``persistent_workers`` cut off anywhere); gradients that were being accumulated
(``accumulative_counts``) are lost; and a schedule that follows a metric misses the step that
belongs to a validation it was cut off in.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import os.path as osp
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mmengine.fileio as fileio
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    barrier,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from .watch import random_state, set_random

KEY = 'mmkd_resume'
"""Where a checkpoint has it."""
AGREE = 10
"""Every so many iterations several processes agree on whether one of them was told to stop."""


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's, which never is without a whole checkpoint, and from which a run goes on exactly.

    What is older is removed when what is newer is on the disk, and ``last_checkpoint`` names a
    whole one at every moment. DistillationRunner takes it wherever a config says CheckpointHook.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.random: list[dict] = []
        self.validated_at: int | None = None
        self.found: dict | None = None
        self.signal: int | None = None
        self.agreed = 0
        self.sampler_seed: int | None = None
        self.stopping = False
        self.stopped_as: str | None = None
        self.file_backend: Any = None

    # ------------------------------------------------------------------------------ saving

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            while len(self.keep_ckpt_ids) >= self.max_keep_ckpts:
                outdated.append(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._save(runner, self.out_dir, name, meta, **self.args)
        if is_main_process():
            for old in outdated:
                self._remove(
                    self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
                )

    def _save(self, runner: Runner, out_dir: str, name: str, meta: dict, **kwargs: Any) -> None:
        self.random = all_gather_object(random_state())
        runner.save_checkpoint(
            out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **kwargs,
        )
        if is_main_process():
            path = fileio.join_path(out_dir, name, backend_args=self.backend_args)
            fileio.put_text(path, osp.join(runner.work_dir, 'last_checkpoint'))
            if self.stopped_as not in (None, path):
                self._remove(self.stopped_as)
            self.stopped_as = None

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        backend = self.file_backend
        deferred = self.file_backend = _Deferred(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        for path in deferred.removed:
            # A score that is as good may have been written to the same name.
            if path not in (getattr(self, 'best_ckpt_path', None), *self._best_paths()):
                self._remove(path)

    def _best_paths(self) -> list[str]:
        return list(getattr(self, 'best_ckpt_path_dict', None) or {}.values())

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """The best checkpoint; a file written now need not be validated again."""
        self.validated_at = runner.iter
        super().after_val_epoch(runner, metrics)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds what a resumed run needs."""
        if 'optimizer' in checkpoint and self.random:
            checkpoint[KEY] = {
                'random': self.random,
                'validated': checkpoint['meta'].get('iter') == self.validated_at,
                'sampler_seed': self.sampler_seed,
                'stopped': self.stopping,
            }

    # ---------------------------------------------------------------------------- going on

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Takes what a resumed run needs."""
        if getattr(runner, '_resuming', None) is not None:
            self.found = checkpoint.get(KEY, {})

    def before_train(self, runner: Runner) -> None:
        """As MMEngine's; a resumed run remembers the file that it came from.

        What a run that was killed in a save had not renamed is removed.
        """
        super().before_train(runner)
        if is_main_process():
            for partial in glob.glob(osp.join(glob.escape(runner.work_dir), '*.[0-9]*.partial')):
                os.remove(partial)
        if self.last_ckpt is None and getattr(runner, 'resumed_from', None):
            self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')

    def go_on(self, runner: Runner) -> None:
        """Put a resumed run where its checkpoint was written; called right before training."""
        found, self.found = self.found, None
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None and isinstance(loop.dataloader, DataLoader):
                _prepare_workers(loop.dataloader, runner.seed)
        sampler = _sampler(runner.train_loop.dataloader)
        if found is None:
            self.sampler_seed = getattr(sampler, 'seed', None)
            return
        if found.get('sampler_seed') is not None and hasattr(sampler, 'seed'):
            # MMEngine builds the sampler before it reads the seed of a run that was given none.
            sampler.seed = found['sampler_seed']
        self.sampler_seed = getattr(sampler, 'seed', None)
        if found.get('stopped') and osp.dirname(runner.resumed_from) == runner.work_dir:
            self.stopped_as = runner.resumed_from
        states = found.get('random') or []
        state = states[get_rank()] if len(states) == runner.world_size else None
        if state is None:
            runner.logger.warning(
                f'the checkpoint has the random numbers of {len(states)} processes and this run '
                f'has {runner.world_size}: it goes on from the same weights with other random '
                'numbers'
            )
        loop = runner.train_loop
        seen = _seen(loop)
        _restore(state)
        if isinstance(loop, IterBasedTrainLoop):
            due, at = loop._iter, loop.max_iters
        else:
            due, at = loop._epoch, loop.max_epochs
        if (
            runner.val_loop is not None
            and not found.get('validated')
            and due
            and not (seen and isinstance(loop, EpochBasedTrainLoop))
        ):
            loop._decide_current_val_interval()
            if due >= loop.val_begin and (due % loop.val_interval == 0 or due == at):
                runner.logger.info('the run was cut off before or in its validation: made up for')
                runner.val_loop.run()
        if seen:
            _skip(loop, seen, random_state() if state is not None else None)

    # ---------------------------------------------------------------------- being told to stop

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C wait for the end of the iteration; a second Ctrl-C ends at once.

        One that comes in a validation waits for the iteration behind it. Killed there, the run
        makes up for that validation when it is resumed.
        """
        before: dict[int, Any] = {}

        def told(number: int, frame: Any) -> None:
            self.signal = number
            # A launcher passes on what the whole group was sent, so theirs may come twice.
            if number == signal.SIGINT and get_world_size() == 1:
                signal.signal(number, before[number])

        try:
            for each in (signal.SIGTERM, signal.SIGINT):
                before[each] = signal.signal(each, told)
        except ValueError:  # not in the main thread
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_if_told(self, runner: Runner) -> None:
        """Save and leave, at the end of an iteration after SIGTERM or Ctrl-C.

        Raises:
            SystemExit: with 128 + the signal's number.
        """
        done, number = runner.iter + 1, self.signal or 0
        if runner.world_size > 1:
            if done % AGREE == 0:
                flag = torch.tensor(number, device=next(runner.model.parameters()).device)
                all_reduce(flag, 'max')
                self.agreed = int(flag)
            number = self.agreed
        # Gradients that are being accumulated are in no checkpoint.
        if not number or done % getattr(runner.optim_wrapper, '_accumulative_counts', 1):
            return
        # One written by the schedule at this iteration is kept as long as the schedule says.
        self.stopping = osp.basename(self.last_ckpt or '') != f'iter_{done}.pth'
        self._save(runner, runner.work_dir, f'iter_{done}.pth', dict(epoch=runner.epoch, iter=done))
        runner.logger.warning(
            f'{signal.Signals(number).name} after iteration {done}: saved as '
            f'{osp.join(runner.work_dir, f"iter_{done}.pth")}; the same command with --resume '
            'goes on there'
        )
        if runner.world_size > 1:
            barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + number)  # see launch.leave
        raise SystemExit(128 + number)


class GoOnHook(Hook):
    """Calls the checkpoint hook last of all, before training and after each iteration."""

    priority = 'LOWEST'

    def __init__(self, checkpoints: WholeCheckpointHook) -> None:
        self.checkpoints = checkpoints

    def before_train(self, runner: Runner) -> None:
        """Goes on where the checkpoint was written."""
        self.checkpoints.go_on(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Stops where the run was told to."""
        self.checkpoints.stop_if_told(runner)


class _Deferred:
    """A file backend that removes nothing yet."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.removed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.removed.append(path)

    rmtree = remove


class _Rest:
    """A batch sampler that, the first time, begins behind the batches that were seen."""

    def __init__(self, batches: Any, seen: int, state: dict | None) -> None:
        self.batches, self.seen, self.state = batches, seen, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        indices = iter(self.batches)
        for _ in range(self.seen):
            next(indices, None)
        if self.seen:
            # Making the data loader's iterator has drawn a number.
            _restore(self.state)
            self.seen = 0
        yield from indices


class _Advanced:
    """Stands for the iterator of an iteration-based loop, which MMEngine advances by loading."""

    def __init__(self, loader: DataLoader, seen: int, state: dict | None) -> None:
        self.loader, self.left, self.state, self.seen = loader, seen, state, seen
        self.iterator: Any = None

    def __iter__(self) -> _Advanced:
        return self

    def skip_iter(self, count: int) -> None:
        """As the maintained fork of MMEngine advances."""
        self.left -= count

    def __next__(self) -> Any:
        if self.left:
            self.left -= 1
            return None
        if self.iterator is None:
            loader, sampler = self.loader, self.loader.batch_sampler.sampler
            epoch, seen = 0, self.seen
            if not isinstance(sampler, InfiniteSampler):
                epoch, seen = divmod(self.seen, len(loader))
                if hasattr(sampler, 'set_epoch'):
                    sampler.set_epoch(epoch)
            if not seen:
                _restore(self.state)
                self.iterator = _InfiniteDataloaderIterator(loader)
            else:
                object.__setattr__(
                    loader, 'batch_sampler', _Rest(loader.batch_sampler, seen, self.state)
                )
                self.iterator = _InfiniteDataloaderIterator(loader)
            self.iterator._epoch = epoch
        return next(self.iterator)


def _sampler(loader: Any) -> Any:
    """The one that shuffles: MMEngine gives it to the batch sampler."""
    return getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)


def _prepare_workers(loader: DataLoader, seed: int) -> None:
    """Workers draw from the run's seed, and outlive a signal that is sent to all of its processes.

    So do a cluster and a terminal; the run needs its workers until the end of its iteration.
    """
    init = loader.worker_init_fn
    if isinstance(init, functools.partial) and 'seed' in init.keywords:
        init.keywords['seed'] = seed  # MMEngine's, made before it reads the seed of a resumed run
    if loader.num_workers:
        loader.worker_init_fn = functools.partial(_pass_over_first, init)


def _pass_over_first(init: Callable[[int], None] | None, worker: int) -> None:
    def told(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second, a loader that ends it, does

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, told)
    if init is not None:
        init(worker)


def _restore(state: dict | None) -> None:
    if state is not None:
        set_random(state)


def _seen(loop: Any) -> int:
    """How many batches of this epoch, or of an iteration-based run, are behind it."""
    if isinstance(loop, IterBasedTrainLoop):
        return loop._iter
    return loop._iter - loop._epoch * len(loop.dataloader)


def _skip(loop: Any, seen: int, state: dict | None) -> None:
    loader = loop.dataloader
    if getattr(loader, 'batch_sampler', None) is None:
        return  # a loader of one's own begins anew
    if isinstance(loop, IterBasedTrainLoop):
        loop.dataloader_iterator = _Advanced(loader, seen, state)
        return
    # DataLoader lets nobody else set it.
    object.__setattr__(loader, 'batch_sampler', _Rest(loader.batch_sampler, seen, state))
    run_iter, run_epoch = loop.run_iter, loop.run_epoch

    def counted(index: int, batch: Any) -> None:
        run_iter(index + seen, batch)

    def first() -> None:
        run_epoch()
        del loop.run_iter, loop.run_epoch

    loop.run_iter, loop.run_epoch = counted, first
