"""Times mmkd's reader of checkpoints beside PyTorch's.

python benchmarks/reader.py                   # 1.6 GB: 400 tensors of a million numbers
python benchmarks/reader.py --tensors 100

In turn, each in a process of its own, as a run reads a checkpoint once, from a file in the page
cache: torch.load(weights_only=True), and read_checkpoint, whose child reads the file first.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mmkd.io.checkpoint import read_checkpoint


def read_by_torch(path: str) -> dict:
    """As PyTorch reads what may not run code."""
    return torch.load(path, weights_only=True)


READERS = {'torch': read_by_torch, 'mmkd': read_checkpoint}


def write(path: str, tensors: int) -> None:
    """A checkpoint of tensors of a million numbers each."""
    weights = {f'layer.{i}.weight': torch.rand(1000, 1000) for i in range(tensors)}
    torch.save({'state_dict': weights, 'meta': {}}, path)


def seconds(name: str, path: str) -> float:
    """How long one read takes."""
    start = time.perf_counter()
    found = READERS[name](path)
    took = time.perf_counter() - start
    assert found['state_dict']
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tensors', type=int, default=400)
    parser.add_argument('--rounds', type=int, default=9)
    args = parser.parse_args()
    fork = multiprocessing.get_context('fork')

    def apart(call, *given):
        with fork.Pool(1) as pool:
            return pool.apply(call, given)

    with tempfile.TemporaryDirectory(prefix='mmkd-reader-') as folder:
        path = str(Path(folder, 'weights.pth'))
        apart(write, path, args.tensors)
        rounds = [
            {name: apart(seconds, name, path) for name in READERS} for _ in range(args.rounds)
        ]
        size = Path(path).stat().st_size / 1e9
    medians = {name: statistics.median(r[name] for r in rounds) for name in READERS}
    said = ', '.join(f'{name} {median:.2f} s' for name, median in medians.items())
    ratio = medians['mmkd'] / medians['torch']
    print(f'{size:.2f} GB, medians of {args.rounds} rounds: {said}; ratio {ratio:.2f}')


if __name__ == '__main__':
    main()
