"""Runs that are cut off anywhere, and go on as if nothing had happened.

What MMEngine does not keep is kept here: the state of the random numbers of every process and of
its data-loader workers, and how many batches of the epoch have been seen. On a CPU a resumed run
then equals one that was never cut off, to the bit, with these exceptions: gradients that were being
accumulated (``accumulative_counts``) are lost; a schedule that follows a metric misses the step
that belongs to a validation it was cut off in; a worker's data set has what it was built with,
not what it has gathered since (the cache of ``CachedMosaic``, say); persistent workers that a hook
restarts (``PipelineSwitchHook``) draw on from where the old ones were, if the run was cut off just
before; a sampler that does not take its order from its seed and epoch begins anew, and is named;
hooks of one's own have what they keep in MMEngine's message hub alone; and of several processes all
but the first lose what DistributedDataParallel leaves to each: statistics of a BatchNorm that is
trained, so that its part of a validation differs.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import os.path as osp
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import mmengine.fileio as fileio
import torch
from mmdet.datasets.samplers import (
    ClassAwareSampler,
    MultiDataSampler,
    MultiSourceSampler,
)
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
from mmengine.model import is_model_wrapper
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, get_worker_info

from ..io.safe_reader import show
from .random_state import random_state, set_random
from .resume_compatibility import own_file, own_ids
from .save_best import check_save_best

KEY = 'mmkd_resume'
"""Where a checkpoint has it."""
AGREE = 10
"""At most so many iterations apart several processes agree on whether one was told to stop."""
AGREE_WITHIN = 5.0
"""And about so many seconds apart, if an iteration is not longer: torchrun waits for 30."""

MOST = 1024
"""How many times as many batches as iterations may have been passed, by smaller batches since."""

BEGUN = '.begun'
"""In a work directory with checkpoints of an earlier run, while this one has saved none."""

GRACE = 120
"""Seconds that a data-loader worker goes on after SIGTERM or Ctrl-C: an iteration and its save."""


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's, which never is without a whole checkpoint, and from which a run goes on exactly.

    What is older is removed when what is newer is on the disk, and ``last_checkpoint`` names a
    whole one at every moment. DistillationRunner takes it wherever a config says CheckpointHook.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.random: list[dict] = []
        self.offset = 0
        self.workers: list[list] = []
        self.heard: dict[int, bytes] = {}
        self.validated_at: int | None = None
        self.found: dict | None = None
        self.signal: int | None = None
        self.agreed = 0
        self.sampler_seed: int | None = None
        self.stopping = False
        self.stopped_as: str | None = None
        self.file_backend: Any = None
        self.data: Any = None
        self.earlier: str | None = None
        self.due = 1
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
        count = getattr(runner.train_loop.dataloader, 'num_workers', 0)
        # A worker's own bytes, of this machine: nothing that came from a file.
        workers = [
            pickle.loads(self.heard[i]) if i in self.heard else None  # noqa: S301
            for i in range(count)
        ]
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
            # Found from another folder too.
            record = path if '://' in path else osp.abspath(path)
            fileio.put_text(record, osp.join(runner.work_dir, 'last_checkpoint'))
            with contextlib.suppress(FileNotFoundError):
                os.remove(osp.join(runner.work_dir, BEGUN))
            if self.stopped_as not in (None, path):
                self._remove(self.stopped_as)
            self.stopped_as = None

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        missing = [name for name in self._chosen_by() if name not in metrics]
        if missing:
            runner.logger.warning(
                f'save_best={missing[0]} is not among what this validation gave '
                f'({", ".join(metrics)}): NO BEST CHECKPOINT is chosen by it'
            )
            return
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
        """The best checkpoint; a file written now need not be validated again."""
        self.validated_at = runner.iter
        super().after_val_epoch(runner, metrics)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds what a resumed run needs."""
        if 'optimizer' in checkpoint and self.random:
            checkpoint[KEY] = {
                'random': self.random,
                'workers': self.workers,
                'validated': checkpoint['meta'].get('iter') == self.validated_at,
                'sampler_seed': self.sampler_seed,
                'settings': settings(runner),
                **self._place(runner.train_loop, checkpoint['meta']),
                'stopped': self.stopping,
                'patience': [
                    {'wait_count': hook.wait_count, 'best_score': float(hook.best_score)}
                    for hook in runner.hooks
                    if isinstance(hook, EarlyStoppingHook)
                ],
            }

    # ---------------------------------------------------------------------------- going on

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Takes from the batch what the worker that made it has added."""
        loop = runner.train_loop
        if (
            self.heard
            and _begin_anew(loop.dataloader)
            and self._seen(loop) % len(loop.dataloader) == 0
        ):
            self.heard.clear()
        if isinstance(data_batch, dict) and KEY in data_batch:
            worker, state = data_batch.pop(KEY)
            self.heard[worker] = state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Takes what a resumed run needs."""
        if getattr(runner, '_resuming', None) is not None:
            found = checkpoint.get(KEY, {})
            self.found = found if isinstance(found, dict) else {}

    def before_train(self, runner: Runner) -> None:
        """As MMEngine's; a resumed run remembers the file that it came from.

        What a run that was killed in a save had not renamed is removed. A checkpoint names files
        that its run deletes: only those of this run's folder are believed.
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
            check_save_best(self._chosen_by(), getattr(runner.val_loop, 'evaluator', None))
            if runner.val_loop is None:
                runner.logger.warning(
                    f'save_best={", ".join(self.save_best)} waits for a validation, and this '
                    'config has none (val_dataloader): NO BEST CHECKPOINT will be written'
                )
        if is_main_process():
            for folder in {runner.work_dir, self.out_dir}:
                for partial in glob.glob(osp.join(glob.escape(folder), '*.[0-9]*.partial')):
                    os.remove(partial)
        if self.last_ckpt is None and getattr(runner, 'resumed_from', None):
            self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')

    def go_on(self, runner: Runner) -> None:
        """Put a resumed run where its checkpoint was written; called right before training."""
        found, self.found = self.found, None
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                prepare_workers(loop.dataloader)
                _reseed(loop.dataloader, runner.seed)
        sampler = _sampler(runner.train_loop.dataloader)
        if found is None:
            self.sampler_seed = getattr(sampler, 'seed', None)
            return
        if found.get('sampler_seed') is not None and hasattr(sampler, 'seed'):
            # MMEngine builds the sampler before it reads the seed of a run that was given none.
            sampler.seed = found['sampler_seed']
        self.sampler_seed = getattr(sampler, 'seed', None)
        if found.get('stopped') and _same_folder(osp.dirname(runner.resumed_from), self.out_dir):
            self.stopped_as = osp.join(self.out_dir, osp.basename(runner.resumed_from))
        waiting = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
        patience = found.get('patience')
        for hook, kept in zip(
            waiting, patience if isinstance(patience, list) else [], strict=False
        ):
            if isinstance(kept, dict) and type(kept.get('wait_count')) is int:
                hook.wait_count = kept['wait_count']
                if type(kept.get('best_score')) is float:
                    hook.best_score = kept['best_score']
        states = found.get('random') or []
        state = states[get_rank()] if len(states) == runner.world_size else None
        if state is None:
            runner.logger.warning(
                f'the checkpoint has the random numbers of {len(states)} processes and this run '
                f'has {runner.world_size}: it goes on from the same weights with other random '
                'numbers'
            )
        loop = runner.train_loop
        self._go_to(loop, found, runner)
        _tell_changes(found.get('settings'), settings(runner), runner)
        if loop._iter and not _repeats(loop.dataloader):
            runner.logger.warning(
                f'{type(_sampler(loop.dataloader)).__name__} may take its order from what is not '
                'put back: in the epoch that is gone on with, images may come twice or not at all'
            )
        seen = self._seen(loop)
        drawn = self._workers(found, loop, runner)
        _restore(state)
        if isinstance(loop, IterBasedTrainLoop):
            due, at = loop._iter, loop.max_iters
        else:
            due, at = loop._epoch, loop.max_epochs
        if due >= at:
            runner.logger.warning(
                f'the checkpoint is at {due} of {at} that train_cfg asks for: NOTHING IS TRAINED. '
                'To go on, ask for more; to begin anew, drop --resume'
            )
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
        if seen or drawn or (loop._iter and isinstance(loop, IterBasedTrainLoop)):
            _skip(loop, seen, random_state() if state is not None else None, self._anew(loop))

    def _seen(self, loop: Any) -> int:
        """How many batches of this epoch, or of an iteration-based run, are behind it."""
        if isinstance(loop, IterBasedTrainLoop):
            return loop._iter - self.offset
        return loop._iter - loop._epoch * len(loop.dataloader) - self.offset

    def _place(self, loop: Any, meta: dict) -> dict[str, int | None]:
        """Where in its epoch, or in its stream of images, a run is as it saves."""
        if isinstance(loop, IterBasedTrainLoop):
            return {'seen': meta['iter'] - self.offset, 'images': _images_a_step(loop.dataloader)}
        length = len(loop.dataloader)
        return {'seen': meta['iter'] - meta['epoch'] * length - self.offset, 'length': length}

    def _go_to(self, loop: Any, found: dict, runner: Runner) -> None:
        """An epoch may have more or fewer batches than where the checkpoint was written."""
        if isinstance(loop, IterBasedTrainLoop):
            seen, of, now = found.get('seen'), found.get('images'), _images_a_step(loop.dataloader)
            if type(of) is not int or not now:
                of = now = 1
            if type(seen) is not int or not 0 <= seen * of <= MOST * loop._iter * now:
                seen, of = loop._iter, now  # of MMEngine's, or forged: each is taken one by one
            if now != of:
                there, seen = seen, round(seen * of / now)
                runner.logger.warning(
                    f'the checkpoint was written after {there} batches of {of} images, and here a '
                    f'batch of all processes has {now}: it goes on behind {seen} of them'
                )
            self.offset = loop._iter - seen
            return
        length = len(loop.dataloader)
        counted = loop._iter - loop._epoch * length
        seen, of = found.get('seen', counted), found.get('length', length)
        if 'length' not in found and loop._epoch and loop._iter % loop._epoch == 0:
            seen, of = 0, loop._iter // loop._epoch  # MMEngine's, most likely at an epoch's end
        if type(seen) is not int or type(of) is not int or of != length or not 0 <= seen <= of:
            known = type(seen) is int and type(of) is int and 0 < seen <= of
            there, seen = (seen, of), round(seen / of * length) if known else 0
            runner.logger.warning(
                f'the checkpoint was written at batch {show(there[0])} of an epoch of '
                f'{show(there[1])}, and '
                f'here an epoch has {length}: other data, another batch size or another number of '
                f'processes. Epoch {loop._epoch + 1} '
                + (f'goes on behind batch {seen} of {length}' if seen else 'is run as a whole')
            )
        self.offset = counted - seen

    def _anew(self, loop: Any) -> Any:
        """A batch sampler of which nothing was taken: what MMEngine starts early takes from it."""
        config = self.data if isinstance(loop, IterBasedTrainLoop) else None
        if not isinstance(config, dict) or not isinstance(config.get('sampler'), dict):
            return None
        default = dict(dataset=loop.dataloader.dataset, seed=self.sampler_seed)
        sampler = DATA_SAMPLERS.build(config['sampler'], default_args=default)
        size = config.get('batch_size', 1)
        if not config.get('batch_sampler'):
            return BatchSampler(sampler, size, config.get('drop_last', False))
        default = dict(sampler=sampler, batch_size=size)
        return DATA_SAMPLERS.build(config['batch_sampler'], default_args=default)

    def _workers(self, found: dict, loop: Any, runner: Runner) -> dict[int, dict]:
        """Lets the workers draw on where those of the checkpoint were; what each has drawn."""
        loader = loop.dataloader
        count = getattr(loader, 'num_workers', 0)
        if not count or (_begin_anew(loader) and self._seen(loop) % len(loader) == 0):
            return {}
        workers = found.get('workers') or []
        own = workers[get_rank()] if len(workers) == runner.world_size else []
        if len(own) != count:
            runner.logger.warning(
                f'the checkpoint has the random numbers of {len(own)} data-loader workers and '
                f'this run has {count}: they draw others'
            )
            return {}
        states = loader.worker_init_fn.args[1]
        states.update({i: state for i, state in enumerate(own) if state is not None})
        self.heard = {i: pickle.dumps(state) for i, state in states.items()}
        return states

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
            if done >= self.due:
                now, (before, at) = time.monotonic(), self.since
                took = (now - at) / max(done - before, 1) if at else AGREE_WITHIN
                device = next(runner.model.parameters()).device
                told = torch.tensor([float(number), took], device=device)
                all_reduce(told, 'max')
                self.agreed, took = int(told[0]), float(told[1])
                self.due = done + max(1, min(AGREE, int(AGREE_WITHIN / max(took, 1e-9))))
                self.since = done, now
            number = self.agreed
        # Gradients that are being accumulated are in no checkpoint.
        if not number or done % getattr(runner.optim_wrapper, '_accumulative_counts', 1):
            return
        # One written by the schedule at this iteration is kept as long as the schedule says.
        self.stopping = osp.basename(self.last_ckpt or '') != f'iter_{done}.pth'
        self._save(runner, self.out_dir, f'iter_{done}.pth', dict(epoch=runner.epoch, iter=done))
        runner.logger.warning(
            f'{signal.Signals(number).name} after iteration {done}: saved as '
            f'{osp.join(self.out_dir, f"iter_{done}.pth")}; the same command with --resume '
            'goes on there'
        )
        if runner.world_size > 1:
            barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + number)  # see exit.leave
        raise SystemExit(128 + number)


class GoOnHook(Hook):
    """Calls the checkpoint hook last of all, before training and after each iteration."""

    priority = 'LOWEST'

    def __init__(self, checkpoints: WholeCheckpointHook) -> None:
        self.checkpoints = checkpoints

    def before_train(self, runner: Runner) -> None:
        """Goes on where the checkpoint was written; says where none would be."""
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
                'run that is killed before is lost. Set '
                f'{"by_epoch=False and " if by_iter else ""}an interval that is smaller'
            )
        hook.go_on(runner)
        if hook.earlier and is_main_process():
            fileio.put_text(hook.earlier, osp.join(runner.work_dir, BEGUN))

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
    """A batch sampler that, the first time, begins behind the batches that were seen.

    Where workers persist, a later epoch's beginning draws no number; the first time does.

    Workers take turns, so that the next batch is not the first one's: before it comes an empty
    batch for each worker that is not due yet.
    """

    def __init__(self, batches: Any, seen: int, state: dict | None, empty: int) -> None:
        self.batches, self.seen, self.state, self.empty = batches, seen, state, empty
        self.first = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        indices = iter(self.batches)
        if self.first:
            self.first = False
            for _ in range(self.seen):
                next(indices, None)
            # Making the data loader's iterator has drawn a number.
            _restore(self.state)
            yield from [[]] * self.empty
        yield from indices


class _Advanced:
    """Stands for the iterator of an iteration-based loop, which MMEngine advances by loading."""

    def __init__(self, loader: DataLoader, seen: int, left: int, state: dict | None) -> None:
        self.loader, self.left, self.state, self.seen = loader, left, state, seen
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
            if loader.persistent_workers and loader._iterator is not None:
                # Those that MMEngine started as it made the loop.
                loader._iterator._shutdown_workers()
                loader._iterator = None
            if not _is_endless(sampler):
                epoch, seen = divmod(self.seen, len(loader))
                if hasattr(sampler, 'set_epoch'):
                    sampler.set_epoch(epoch)
            empty = 0
            if seen or loader.persistent_workers:
                empty = _begin_behind(loader, seen, self.state)
            else:
                _restore(self.state)
            self.iterator = _InfiniteDataloaderIterator(loader)
            self.iterator._epoch = epoch
            batches = [next(self.iterator) for _ in range(empty + 1)]
            _started(loader)
            return batches[-1]
        return next(self.iterator)


def settings(runner: Runner) -> dict[str, str]:
    """What a resumed run may have been given otherwise: part of the config to digits of its hash.

    The teacher's are those of its tensors.
    """
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
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    teacher = getattr(model, 'teacher', None)
    if teacher is not None:
        parts['the teacher'] = teacher.digests
    found = {}
    for name, value in parts.items():
        text = json.dumps(value, sort_keys=True, default=_name)
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def _name(value: Any) -> str:
    return getattr(value, '__name__', type(value).__name__)


_FROM_FILE = ('optim_wrapper.optimizer', 'param_scheduler')


def _tell_changes(before: Any, now: dict[str, str], runner: Runner) -> None:
    if not isinstance(before, dict):
        return
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if kept := [name for name in changed if name in _FROM_FILE]:
        runner.logger.warning(
            f'{" and ".join(kept)} of the config ARE NOT USED: the run goes on with the learning '
            'rate and schedule of the checkpoint, which was written with others. To train with '
            "the config's, start from its weights with load_from"
        )
    if new := [name for name in changed if name not in _FROM_FILE]:
        runner.logger.warning(
            f'{" and ".join(new)} differ from those of the checkpoint, and are used from here on'
        )


def _same_folder(one: str, other: str) -> bool:
    return osp.realpath(one or '.') == osp.realpath(other)


def _sampler(loader: Any) -> Any:
    """The one that shuffles: MMEngine gives it to the batch sampler."""
    return getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)


def _is_endless(sampler: Any) -> bool:
    """Whether it has one stream, whatever the epoch."""
    return isinstance(sampler, (InfiniteSampler, MultiSourceSampler))


def _repeats(loader: Any) -> bool:
    """Whether its order is that of its seed and epoch alone."""
    sampler = _sampler(loader)
    known = (
        *(DefaultSampler, InfiniteSampler, SequentialSampler),
        *(MultiSourceSampler, MultiDataSampler, ClassAwareSampler),
    )
    return sampler is None or type(sampler).__iter__ in [each.__iter__ for each in known]


def _images_a_step(loader: Any) -> int | None:
    """Of all processes; None where batches have sizes of their own."""
    size = getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)
    return size * get_world_size() if type(size) is int else None


def prepare_workers(loader: Any, tell: bool = False) -> None:
    """Workers that outlive a signal to all processes, and may say where their random numbers are.

    A cluster and a terminal send one; the run needs its workers until the end of its iteration.

    Args:
        loader: not yet iterated.
        tell: each batch, if it is a dict, comes with the number of its worker and the state of the
            generators that it is going on with; the hook takes it out before the step.
    """
    if not getattr(loader, 'num_workers', 0):
        return
    init = loader.worker_init_fn
    if isinstance(init, functools.partial) and init.func is _start_worker:
        return
    loader.worker_init_fn = functools.partial(_start_worker, init, {})
    if tell:
        loader.collate_fn = functools.partial(_collate, loader.collate_fn)


def _reseed(loader: Any, seed: int) -> None:
    """MMEngine gives workers their seed before it reads that of a resumed run."""
    if getattr(loader, 'num_workers', 0):
        init = loader.worker_init_fn.args[0]
        if isinstance(init, functools.partial) and 'seed' in init.keywords:
            init.keywords['seed'] = seed


def _begin_anew(loader: Any) -> bool:
    """Whether each epoch has workers of its own."""
    return not _is_endless(_sampler(loader)) and not getattr(loader, 'persistent_workers', False)


def _start_worker(init: Callable[[int], None] | None, states: dict[int, dict], worker: int) -> None:
    def told(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second, a loader that ends it, does
        signal.alarm(GRACE)  # so does time: two that come at once are heard as one

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, told)
    if init is not None:
        init(worker)
    _restore(states.get(worker))


def _collate(collate: Callable[[list], Any], samples: list) -> Any:
    if not samples:
        return None
    batch, worker = collate(samples), get_worker_info()
    if isinstance(batch, dict) and worker is not None:
        batch[KEY] = worker.id, pickle.dumps(random_state(cuda=False))
    return batch


def _started(loader: DataLoader) -> None:
    """Workers that start from now on, for another epoch, begin anew."""
    if loader.num_workers:
        loader.worker_init_fn.args[1].clear()


def _begin_behind(loader: DataLoader, seen: int, state: dict | None) -> int:
    """Lets a loader begin behind what was seen; the number of empty batches that come first."""
    told = isinstance(loader.collate_fn, functools.partial) and loader.collate_fn.func is _collate
    empty = seen % loader.num_workers if told else 0
    # DataLoader lets nobody else set it.
    object.__setattr__(loader, 'batch_sampler', _Rest(loader.batch_sampler, seen, state, empty))
    return empty


def _restore(state: dict | None) -> None:
    if state is not None:
        set_random(state)


def _skip(loop: Any, seen: int, state: dict | None, anew: Any) -> None:
    loader = loop.dataloader
    if getattr(loader, 'batch_sampler', None) is None:
        return  # a loader of one's own begins anew
    if isinstance(loop, IterBasedTrainLoop):
        if anew is not None:
            # DataLoader lets nobody else set it.
            if loader.sampler is loader.batch_sampler.sampler:
                object.__setattr__(loader, 'sampler', anew.sampler)
            object.__setattr__(loader, 'batch_sampler', anew)
        elif isinstance(_sampler(loader), InfiniteSampler):
            _sampler(loader).indices = _sampler(loader)._indices_of_rank()
        # The loop advances it by as many as it has iterations behind it.
        loop.dataloader_iterator = _Advanced(loader, seen, loop._iter, state)
        return
    empty = _begin_behind(loader, seen, state)
    run_iter, run_epoch = loop.run_iter, loop.run_epoch

    def counted(index: int, batch: Any) -> None:
        _started(loader)
        if index >= empty:
            run_iter(index - empty + seen, batch)

    def first() -> None:
        run_epoch()
        del loop.run_iter, loop.run_epoch

    loop.run_iter, loop.run_epoch = counted, first


def latest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint to go on from, or None where there is none.

    MMEngine empties ``last_checkpoint`` before it writes it, and a run killed just then, or moved
    elsewhere since, leaves a file that names nothing: then it is the newest of those beside it.
    """
    record = osp.join(work_dir, 'last_checkpoint')
    if osp.isfile(record):
        with open(record) as file:
            last = file.read().strip()
        named = [last, osp.join(work_dir, osp.basename(last))]
        # In a folder that was copied it names the original's, which has a record beside it.
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
