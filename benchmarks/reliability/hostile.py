"""Reads every hostile file of tests/hostile.py, and a checkpoint with every single bit flipped.

A file is lost when it is not refused by name, runs, takes more than 12 seconds, or more memory than
1.25 times its size and 200 MB. A flipped bit is lost when the file is read as other tensors, or
anything but a CheckpointError is raised.

    python benchmarks/reliability/hostile.py --json out.json
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import hostile as corpus  # noqa: E402
import torch  # noqa: E402
from campaign import report  # noqa: E402

from mmkd.io.checkpoint import CheckpointError, read_checkpoint  # noqa: E402


def read_hostile(folder: Path) -> list[dict]:
    """Each hostile file: what became of it."""
    rows = []
    for name, case in corpus.HOSTILE.items():
        path, message, ran, seconds, memory, size = corpus.attempt(name, folder)
        handled = (
            message.startswith(f'checkpoint {path}')
            and re.search(case.reason, message) is not None
            and not ran
            and seconds < corpus.SECONDS
            and memory < 1.25 * size + corpus.MEMORY
        )
        rows.append(
            dict(
                name=name,
                kind=case.kind,
                handled=handled,
                seconds=round(seconds, 3),
                megabytes=round(memory / 1e6, 1),
                file_megabytes=round(size / 1e6, 3),
                message=message.replace(str(path), case.file)[:160],
            )
        )
    return rows


def flip_bits(folder: Path, stride: int) -> dict:
    """A small checkpoint with CRCs, with every ``stride``-th bit flipped in turn."""
    data, path = corpus.saved(corpus.weights()), folder / 'x.pth'
    expected = corpus.weights()['state_dict']
    refused, same, lost = 0, 0, []
    for bit in range(0, 8 * len(data), stride):
        path.write_bytes(corpus.flipped(data, bit // 8, bit % 8))
        try:
            read = read_checkpoint(path)['state_dict']
            if list(read) == list(expected) and all(
                read[k].dtype == expected[k].dtype and torch.equal(read[k], expected[k])
                for k in expected
            ):
                same += 1
            else:
                lost.append(f'bit {bit}: other tensors')
        except CheckpointError:
            refused += 1
        except BaseException as error:
            lost.append(f'bit {bit}: {type(error).__name__}: {error}'[:160])
    return dict(
        name='flipped bits',
        kind='integrity',
        handled=not lost,
        tried=refused + same + len(lost),
        refused=refused,
        same=same,
        lost=lost,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--json', type=Path)
    parser.add_argument('--bit-stride', type=int, default=1, help='flip each of how many bits')
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = read_hostile(Path(folder))
        print(f'{sum(row["handled"] for row in rows)} of {len(rows)} hostile files refused')
        bits = flip_bits(Path(folder), args.bit_stride)
    print(f'{bits["tried"]} bits flipped: {bits["refused"]} refused, {bits["same"]} read as before')
    lost = [row['name'] for row in rows if not row['handled']] + bits['lost']
    print(f'lost: {lost or "none"}')
    tried = len(rows) + bits['tried']
    slowest = max(rows, key=lambda row: row['seconds'])
    largest = max(rows, key=lambda row: row['megabytes'] - 1.25 * row['file_megabytes'])
    notes = [
        f'{len(rows)} hostile files of {len({row["kind"] for row in rows})} kinds',
        f'slowest: {slowest["name"]}, {slowest["seconds"]} s',
        f'largest beyond its size: {largest["name"]}, {largest["megabytes"]} MB for a file of '
        f'{largest["file_megabytes"]} MB',
        f'{bits["tried"]} flipped bits: {bits["refused"]} refused, {bits["same"]} the same',
        f'torch {torch.__version__}',
    ]
    sys.exit(report('hostile', tried, len(lost), start, notes, [*rows, bits], args.json))


if __name__ == '__main__':
    main()
