"""Fails every single file operation of every save of a run in turn, and resumes the run.

    python benchmarks/reliability/saves.py --json saves.json

Each operation (open, write, flush, fsync, rename, sync of the folder, remove) fails as a broken
disk (EIO) and a full one (ENOSPC) fail, a write also after half of its bytes, and the process is
killed (SIGKILL) right before it and, for a write, in its middle. Lost is a case in which the run
did not end with an error, or left no whole checkpoint where there was one, or a last_checkpoint
that names none, or did not go on to the bit once the fault was gone.
"""

import argparse
import errno
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(Path(__file__).resolve().parent)]

import test_resume as runs  # noqa: E402
from campaign import report  # noqa: E402
from kills import prepare, whole  # noqa: E402

import mmkd.io.checkpoint  # noqa: E402

SETTINGS = [
    dict(loop='epoch', score=True),
    dict(loop='epoch', every=2, ema=True),
    dict(loop='iter', every=3, infinite=True, score=True),
]
FAULTS = ('EIO', 'ENOSPC', 'kill')
WRITE_FAULTS = (*FAULTS, 'half, then ENOSPC', 'half, then kill')


class Disk:
    """Counts the file operations of saves; the one of the given number fails."""

    def __init__(self, log: Path, fails: int | None = None, fault: str = '') -> None:
        self.log, self.fails, self.fault, self.count = log, fails, fault, 0
        real = (os.open, os.fsync, os.close, os.replace, os.remove)
        self.open, self.fsync, self.close, self.replace, self.remove = (
            self.failing(operation) for operation in real
        )
        # mmkd.io.checkpoint opens and syncs; MMEngine's backend and the checkpoint hook remove.
        mmkd.io.checkpoint.os = self
        mmkd.io.checkpoint.open = self.open_file
        os.remove = self.remove

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def step(self, name: str, half: Any = None) -> None:
        number, self.count = self.count, self.count + 1
        if self.fails is None:
            with open(self.log, 'a') as log:
                log.write(f'{name}\n')
        if number != self.fails:
            return
        if self.fault.startswith('half'):
            half()
        if self.fault.endswith('kill'):
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.fault.split()[-1])
        raise OSError(code, os.strerror(code))

    def failing(self, operation: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.step(operation.__name__)
            return operation(*args, **kwargs)

        return called

    def open_file(self, path: Any, mode: str = 'r', **kwargs: Any) -> Any:
        if 'w' not in mode:
            return open(path, mode, **kwargs)
        self.step('open for writing')
        return File(self, open(path, mode, **kwargs))


class File:
    def __init__(self, disk: Disk, file: Any) -> None:
        self.disk, self.file = disk, file

    def __enter__(self) -> 'File':
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, data: bytes) -> None:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.disk.step('write', half)
        self.file.write(data)

    def flush(self) -> None:
        self.disk.step('flush')
        self.file.flush()


def forked(folder: Path, setting: dict, *disk: Any) -> int:
    """Trains in a child on a disk that counts or fails; returns its exit status."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        status = 1
        try:
            setting = dict(setting)
            if setting.pop('score', False):
                setting['score'] = runs.Score()
            runner = runs.runner(folder, resume=True, **setting)
            if disk:
                Disk(*disk)
            runner.train()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def case(folder: Path, setting: dict, reference: dict, first_save: int, *disk: Any) -> str | None:
    """What is wrong after one fault."""
    _, fails, fault = disk
    status = forked(folder, setting, *disk)
    if status == 0:
        return 'the run did not say that a file operation failed'
    if (status == -signal.SIGKILL) != fault.endswith('kill'):
        return f'the run ended with {status}'
    if fails >= first_save and not (folder / 'last_checkpoint').exists():
        return 'no checkpoint is left'
    if (wrong := whole(folder)) is not None:
        return wrong
    status = forked(folder, setting)
    if status != 0:
        return f'the resumed run ended with {status}'
    try:
        runs.assert_equal(reference, runs.last(folder))
    except AssertionError as error:
        return f'differs: {error}'
    partial = [path.name for path in folder.glob('*.partial')]
    return f'{partial} are left' if partial else None


def by_operation(rows: list[list]) -> list[dict]:
    """One row for each setting and kind of operation, and one for each case that was lost."""
    counts: dict[tuple, int] = {}
    for index, _, operation, _, _ in rows:
        counts[index, operation] = counts.get((index, operation), 0) + 1
    table = [
        {'setting': str(SETTINGS[index]), 'operation': operation, 'tried': count, 'wrong': None}
        for (index, operation), count in counts.items()
    ]
    return table + [
        {
            'id': f'{SETTINGS[index]}, operation {number} ({operation}), {fault}',
            'said': wrong,
            'wrong': wrong,
        }
        for index, number, operation, fault, wrong in rows
        if wrong
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description='Fails each file operation of each save')
    parser.add_argument('--every', type=int, default=1, help='only each so-manieth operation')
    parser.add_argument('--json')
    args = parser.parse_args()
    prepare()
    start = time.perf_counter()
    base = Path(tempfile.mkdtemp(prefix='mmkd-saves-'))
    rows = []
    for index, setting in enumerate(SETTINGS):
        log = base / f'operations-{index}'
        if forked(base / f'whole-{index}', setting, log) != 0:
            raise RuntimeError(f'{setting} does not train')
        reference = runs.last(base / f'whole-{index}')
        operations = log.read_text().split('\n')[:-1]
        # Two files have been renamed: the checkpoint, and last_checkpoint that names it.
        first_save = [n for n, name in enumerate(operations) if name == 'replace'][1] + 1
        for number in range(0, len(operations), args.every):
            for fault in WRITE_FAULTS if operations[number] == 'write' else FAULTS:
                wrong = case(
                    base / f'run-{len(rows)}', setting, reference, first_save, log, number, fault
                )
                rows.append([index, number, operations[number], fault, wrong])
                if wrong:
                    print(f'LOST {rows[-1]}', flush=True)
            print(f'{setting}: operation {number + 1} of {len(operations)}', flush=True)
    lost = sum(row[-1] is not None for row in rows)
    kinds = sorted({row[2] for row in rows})
    notes = [
        f'{len({(row[0], row[1]) for row in rows})} file operations '
        f'({", ".join(kinds)}) of the saves of {len(SETTINGS)} runs, each failed in '
        f'{len(FAULTS)} ways and a write in {len(WRITE_FAULTS)}'
    ]
    return report('saves', len(rows), lost, start, notes, by_operation(rows), args.json)


if __name__ == '__main__':
    sys.exit(main())
