"""Reads what torch reads: every type, protocol and format, and random views of shared memory.

A case is lost when torch reads a file that it has written, and mmkd refuses it or gives anything
that is not equal to the bit: type, shape, stride, flags, and the bytes of the whole storage.

    python benchmarks/reliability/acceptance.py --json out.json
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import torch  # noqa: E402
from campaign import report  # noqa: E402
from test_acceptance import DTYPES, PROTOCOLS, both, same, tensor_of, views  # noqa: E402


def random_views(rng: random.Random) -> dict:
    """Some views of some memory, of a type that arithmetic knows."""
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8))
    whole = torch.arange(rng.randrange(1, 2000)).to(dtype)
    found = {'whole': whole}
    for i in range(rng.randrange(1, 6)):
        shape = [rng.randrange(0, 5) for _ in range(rng.randrange(0, 5))]
        stride = [rng.randrange(0, 9) for _ in shape]
        reach = sum((n - 1) * step for n, step in zip(shape, stride, strict=True) if n)
        if reach < len(whole):
            found[str(i)] = whole.as_strided(shape, stride, rng.randrange(len(whole) - reach))
    return found


def cases(seeds: int) -> list[tuple[str, dict, dict]]:
    """(name, what is saved, how)."""
    options = [
        dict(pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        for protocol in PROTOCOLS
        for zipped in (True, False)
    ]
    made = []
    for how in options:
        made += [(name, {'x': tensor_of(dtype)}, how) for name, dtype in DTYPES]
        made.append(('views', views(), how))
        made += [(f'seed {i}', random_views(random.Random(i)), how) for i in range(seeds)]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, default=40)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    start, counts, lost = time.perf_counter(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, value, how in cases(args.seeds):
            try:
                found = both(Path(folder) / 'x.pth', value, **how)
            except Exception as error:
                lost.append(f'{name}, {how}: {error}'[:300])
                continue
            counts['not read by torch' if found is None else 'the same'] += 1
            if found and not all(same(found[0][key], found[1][key]) for key in found[1]):
                lost.append(f'{name}, {how}: not the same')
    for each in lost:
        print('lost:', each)
    tried = counts['the same'] + len(lost)
    notes = [
        f'torch {torch.__version__}: {len(DTYPES)} types, {len(PROTOCOLS)} protocols, 2 formats',
        f'{counts["not read by torch"]} files that torch cannot write, or not read back',
    ]
    sys.exit(report('acceptance', tried, len(lost), start, notes, lost, args.json))


if __name__ == '__main__':
    main()
