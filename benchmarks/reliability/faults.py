"""Plants every fault of tests/faults.py, and runs the sound configs beside them.

python benchmarks/reliability/faults.py --json faults.json
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from mmdet.utils import register_all_modules

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tools')]

import faults  # noqa: E402
import make_digits  # noqa: E402
from campaign import report  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description='Plants faults and looks for false alarms')
    parser.add_argument('--json', help='where the result goes')
    parser.add_argument('--only', default='', help='faults whose id contains this')
    args = parser.parse_args()
    register_all_modules()
    torch.set_num_threads(1)
    make_digits.make(faults.DATA, 96, 8000, 500, 1000, seed=0)  # as the Makefile, once
    chosen = [fault for fault in faults.FAULTS if args.only in fault.id]
    sound = ['tiny', 'digits']
    rows, start = [], time.perf_counter()
    for case in [*chosen, *sound]:
        fault = case if isinstance(case, faults.Fault) else None
        # Not removed before the end: MMEngine's visualiser goes on writing to its first one.
        directory = Path(tempfile.mkdtemp(prefix='mmkd-faults-'))
        said = faults.plant(fault, directory, case if fault is None else '')
        held = faults.caught(fault, said) if fault else not said
        name = fault.id if fault else f'sound: {case}'
        rows.append({'id': name, 'held': held, 'said': said[-1:] if fault else said})
        print('ok  ' if held else 'LOST', name, '' if held else said, flush=True)
    lost = sum(not row['held'] for row in rows)
    notes = [
        f'{len(chosen)} faults, {len(sound)} sound runs; others are those of `shipped` and '
        '`pair_runs`'
    ]
    return report('faults', len(rows), lost, start, notes, rows, args.json)


if __name__ == '__main__':
    sys.exit(main())
