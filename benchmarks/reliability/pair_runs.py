"""Trains pairs of docs/pairs.md for 60 steps with every guard on, and counts what mmkd says.

python benchmarks/reliability/pair_runs.py          # each student from the next kind of teacher
python benchmarks/reliability/pair_runs.py --all    # every pair
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
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

from mmkd.runner import DistillationRunner  # noqa: E402
from mmkd.teacher import fingerprint  # noqa: E402

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


class _Heard(faults._Heard):
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
        runner.model.teacher.prints = fingerprint(runner.model.teacher.network)
        runner.train()
    except Exception as error:  # whatever stops a run: it is counted, and its words kept
        heard.said.append(f'{type(error).__name__}: {error}')
    else:
        if runner.iter != STEPS:
            heard.said.append(f'ended after {runner.iter} steps')
    return heard.said


def main() -> int:
    parser = argparse.ArgumentParser(description='Trains the pair matrix with every guard on')
    parser.add_argument('--json', help='where the result goes')
    parser.add_argument('--all', action='store_true', help='every pair, not one for each student')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    register_all_modules()
    torch.set_num_threads(1)
    matrix, _ = known()
    students, teachers = list(zoo.CONFIGS), [*zoo.CONFIGS, *zoo.ONE_STAGE]
    chosen = [
        (student, teacher)
        for i, student in enumerate(students)
        for teacher in (teachers if args.all else [teachers[i + 1]])
    ]
    # The one-stage teachers are nobody's next but the first's.
    if not args.all:
        chosen += [('Faster R-CNN', teacher) for teacher in zoo.ONE_STAGE]
    trained = [pair for pair in dict.fromkeys(chosen) if zoo.terms_of(matrix[pair])]
    rows, start = [], time.perf_counter()
    for student, teacher in trained:
        with tempfile.TemporaryDirectory(prefix='mmkd-pairs-') as directory:
            said = run(student, teacher, zoo.terms_of(matrix[student, teacher]), directory)
        held = not said
        rows.append({'id': f'{student} from {teacher}', 'held': held, 'said': said})
        print('ok  ' if held else 'LOST', rows[-1]['id'], said or '', flush=True)
    lost = sum(not row['held'] for row in rows)
    notes = [
        f'{len(rows)} pairs of tiny networks, {STEPS} steps each, with the terms of docs/pairs.md; '
        f'{sum(len(row["said"]) for row in rows)} warnings or stops of mmkd. Random teachers '
        "(teacher_ckpt='random'), so their detections are not asked"
    ]
    return report('pair_runs', len(rows), lost, start, notes, rows, args.json)


if __name__ == '__main__':
    sys.exit(main())
