"""Exact resume: a run that was interrupted anywhere continues as if it had not been.

MMEngine saves neither the random state of the processes and their data-loader workers nor the
number of batches that the epoch has used; this module does. On a CPU a resumed run equals an
uninterrupted one to the bit, with these exceptions:

- accumulated gradients (``accumulative_counts``) are lost;
- a schedule that follows a metric misses the step of the validation it was interrupted in;
- state that a worker's data set gathers (the cache of ``CachedMosaic``) starts empty;
- persistent workers that a hook restarts (``PipelineSwitchHook``) continue the random numbers of
  the old workers, if the run was interrupted right before;
- a sampler whose order does not follow from its seed and epoch, a loader of a class of one's own
  and one without batches of indices start over, with a warning;
- a loader with ``in_order=False`` gives other batches to its workers in each run;
- custom hooks keep only what they store in MMEngine's message hub;
- in a run of several processes, all but the first lose the buffers that DistributedDataParallel
  does not synchronise: the statistics of a trained BatchNorm, hence their part of a validation.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import os.path as osp
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import mmengine.fileio as fileio
import torch
from mmdet.datasets.samplers import ClassAwareSampler, MultiDataSampler, MultiSourceSampler
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import (
    all_gather_object,
    all_reduce,
    barrier,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import SequentialSampler

from ..digests import short_sha256
from ..literals import show
from .loader import ResumableLoader
from .random_state import random_state, set_random_state
from .resume_compatibility import own_file, own_ids
from .save_best import check_metrics
from .work_dir import WorkDirError
from .wrappers import unwrap

KEY = 'mmkd_resume'
"""Key of a checkpoint that holds this state."""
SYNC_ITERATIONS = 10
"""Most iterations between two collective checks whether a process received a signal."""
SYNC_SECONDS = 5.0
"""About so many seconds between two checks; torchrun kills after 30."""

MAX_BATCHES = 1024
"""Limit of batches seen per iteration in a checkpoint: larger values are forged."""

UNSAVED = '.begun'
"""Marker file: the work directory has an earlier run's checkpoints, and this run saved none yet."""

