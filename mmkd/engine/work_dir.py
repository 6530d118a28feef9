"""The work directory: it can be written, and no other run trains in it."""

import contextlib
import errno
import fcntl
import io
import os
import os.path as osp
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from .exit import stop

ROOM = 2**20
"""Bytes that the work directory must take before a network is built: log, configs, curves."""


@contextlib.contextmanager
def reporting_full_disk(work_dir: str) -> Iterator[None]:
    """What is written in this block goes to ``work_dir``, or to no named file.

    Raises:
        SystemExit: There is no room left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Only some errors name a file; semaphores of data-loader workers, for one, are elsewhere.
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
    """Write something to the work directory, before a network is built.

    Raises:
        SystemExit: It cannot be made or written.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        _stop_unwritten(path, error)


_RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}


@contextlib.contextmanager
def locked(work_dir: str, launcher: str = 'none') -> Iterator[None]:
    """In this block no other job trains in ``work_dir``: they would delete each other's files.

    The first process of a job holds the folder by a lock, which the system takes back when the
    process ends, killed or not. A file system without locks is passed over.

    Raises:
        SystemExit: Another process has it.
    """
    first = os.environ.get(_RANKS.get(launcher, ''), '0') == '0'
    with contextlib.ExitStack() as stack:
        # What cannot be written is left to check_work_dir().
        with contextlib.suppress(OSError):
            if first:
                os.makedirs(work_dir, exist_ok=True)
                path = osp.join(work_dir, '.training')
                _lock(stack.enter_context(open(path, 'ab+', buffering=0)), work_dir)
        yield


def _lock(file: io.FileIO, work_dir: str) -> None:
    try:
        # Not flock: the workers of a data loader would hold that too, and may outlive a kill.
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
