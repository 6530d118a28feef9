"""How many iterations the distilled student needs for what its own baseline ends with.

    python tools/make_digits.py
    python benchmarks/quality.py      # about half an hour on 2 cores; stopped, it goes on

The baseline is the plain student with the same start on the whole schedule (of the committed
results). Each point is a training of its own whose schedule ends there. The figure is the shortest
schedule whose mean over the seeds is not below the baseline's.
"""

import argparse
import statistics
import sys
from pathlib import Path

from mmkd.compare import Bench, Progress, plan_runs, run_command
from mmkd.compare.runs import load_results, perform_all

ROOT = Path(__file__).resolve().parents[1]
FULL = 8  # epochs of the whole schedule, 1,000 iterations each
CHILD = """\
_base_ = {config!r}

max_epochs = {epochs}
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        eta_min=0.0,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', default='configs/digits/mmkd.py')
    parser.add_argument('--epochs', type=int, nargs='+', default=[3, 4, 5, 6])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--table-only', action='store_true')
    parser.add_argument('--results', type=Path, default=ROOT / 'benchmarks/digits')
    args = parser.parse_args()
    work = ROOT / 'work_dirs/quality'
    (work / 'configs').mkdir(parents=True, exist_ok=True)
    stem = Path(args.config).stem
    paths = {}
    for epochs in args.epochs:
        path = work / 'configs' / f'{stem}_{epochs}_epochs.py'
        path.write_text(CHILD.format(config=str(Path(args.config).resolve()), epochs=epochs))
        paths[epochs] = str(path.relative_to(Path.cwd()))
    full = plan_runs([args.config], args.seeds)
    short = plan_runs(list(paths.values()), args.seeds)
    results = load_results(args.results, full)[0] | load_results(args.results, short)[0]
    runs = [run for run in short.runs if run.role == 'distilled' and run.key not in results]
    if runs and not args.table_only:
        progress = Progress([run.name for run in runs], sys.stdout)
        bench = Bench(work, args.results, args.jobs, 1, [], progress, run_command)
        done, failures = perform_all(runs, bench)
        results |= done
        for name, message in failures.items():
            print(f'FAILED {name}: {message}')
    baseline = next(row for row in full.rows if row.role == 'baseline')
    distilled = next(row for row in full.rows if row.role == 'distilled')
    rows = {f'{baseline.label}, whole schedule': (FULL, baseline.runs)}
    for comparison, epochs in zip(short.comparisons, args.epochs, strict=True):
        rows[f'{stem}, ends after {epochs} epochs'] = (epochs, comparison.distilled.runs)
    rows[f'{stem}, whole schedule'] = (FULL, distilled.runs)
    print('| run | iterations | of the schedule | mAP (test) | n |')
    print('| --- | --- | --- | --- | --- |')
    needed, goal = None, None
    for name, (epochs, of_seeds) in rows.items():
        values = [100 * results[r.key]['metrics']['mAP'] for r in of_seeds if r.key in results]
        if not values:
            continue
        mean = statistics.mean(values)
        spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
        print(
            f'| {name} | {1000 * epochs:,} | {100 * epochs / FULL:.0f} % | {mean:.1f}{spread} '
            f'| {len(values)} |'
        )
        if goal is None:
            goal = mean
        elif needed is None and mean >= goal:
            needed = epochs
    if needed is not None:
        print(f"\nreaches its baseline's mAP with {100 * needed / FULL:.0f} % of the iterations")
    return 0


if __name__ == '__main__':
    sys.exit(main())