DELETED = 1000
"""Stands in for a signal number when the work directory was deleted."""


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """A CheckpointHook that always leaves one complete checkpoint on disk, and resumes exactly.

    It removes an old checkpoint after the new one is written, and ``last_checkpoint`` names a
    complete one at every moment. DistillationRunner uses it wherever a config says CheckpointHook.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.random: list[dict] = []
        self.offset = 0
        self.workers: list[list] = []
        self.validated_at: int | None = None
        self.resumed_state: dict | None = None
        self.signal: int | None = None
        self.agreed = 0
        self.sampler_seed: int | None = None
        self.stopping = False
        self.stopped_as: str | None = None
        self.file_backend: Any = None
        self.earlier: str | None = None
        self.due = 1
        self._handlers: dict[int, Any] = {}
        self.since: tuple[int, float] = (0, 0.0)

    def _begins(self) -> str:
        return self.filename_tmpl.partition('{')[0]

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
        loader = runner.train_loop.dataloader
        workers = loader.worker_states() if isinstance(loader, ResumableLoader) else []
        every = all_gather_object((random_state(), workers))
        self.random, self.workers = [list(part) for part in zip(*every, strict=True)]
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
            # Absolute, to be found from any working directory.
            record = path if '://' in path else osp.abspath(path)
            fileio.put_text(record, osp.join(runner.work_dir, 'last_checkpoint'))
            with contextlib.suppress(FileNotFoundError):
                os.remove(osp.join(runner.work_dir, UNSAVED))
            if self.stopped_as not in (None, path):
                self._remove(self.stopped_as)
            self.stopped_as = None

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        missing = [name for name in self._chosen_by() if name not in metrics]
        if missing:
            runner.logger.warning(
                f'save_best={missing[0]} is not among the metrics of this validation '
                f'({", ".join(metrics)}): NO BEST CHECKPOINT is saved'
            )
            return
        backend = self.file_backend
        deferred = self.file_backend = _Deferred(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        for path in deferred.removed:
            # A checkpoint with an equal score may have been written under the same name.
            if path not in (getattr(self, 'best_ckpt_path', None), *self._best_paths()):
                self._remove(path)

    def _chosen_by(self) -> list[str]:
        return [name for name in self.key_indicators if name != 'auto'] if self.save_best else []

    def _best_paths(self) -> list[str]:
        return list(getattr(self, 'best_ckpt_path_dict', None) or {}.values())

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Saves the best checkpoint, and notes that this iteration was validated."""
        self.validated_at = runner.iter
        super().after_val_epoch(runner, metrics)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds the state that a resumed run needs."""
        if 'optimizer' in checkpoint and self.random:
            checkpoint[KEY] = {
                'random': self.random,
                'workers': self.workers,
                'validated': checkpoint['meta'].get('iter') == self.validated_at,
                'sampler_seed': self.sampler_seed,
                'settings': settings(runner),
                **self._position(runner.train_loop, checkpoint['meta']),
                'stopped': self.stopping,
                'patience': [
                    {'wait_count': hook.wait_count, 'best_score': float(hook.best_score)}
                    for hook in runner.hooks
                    if isinstance(hook, EarlyStoppingHook)
                ],
            }

    # --------------------------------------------------------------------------- resuming

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Reads the state that a resumed run needs."""
        if getattr(runner, '_resuming', None) is not None:
            found = checkpoint.get(KEY, {})
            self.resumed_state = found if isinstance(found, dict) else {}

    def before_train(self, runner: Runner) -> None:
        """As MMEngine's hook, with four additions.

        File names in a resumed checkpoint are accepted only if they are in this run's folder, since
        the run deletes these files. ``save_best`` is checked. Temporary files of a save that was
        killed are removed. The resumed checkpoint counts as the last one.
        """
        resumed, info = getattr(runner, 'resumed_from', None), runner.message_hub.runtime_info
        if resumed:
            folder = runner.work_dir
            if self.out_dir not in (None, folder):
                folder = osp.join(self.out_dir, osp.basename(folder.rstrip(osp.sep)))
            here = _same_folder(osp.dirname(resumed), folder)
            for key in [key for key in info if key.startswith(('best_ckpt', 'last_ckpt'))]:
                begins = ('best_',) if key.startswith('best') else (self._begins(), 'iter_')
                info[key] = own_file(info[key], folder, begins) if here else None
            if 'keep_ckpt_ids' in info:
                info['keep_ckpt_ids'] = own_ids(info['keep_ckpt_ids'], here)
        super().before_train(runner)
        if self.save_best:
            check_metrics(self._chosen_by(), getattr(runner.val_loop, 'evaluator', None))
            if runner.val_loop is None:
                runner.logger.warning(
                    f'save_best={", ".join(self.save_best)} needs a validation, and this '
                    'config has none (val_dataloader): NO BEST CHECKPOINT will be written'
                )
        if is_main_process():
            for folder in {runner.work_dir, self.out_dir}:
                for partial in glob.glob(osp.join(glob.escape(folder), '*.[0-9]*.partial')):
                    os.remove(partial)
        if self.last_ckpt is None and getattr(runner, 'resumed_from', None):
            self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')

    def restore(self, runner: Runner) -> None:
        """Restores the state of a resumed run; called right before training."""
        found, self.resumed_state = self.resumed_state, None
        self._restore_seeds(found or {}, runner)
        if found is None:
            return
        if found.get('stopped') and _same_folder(osp.dirname(runner.resumed_from), self.out_dir):
            self.stopped_as = osp.join(self.out_dir, osp.basename(runner.resumed_from))
        _restore_patience(found.get('patience'), runner)
        states = found.get('random') or []
        state = states[get_rank()] if len(states) == runner.world_size else None
        if state is None:
            runner.logger.warning(
                f'the checkpoint has the random states of {len(states)} processes and this run has '
                f'{runner.world_size}: it continues with other random numbers'
            )
        loop = runner.train_loop
        self._restore_position(loop, found, runner)
        _tell_changes(found.get('settings'), settings(runner), runner)
        if loop._iter and (unknown := _without_order(loop.dataloader)):
            runner.logger.warning(
                f'{unknown} may take its order from state that is not restored: in this epoch some '
                'images may be used twice or not at all'
            )
        workers = self._worker_states(found, loop, runner)
        if state is not None:
            set_random_state(state)
        self._validate_again(found, runner)
        self._advance(runner.train_loop, None if state is None else random_state(), workers)

    def _restore_seeds(self, found: dict, runner: Runner) -> None:
        """Gives workers and sampler the seed of a resumed run, which MMEngine reads after it has
        seeded the one, and built the other where the config sets no seed."""
        for loop in (runner.train_loop, runner.val_loop):
            init: Any = getattr(getattr(loop, 'dataloader', None), 'worker_init_fn', None)
            if 'seed' in getattr(init, 'keywords', {}):
                init.keywords['seed'] = runner.seed
        sampler: Any = getattr(runner.train_loop.dataloader, 'shuffler', None)
        if found.get('sampler_seed') is not None and hasattr(sampler, 'seed'):
            sampler.seed = found['sampler_seed']
        self.sampler_seed = getattr(sampler, 'seed', None)

    def _validate_again(self, found: dict, runner: Runner) -> None:
        """Repeats a validation before or in which the run was interrupted."""
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            due, at = loop._iter, loop.max_iters
        else:
            due, at = loop._epoch, loop.max_epochs
        if due >= at:
            runner.logger.warning(
                f'the checkpoint is at {due} of {at} that train_cfg asks for: NOTHING IS TRAINED. '
                'To continue, ask for more; to start from scratch, leave out --resume'
            )
        within = isinstance(loop, EpochBasedTrainLoop) and self._seen(loop)
        if runner.val_loop is None or found.get('validated') or not due or within:
            return
        loop._decide_current_val_interval()
        if due >= loop.val_begin and (due % loop.val_interval == 0 or due == at):
            runner.logger.info('the run was interrupted before or in a validation: it is repeated')
            runner.val_loop.run()

    def _advance(self, loop: Any, state: dict | None, workers: dict[int, dict]) -> None:
        """Continues the data loader behind the batches that have been used."""
        if not getattr(loop.dataloader, 'skips', False):
            return
        epoch, seen = 0, self._seen(loop)
        if isinstance(loop, IterBasedTrainLoop):
            if not loop.dataloader.endless:
                epoch, seen = divmod(seen, len(loop.dataloader))
            # The maintained fork of MMEngine may leave out the skipping.
            skipped = 0 if getattr(loop, 'fast_forward_on_resume', False) else loop._iter
            loop.dataloader_iterator = _Advanced(loop.dataloader, skipped, epoch, state)
        if seen or workers:
            loop.dataloader.resume(seen, state, workers)

    def _seen(self, loop: Any) -> int:
        """Number of batches used in this epoch, or in the whole iteration-based run."""
        if isinstance(loop, IterBasedTrainLoop):
            return loop._iter - self.offset
        return loop._iter - loop._epoch * len(loop.dataloader) - self.offset

    def _position(self, loop: Any, meta: dict) -> dict[str, int | None]:
        """Position in the epoch, or in the stream of images, to save."""
        if isinstance(loop, IterBasedTrainLoop):
            return {'seen': meta['iter'] - self.offset, 'images': _images_a_step(loop.dataloader)}
        length = len(loop.dataloader)
        return {'seen': meta['iter'] - meta['epoch'] * length - self.offset, 'length': length}

    def _restore_position(self, loop: Any, found: dict, runner: Runner) -> None:
        """Restores the position; the length of an epoch or the batch size may have changed."""
        if isinstance(loop, IterBasedTrainLoop):
            seen, of, now = found.get('seen'), found.get('images'), _images_a_step(loop.dataloader)
            if type(of) is not int or not now:
                of = now = 1
            if type(seen) is not int or not 0 <= seen * of <= MAX_BATCHES * loop._iter * now:
                seen, of = loop._iter, now  # written by MMEngine, or forged
            if now != of:
                there, seen = seen, round(seen * of / now)
                runner.logger.warning(
                    f'the checkpoint was written after {there} batches of {of} images, and here a '
                    f'batch of all processes has {now}: it continues after {seen} of them'
                )
            self.offset = loop._iter - seen
            return
        length = len(loop.dataloader)
        counted = loop._iter - loop._epoch * length
        seen, of = found.get('seen', counted), found.get('length', length)
        if 'length' not in found and loop._epoch and loop._iter % loop._epoch == 0:
            seen, of = 0, loop._iter // loop._epoch  # by MMEngine, most likely at an epoch's end
        if type(seen) is not int or type(of) is not int or of != length or not 0 <= seen <= of:
            known = type(seen) is int and type(of) is int and 0 < seen <= of
            there, seen = (seen, of), round(seen / of * length) if known else 0
            runner.logger.warning(
                f'the checkpoint was written at batch {show(there[0])} of an epoch of '
                f'{show(there[1])}, and '
                f'here an epoch has {length}: other data, another batch size or another number of '
                f'processes. Epoch {loop._epoch + 1} '
                + (f'continues after batch {seen} of {length}' if seen else 'is run from its start')
            )
        self.offset = counted - seen

    def _worker_states(self, found: dict, loop: Any, runner: Runner) -> dict[int, dict]:
        """The checkpoint's random states of those workers of this process that drew any."""
        loader = loop.dataloader
        if not getattr(loader, 'skips', False) or not loader.num_workers:
            return {}
        if loader.restarts_workers and self._seen(loop) % len(loader) == 0:
            return {}
        workers = found.get('workers') or []
        own = workers[get_rank()] if len(workers) == runner.world_size else []
        if len(own) != loader.num_workers:
            runner.logger.warning(
                f'the checkpoint has the random states of {len(own)} data-loader workers and '
                f'this run has {loader.num_workers}: it continues with other random numbers'
            )
            return {}
        return {i: state for i, state in enumerate(own) if state is not None}

    # ----------------------------------------------------------------------------- signals

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Defers SIGTERM and Ctrl-C to the end of the iteration; a second Ctrl-C ends at once.

        During a validation they are deferred to the end of the iteration after it. If the run is
        killed before that, it repeats the validation when it is resumed.
        """
        before = self._handlers = {}

        def on_signal(number: int, frame: Any) -> None:
            self.signal = number
            # A launcher forwards a signal that its whole group received: it may come twice.
            if number == signal.SIGINT and get_world_size() == 1:
                signal.signal(number, before[number])

        try:
            for each in (signal.SIGTERM, signal.SIGINT):
                before[each] = signal.signal(each, on_signal)
        except ValueError:  # not in the main thread
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def signals_end_at_once(self) -> Iterator[None]:
        """Lets SIGTERM and Ctrl-C do what they did before :meth:`handling_signals`: no iteration
        ends here."""
        deferring = {number: signal.signal(number, own) for number, own in self._handlers.items()}
        try:
            yield
        finally:
            for number, handler in deferring.items():
                signal.signal(number, handler)

    def stop_if_signalled(self, runner: Runner) -> None:
        """Saves and exits if SIGTERM or Ctrl-C was received.

        Raises:
            SystemExit: with 128 + the signal's number.
            WorkDirError: the work directory was deleted.
        """
        done, number = runner.iter + 1, self.signal or 0
        if runner.world_size > 1:
            if done >= self.due:
                now, (before, at) = time.monotonic(), self.since
                took = (now - at) / max(done - before, 1) if at else SYNC_SECONDS
                device = next(runner.model.parameters()).device
                seen = torch.tensor([float(number), took], device=device)
                all_reduce(seen, 'max')
                self.agreed, took = int(seen[0]), float(seen[1])
                self.due = done + max(1, min(SYNC_ITERATIONS, int(SYNC_SECONDS / max(took, 1e-9))))
                self.since = done, now
            number = self.agreed
        # No checkpoint contains accumulated gradients: wait for the optimizer's step.
        if not number or done % getattr(runner.optim_wrapper, '_accumulative_counts', 1):
            return
        if number == DELETED:
            self._save_lost(runner, done)
        # A checkpoint of the regular schedule is not removed by the next save.
        self.stopping = osp.basename(self.last_ckpt or '') != f'iter_{done}.pth'
        self._save(runner, self.out_dir, f'iter_{done}.pth', dict(epoch=runner.epoch, iter=done))
        runner.logger.warning(
            f'{signal.Signals(number).name} after iteration {done}: saved as '
            f'{osp.join(self.out_dir, f"iter_{done}.pth")}; the same command with --resume '
            'continues from it'
        )
        if runner.world_size > 1:
            barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + number)  # see exit.leave
        raise SystemExit(128 + number)

    def work_dir_is_lost(self) -> None:
        """Lets the run save and stop at the end of the iteration: its directory was deleted."""
        self.signal = DELETED

    def stop_if_lost(self, runner: Runner) -> None:
        """Saves a run whose directory was deleted during the last iteration."""
        lost = torch.tensor(float(self.signal == DELETED))
        if runner.world_size > 1:
            lost = lost.to(next(runner.model.parameters()).device)
            all_reduce(lost, 'max')
        if lost:
            self._save_lost(runner, runner.iter)

    def _save_lost(self, runner: Runner, done: int) -> NoReturn:
        path = osp.join(self.out_dir, f'iter_{done}.pth')
        self.stopping = True
        self._save(runner, self.out_dir, osp.basename(path), dict(epoch=runner.epoch, iter=done))
        raise WorkDirError(
            f'work_dir {runner.work_dir} was deleted while the run trained in it: it is made '
            f'again, and the state after iteration {done} is saved as {path}, from which the same '
            'command with --resume continues; what else was in it is gone'
        )


class ResumeHook(Hook):
    """Calls the checkpoint hook after all other hooks, before training and in each iteration."""

    priority = 'LOWEST'

    def __init__(self, checkpoints: ResumableCheckpointHook) -> None:
        self.checkpoints = checkpoints

    def before_train(self, runner: Runner) -> None:
        """Restores a resumed run; warns if no checkpoint will be written before the end."""
        hook, loop = self.checkpoints, runner.train_loop
        by_iter = isinstance(loop, IterBasedTrainLoop)
        total = loop.max_iters if by_iter or not hook.by_epoch else loop.max_epochs
        first = hook.save_begin or hook.interval
        if hook.interval <= 0 or first > total or (by_iter and hook.by_epoch):
            begin = f', save_begin={hook.save_begin}' if hook.save_begin else ''
            runner.logger.warning(
                f'default_hooks.checkpoint (by_epoch={hook.by_epoch}, interval={hook.interval}'
                f'{begin}) '
                f'writes {"ONE CHECKPOINT, AT THE END" if hook.save_last else "NO CHECKPOINT"}, '
                f'after {total} {"iterations" if by_iter or not hook.by_epoch else "epochs"}: a '
                'run that is killed before that is lost. Set '
                f'{"by_epoch=False and " if by_iter else ""}a smaller interval'
            )
        hook.restore(runner)
        if hook.earlier and is_main_process():
            fileio.put_text(hook.earlier, osp.join(runner.work_dir, UNSAVED))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Stops the run after a signal."""
        self.checkpoints.stop_if_signalled(runner)

    def after_train(self, runner: Runner) -> None:
        """Stops the run if its work directory was deleted after the last iteration."""
        self.checkpoints.stop_if_lost(runner)


