"""How many iterations the distilled student needs to reach the final mAP of its own baseline.

    python tools/make_digits.py
    python benchmarks/quality.py   # when it is stopped, the same command continues

The baseline is the plain student with the same start on the whole schedule, from the committed
results. Each point is a training of its own whose schedule ends there. The answer is the shortest
schedule whose mean over the seeds is not below the baseline's.
"""

import argparse
import statistics
import sys
from pathlib import Path

from mmkd.analysis.comparison import (
    Progress,
    RunContext,
    load_results,
    perform_all,
    plan_runs,
    run_command,
)

ROOT = Path(__file__).resolve().parents[1]
FULL = 8  # epochs of the whole schedule, 1,000 iterations each


def ending(epochs: int) -> list[str]:
    """The options that end the schedule after so many epochs."""
    keys = ('train_cfg.max_epochs', 'train_cfg.val_interval', 'param_scheduler.1.T_max',
            'param_scheduler.1.end')  # fmt: skip
    return [f'{key}={epochs}' for key in keys]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', default='configs/digits/mmkd.py')
    parser.add_argument('--epochs', type=int, nargs='+', default=[3, 4, 5, 6])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--table-only', action='store_true')
    parser.add_argument('--results', type=Path, default=ROOT / 'benchmarks/digits.jsonl')
    parser.add_argument('--short', type=Path, default=ROOT / 'benchmarks/digits_quality.jsonl')
    args = parser.parse_args()
    work_dir = ROOT / 'work_dirs/quality'
    stem = Path(args.config).stem
    full = plan_runs([args.config], args.seeds)
    results = load_results(args.results, full)[0]
    runs, of_epochs = [], {}
    for epochs in args.epochs:
        plan = plan_runs([args.config], args.seeds, options=ending(epochs))
        results |= load_results(args.short, plan)[0]
        of_epochs[epochs] = plan.comparisons[0].distilled.runs
        runs += [run for run in of_epochs[epochs] if run.key not in results]
    if runs and not args.table_only:
        progress = Progress([run.name for run in runs], sys.stdout)
        context = RunContext(work_dir, args.short, args.jobs, 1, [], progress, run_command)
        done, failures = perform_all(runs, context)
        results |= done
        for name, message in failures.items():
            print(f'FAILED {name}: {message}')
    baseline = next(row for row in full.rows if row.role == 'baseline')
    distilled = next(row for row in full.rows if row.role == 'distilled')
    rows = {f'{baseline.label}, whole schedule': (FULL, baseline.runs)}
    for epochs, of_seeds in of_epochs.items():
        rows[f'{stem}, ends after {epochs} epochs'] = (epochs, of_seeds)
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
