"""A data loader that starts anywhere in an epoch, and whose workers end with their run.

torchdata's StatefulDataLoader cannot take its place: it holds no random state of its workers, sends
what state a data set has through the workers' pipe with each batch, and replaces PyTorch's samplers
for the whole process when it is imported.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from typing import Any, NamedTuple

import torch
from mmdet.datasets.samplers import MultiSourceSampler
from mmengine.dataset import InfiniteSampler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .random_state import random_state, set_random_state

WORKER_GRACE = 120
"""Seconds a data-loader worker lives after SIGTERM or Ctrl-C: time for an iteration and a save."""


_LOADERS: weakref.WeakSet[ResumableLoader] = weakref.WeakSet()


class Delivery(NamedTuple):
    """A batch, the worker that loaded it, and that worker's random state after it, pickled.

    A tensor goes through shared memory. The pipe that everything else goes through has room for
    64 KB, and a worker that finds it full has to wait.
    """

    batch: Any
    worker: int
    state: Tensor


class ResumableLoader(DataLoader):
    """A DataLoader that a run can resume in mid-epoch.

    Args:
        loader: the one that it replaces: a plain DataLoader that was not iterated yet.
    """

    worker_init_fn: Any
    collate_fn: Any
    reports = False
    """Whether each batch comes with the random state of its worker."""
    waits = False
    """Whether an epoch begins with its first batch, not when the loader is iterated."""
    begun = 0
    """Batches of this epoch that were used before the run was resumed."""

    def __init__(self, loader: DataLoader) -> None:
        self.__dict__.update(loader.__dict__)
        self._start: tuple[int, dict | None] | None = None
        self._states: dict[int, dict | Tensor] = {}
        self._iterators: weakref.WeakSet = weakref.WeakSet()
        self._others = _temporary_folder()
        _LOADERS.add(self)

    @property
    def shuffler(self) -> Any:
        """The sampler that shuffles, which is inside the batch sampler."""
        return getattr(self.batch_sampler, 'sampler', None)

    @property
    def skips(self) -> bool:
        """Whether it loads batches of indices, which can be skipped."""
        return self.batch_sampler is not None and not isinstance(self.dataset, IterableDataset)

    @property
    def endless(self) -> bool:
        """Whether the sampler yields one stream without epochs."""
        return isinstance(self.shuffler, (InfiniteSampler, MultiSourceSampler))

    @property
    def restarts_workers(self) -> bool:
        """Whether each epoch starts new workers."""
        return not self.endless and not self.persistent_workers

    def resume(self, seen: int, state: dict | None, workers: dict[int, dict]) -> None:
        """Lets the next epoch start after ``seen`` batches.

        Args:
            seen: number of batches.
            state: random state of this process before the next one; None leaves it as it is.
            workers: random states of workers; those of the others follow from their seeds.
        """
        self._start, self._states = (seen, state), {**workers}

    def worker_states(self) -> list[dict | None]:
        """Random state of each worker after its last batch; None if it has delivered none."""
        return [
            # Safe to unpickle: these bytes come from our own workers, not from a file.
            pickle.loads(state.numpy().tobytes()) if isinstance(state, Tensor) else state  # noqa: S301
            for state in map(self._states.get, range(self.num_workers))
        ]

    def end_workers(self) -> None:
        """Ends the workers; the loader can be used again.

        Python's exit handlers send each live worker two SIGTERM and wait for it. A worker ignores
        the first, and two that are pending together count as one, so the process would wait long.
        """
        self._iterator = None
        for iterator in list(self._iterators):
            iterator._shutdown_workers()

    def __iter__(self) -> Any:
        if self.waits:
            return itertools.chain.from_iterable([self])
        self.begun = self._start[0] if self._start else 0
        return self._batches(super().__iter__(), self._states)

    def _batches(self, delivered: Iterator, states: dict) -> Iterator:
        for batch in delivered:
            if isinstance(batch, Delivery):
                states[batch.worker] = batch.state
                self._states, batch = states, batch.batch
                if batch is None:
                    continue
            yield batch

    @property
    def _index_sampler(self) -> Any:
        # Given as batch_sampler, it would hide batch_size and sampler from hooks.
        batches: Any = super()._index_sampler
        return _Rest(batches, self) if self._start else batches

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        init, collate = self.worker_init_fn, self.collate_fn
        self._states = self._states if self._start else {}
        self.worker_init_fn = functools.partial(_start_worker, init, {**self._states}, self._others)
        self.collate_fn = functools.partial(_collate, collate, self.reports)
        try:
            iterator = super()._get_iterator()
        finally:
            self.worker_init_fn, self.collate_fn = init, collate
        self._iterators.add(iterator)
        return iterator


@atexit.register
def _end_all_workers() -> None:
    for loader in list(_LOADERS):
        loader.end_workers()


class _Rest:
    """What is left of the batches of the epoch that is resumed; those of later epochs."""

    def __init__(self, batches: Any, loader: ResumableLoader) -> None:
        self.batches, self.loader = batches, loader

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        # PyTorch calls this twice, and uses the second.
        indices, start = iter(self.batches), self.loader._start
        if start:
            self.loader._start, (seen, state) = None, start
            for _ in range(seen):
                next(indices, None)
            if state is not None:
                set_random_state(state)
            # Workers take turns: those whose turn was before get an empty batch.
            yield from [[]] * (seen % (self.loader.num_workers or 1))
        yield from indices


def _collate(collate: Callable[[Any], Any], report: bool, samples: Any) -> Any:
    batch = None if isinstance(samples, list) and not samples else collate(samples)
    if not report:
        return batch
    state = bytearray(pickle.dumps(random_state(cuda=False)))
    worker: Any = get_worker_info()
    return Delivery(batch, worker.id, torch.frombuffer(state, dtype=torch.uint8))


def _start_worker(
    init: Callable[[int], None] | None, states: dict[int, dict], others: str | None, worker: int
) -> None:
    """Starts a worker that outlives the first SIGTERM, but not its run.

    A cluster or a terminal signals all processes at once, but the run needs its workers until the
    end of the iteration.
    """

    def on_signal(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second SIGTERM, of a loader that shuts down
        signal.alarm(WORKER_GRACE)  # two SIGTERM that are pending together count as one

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, on_signal)
    threading.Thread(target=_end_with_run, args=(os.getppid(), others), daemon=True).start()
    if init is not None:
        init(worker)
    if worker in states:
        set_random_state(states[worker])


def _end_with_run(starter: int, others: str | None) -> None:
    """Ends this process soon after the run, or the process that started this one, has ended.

    PyTorch's worker notices that too, but waits until all it sent has been read. If the pipe is
    full that is never, since the worker itself keeps the end that is read open.
    """
    run: Any = multiprocessing.parent_process()
    while run.is_alive() and os.getppid() == starter:
        time.sleep(1)
    # os._exit() would leave behind the folder of the sockets that pass shared memory. The lock
    # waits for a folder that is being made; an older one may still be in use by a live process,
    # and stays.
    sharer: Any = resource_sharer
    sharer._resource_sharer._lock.acquire(timeout=5)
    folder = _temporary_folder()
    if folder not in (None, others):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _temporary_folder() -> Any:
    """That of multiprocessing, if it has made one; children inherit it."""
    process: Any = multiprocessing.current_process()
    return process._config.get('tempdir')