class _Deferred:
    """A file backend that records what it should remove instead of removing it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.removed: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.removed.append(path)

    rmtree = remove


class _Advanced(_InfiniteDataloaderIterator):
    """Iterator of a resumed iteration-based loop, which would skip batches by loading them."""

    def __init__(
        self, loader: ResumableLoader, skipped: int, epoch: int, state: dict | None
    ) -> None:
        self._dataloader: Any = loader
        self._iterator: Any = None
        self._epoch, self.skipped, self.state = epoch, skipped, state

    def skip_iter(self, count: int) -> None:
        """How the maintained fork of MMEngine skips batches."""
        self.skipped -= count

    def __next__(self) -> Any:
        if self.skipped:
            self.skipped -= 1
            return None
        if self._iterator is None:
            if hasattr(self._dataloader.shuffler, 'set_epoch'):
                self._dataloader.shuffler.set_epoch(self._epoch)
            if self.state is not None:
                set_random_state(self.state)
            self._iterator = iter(self._dataloader)
        return super().__next__()


def settings(runner: Runner) -> dict[str, str]:
    """Hashes of the parts of the config, and of the teacher, that a resumed run may change."""
    cfg: Any = getattr(runner, 'cfg', None) or {}
    parts: dict[str, Any] = {}
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, dict) and isinstance(wrapper.get('optimizer'), dict):
        optimizer = dict(wrapper['optimizer'])
        parts['optim_wrapper.optimizer.type'] = optimizer.pop('type', None)
        parts['optim_wrapper.optimizer'] = [optimizer, wrapper.get('paramwise_cfg')]
    parts['param_scheduler'] = cfg.get('param_scheduler')
    model = cfg.get('model')
    if isinstance(model, dict):
        parts['model.distillation'] = model.get('distillation')
    teacher = getattr(unwrap(runner.model), 'teacher', None)
    if teacher is not None:
        parts['the teacher'] = teacher.digests
    found = {}
    for name, value in parts.items():
        text = json.dumps(value, sort_keys=True, default=_name)
        found[name] = short_sha256(text)
    return found


def _name(value: Any) -> str:
    return getattr(value, '__name__', type(value).__name__)


def _restore_patience(patience: Any, runner: Runner) -> None:
    """How long each early stopping has waited."""
    waiting = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
    for hook, kept in zip(waiting, patience if isinstance(patience, list) else [], strict=False):
        if isinstance(kept, dict) and type(kept.get('wait_count')) is int:
            hook.wait_count = kept['wait_count']
            if type(kept.get('best_score')) is float:
                hook.best_score = kept['best_score']


_FROM_FILE = ('optim_wrapper.optimizer', 'param_scheduler')


def _tell_changes(before: Any, now: dict[str, str], runner: Runner) -> None:
    if not isinstance(before, dict):
        return
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if kept := [name for name in changed if name in _FROM_FILE]:
        runner.logger.warning(
            f'{" and ".join(kept)} of the config ARE NOT USED: the run continues with the learning '
            'rate and schedule of the checkpoint, which differ. To train with those of the config, '
            'start from the weights of the checkpoint with load_from'
        )
    if new := [name for name in changed if name not in _FROM_FILE]:
        runner.logger.warning(
            f'{" and ".join(new)} differ from those of the checkpoint, and are used from here on'
        )


def _same_folder(one: str, other: str) -> bool:
    return osp.realpath(one or '.') == osp.realpath(other)


def _without_order(loader: Any) -> str | None:
    """The class whose order may not follow from the sampler's seed and epoch alone."""
    if not getattr(loader, 'skips', False):
        return type(loader).__name__
    known = (
        *(DefaultSampler, InfiniteSampler, SequentialSampler),
        *(MultiSourceSampler, MultiDataSampler, ClassAwareSampler),
    )
    kind = type(loader.shuffler)
    found = loader.shuffler is None or kind.__iter__ in [each.__iter__ for each in known]
    return None if found else kind.__name__


def _images_a_step(loader: Any) -> int | None:
    """Images in a batch of all processes; None if the batch size varies."""
    size = getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)
    return size * get_world_size() if type(size) is int else None


def latest_checkpoint(work_dir: str) -> str | None:
    """The last checkpoint of a work directory, or None.

    ``last_checkpoint`` names it. If that file names nothing that exists (MMEngine truncates it
    before writing, and a folder may be moved), the newest checkpoint in the folder is returned.
    """
    record = osp.join(work_dir, 'last_checkpoint')
    if osp.isfile(record):
        with open(record) as file:
            last = file.read().strip()
        named = [last, osp.join(work_dir, osp.basename(last))]
        # In a copied folder it names the original's checkpoint: then prefer the copy.
        if osp.isfile(osp.join(osp.dirname(last), 'last_checkpoint')):
            named.reverse()
        for path in named:
            if osp.isfile(path):
                return path
    if not osp.isdir(work_dir):
        return None
    found = [
        (int(match[1]), match[0])
        for name in os.listdir(work_dir)
        if (match := re.fullmatch(r'(?:epoch|iter)_(\d+)\.pth', name))
    ]
    return osp.join(work_dir, max(found)[1]) if found else None
