"""Kills runs at random moments, resumes them until they end, and compares with one never killed.

    python benchmarks/reliability/kills.py --kills 200 --json kills.json

The runs are small (tests/test_resume.py: a network that draws random numbers over data that does),
so that a moment is as often in a save as between two; each is a process of its own, forked from one
that has imported everything. A run is lost when it cannot be resumed, or when its final weights,
optimizer, schedule, EMA or random numbers differ in one bit. At every kill, what last_checkpoint
names must be whole, and no process and no temporary file may be left: a save that was cut off is
removed when the run is resumed, and the rest is gone seconds after the kill.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

SHARED = '/dev/shm'
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import test_resume as runs  # noqa: E402
import torch._dynamo  # noqa: E402, F401
from campaign import report  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from mmkd.engine.exact_resume import latest_checkpoint  # noqa: E402
from mmkd.io.checkpoint import install, read_checkpoint  # noqa: E402

SETTINGS = [
    dict(loop='epoch'),
    dict(loop='epoch', every=2, workers=2, noted=True),
    dict(loop='iter', every=2, infinite=True, workers=2, persistent=True, noted=True),
    dict(loop='epoch', every=2),
    dict(loop='epoch', ema=True),
    dict(loop='epoch', score=True),
    dict(loop='iter', every=2, infinite=True),
    dict(loop='iter', every=3, infinite=True, ema=True, score=True),
    dict(loop='epoch', every=2, workers=2),
    dict(loop='epoch', every=3, workers=2, persistent=True, ema=True),
    dict(loop='iter', every=3, infinite=True, workers=2),
]


def prepare() -> None:
    """Takes out of the children's start what would be most of their time: no save is in it.

    An optimizer imports torch._dynamo, above; a runner asks compilers for their version.
    """
    install()
    Runner._log_env = lambda self, env: None


class Slow(runs.Hook):
    """Steps that last, so that not all kills fall into the start."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        time.sleep(0.01)


def train(folder: Path, setting: dict) -> None:
    setting = dict(setting)
    if setting.pop('score', False):
        setting['score'] = runs.Score()
    if setting.pop('noted', False):  # batches that fill the pipes of their workers
        setting['data'] = runs.Noted()
    runs.runner(folder, resume=True, cut=Slow(), **setting).train()


def forked(folder: Path, setting: dict, kill_after: float | None) -> tuple[int | None, list[str]]:
    """Trains in a child, in a process group of its own.

    Returns:
        Its exit status, None if it was killed; and what is left of it, processes and files.
    """
    shared, before = set(os.listdir(SHARED)), set(os.listdir(tempfile.gettempdir()))
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        status = 1
        try:
            train(folder, setting)
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [f'process {pid}' for pid in runs.left_of(child, 10)]
    # PyTorch names shared memory after the process that made it.
    left += [name for name in os.listdir(SHARED) if f'_{child}_' in name and name not in shared]
    temporary = set(os.listdir(tempfile.gettempdir())) - before
    left += [name for name in temporary if 'torchinductor' not in name]
    if status == 0:
        left += [path.name for path in folder.glob('*.partial')]
    return None if status == -signal.SIGKILL else status, left


def whole(folder: Path) -> str | None:
    """What is wrong with the checkpoints that a kill has left."""
    record = folder / 'last_checkpoint'
    if record.exists():
        try:
            read_checkpoint(record.read_text())
        except (OSError, ValueError) as error:
            return f'last_checkpoint: {error}'
    elif list(folder.glob('*.pth')) and latest_checkpoint(str(folder)) is None:
        return 'no checkpoint is found'
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description='Kills runs and resumes them')
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json')
    args = parser.parse_args()
    prepare()
    draw, start = random.Random(args.seed), time.perf_counter()
    base = Path(tempfile.mkdtemp(prefix='mmkd-kills-'))
    (base / 'tmp').mkdir()
    tempfile.tempdir = os.environ['TMPDIR'] = str(base / 'tmp')
    references, rows, kills, number, unfinished = {}, [], 0, 0, 0
    while kills < args.kills:
        index = number % len(SETTINGS)
        setting = SETTINGS[index]
        if index not in references:
            folder = base / f'whole-{index}'
            begun = time.monotonic()
            if forked(folder, setting, None) != (0, []):
                raise RuntimeError(f'{setting} does not train')
            references[index] = (runs.last(folder), time.monotonic() - begun)
        reference, lasts = references[index]
        folder, killed, wrong = base / f'run-{number}', 0, None
        while wrong is None:
            # After a few kills it may end, lest each dies before its first save.
            kill_after = None if killed >= 4 else draw.uniform(0, lasts)
            status, left = forked(folder, setting, kill_after)
            if left:
                wrong = f'left: {", ".join(left)}'
            elif status is None:
                killed += 1
                unfinished += len(list(folder.glob('*.partial')))
                wrong = whole(folder)
            elif status == 0:
                break
            else:
                wrong = f'a resumed run ended with {status}'
        if wrong is None:
            try:
                runs.assert_equal(reference, runs.last(folder))
            except AssertionError as error:
                wrong = f'differs: {error}'
        kills += killed
        rows.append({'setting': str(setting), 'kills': killed, 'wrong': wrong})
        number += 1
        print(f'{kills} kills, {number} runs' + (f'  LOST {wrong}' if wrong else ''), flush=True)
    lost = sum(row['wrong'] is not None for row in rows)
    left = sum((row['wrong'] or '').startswith('left') for row in rows)
    notes = [
        f'{kills} kills (SIGKILL at a random moment) over {len(rows)} runs',
        f'{left} kills left a process or a temporary file; {unfinished} cut a save off, whose file '
        'was removed when the run was resumed',
    ]
    return report('kills', len(rows), lost, start, notes, rows, args.json)


if __name__ == '__main__':
    sys.exit(main())
