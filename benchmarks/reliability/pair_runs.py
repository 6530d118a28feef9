"""Trains pairs of docs/pairs.md for 60 steps with every guard on, and counts what mmkd says.

python benchmarks/reliability/pair_runs.py                 # each student from the next teacher
python benchmarks/reliability/pair_runs.py --all --resume  # every pair, for hours

With --resume it goes on with what results/pair_runs.jsonl lacks; without, that is emptied first.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'benchmarks')]

import faults  # noqa: E402
import zoo  # noqa: E402
from campaign import report  # noqa: E402
from pair_matrix import known  # noqa: E402

from mmkd.digests import tensor_digests  # noqa: E402
from mmkd.engine.runner import DistillationRunner  # noqa: E402

KEPT = ROOT / 'benchmarks/reliability/results/pair_runs.jsonl'
STEPS = 60
"""A term that stays at 0 is named after 50."""


@DATASETS.register_module()
class PairImages(Dataset):
    """Images of noise with three boxes, masks and a map of stuff, as a pipeline would pack them."""

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict:
        data = zoo.batch(seed=index)
        return dict(inputs=data['inputs'][0], data_samples=data['data_samples'][0])


class _Heard(faults.Heard):
    """Warnings and errors that mmkd logs."""

    def emit(self, record: logging.LogRecord) -> None:
        if Path(record.pathname).is_relative_to(ROOT / 'mmkd'):
            super().emit(record)


def run(student: str, teacher: str, terms: tuple[str, ...], directory: str) -> list[str]:
    """Train the pair; what mmkd said, and last the error that stopped it."""
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=zoo.config(student, teacher, terms),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=True),
                dataset=dict(type='PairImages'),
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='SGD', lr=1e-3, momentum=0.9),
                clip_grad=dict(max_norm=10.0),
            ),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=10)),
            randomness=dict(seed=0),
            work_dir=directory,
            experiment_name=f'{student}-{teacher}-{time.time_ns()}',
            log_level='WARNING',
        )
    )
    heard = _Heard()
    try:
        runner = DistillationRunner.from_cfg(cfg)
        runner.logger.addHandler(heard)
        zoo.settle(runner.model)
        zoo.settle(runner.model.teacher.network)
        runner.model.teacher.digests = tensor_digests(runner.model.teacher.network)
        runner.train()
    except Exception as error:  # whatever stops a run: it is counted, and its words kept
        heard.said.append(f'{type(error).__name__}: {error}')
    else:
        if runner.iter != STEPS:
            heard.said.append(f'ended after {runner.iter} steps')
    return heard.said


def _prepare() -> None:
    Config.pretty_text = ''  # its layout takes longer than building the networks
    warnings.simplefilter('ignore')
    register_all_modules()
    torch.set_num_threads(1)


def row(pair: tuple[str, str, tuple[str, ...]]) -> dict:
    """Train a pair in a directory of its own."""
    start = time.process_time()
    with tempfile.TemporaryDirectory(prefix='mmkd-pairs-') as directory:
        said = run(*pair, directory)
    seconds = round(time.process_time() - start, 1)
    return {'id': name(pair), 'held': not said, 'said': said, 'seconds': seconds}


def name(pair: tuple[str, ...]) -> str:
    """How a pair is called."""
    return f'{pair[0]} from {pair[1]}'


def main() -> int:
    parser = argparse.ArgumentParser(description='Trains the pair matrix with every guard on')
    parser.add_argument('--json', help='where the result goes')
    parser.add_argument('--all', action='store_true', help='every pair, not one for each student')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='pairs side by side')
    parser.add_argument('--resume', action='store_true', help='go on with what is not kept yet')
    parser.add_argument('--minutes', type=float, default=1e4, help='then begin no other pair')
    args = parser.parse_args()
    _prepare()
    matrix, _ = known()
    students, teachers = list(zoo.CONFIGS), [*zoo.CONFIGS, *zoo.ONE_STAGE]
    # Diagonal by diagonal: cut short, it has been everywhere.
    chosen = [
        (student, teachers[(i + apart) % len(teachers)])
        for apart in range(1, len(teachers) + 1 if args.all else 2)
        for i, student in enumerate(students)
    ]
    # The one-stage teachers are nobody's next but the last's.
    chosen += [('Faster R-CNN', teacher) for teacher in zoo.ONE_STAGE]
    trained = [
        (*pair, terms) for pair in dict.fromkeys(chosen) if (terms := zoo.terms_of(matrix[pair]))
    ]
    if not args.resume:
        KEPT.write_text('')
    found = {entry['id']: entry for entry in map(json.loads, KEPT.read_text().splitlines())}
    left = [pair for pair in trained if name(pair) not in found]
    end = time.monotonic() + 60 * args.minutes
    context = multiprocessing.get_context('spawn')
    workers = ProcessPoolExecutor(args.jobs, context, _prepare)
    with KEPT.open('a') as file, workers as pool:
        waiting = {pool.submit(row, pair) for pair in left}
        for future in as_completed(waiting):
            if future.cancelled():
                continue
            entry = future.result()
            print(json.dumps(entry), file=file, flush=True)
            found[entry['id']] = entry
            print('ok  ' if entry['held'] else 'LOST', entry['id'], entry['said'] or '', flush=True)
            if time.monotonic() > end:
                for each in waiting:
                    each.cancel()
    rows = [found[name(pair)] for pair in trained if name(pair) in found]
    start = time.perf_counter() - sum(entry['seconds'] for entry in rows)
    tried, lost = len(rows), sum(not entry['held'] for entry in rows)
    notes = [
        f'{len(rows)} of the {len(matrix)} pairs of docs/pairs.md, {STEPS} steps of tiny networks; '
        f'{sum(len(entry["said"]) for entry in rows)} warnings or stops of mmkd. Random teachers '
        "(teacher_ckpt='random'), so their detections are not asked"
    ]
    rows = [entry for entry in rows if not entry['held']]
    return report('pair_runs', tried, lost, start, notes, rows, args.json)


if __name__ == '__main__':
    sys.exit(main())
