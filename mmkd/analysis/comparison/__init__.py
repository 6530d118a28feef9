"""Compares distilled students with the user's own baselines, over seeds, and gives a verdict.

The baseline of a distilled config is the same config with every distillation weight 0: same start,
same data, schedule and seed. What a start gives is thereby never credited to the terms.

:mod:`.plan` says which runs are needed, :mod:`.runs` performs them through ``tools/``, each in a
process of its own, :mod:`.results` keeps what they gave, :mod:`.statistics` judges it, and
:mod:`.table` and :mod:`.report` show it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from . import measure, report
from .measure import cpu_cores
from .origin import Origin, trace
from .plan import Plan, plan_runs, require_test_data
from .progress import Progress
from .results import load_measures, load_results, require_same_data
from .runs import Execute, RunContext, Stopped, measure_all, perform_all, run_command
from .statistics import MARGIN
from .table import Summary, markdown, summarise

__all__ = [
    'MARGIN',
    'Progress',
    'RunContext',
    'Stopped',
    'compare',
    'load_results',
    'measure',
    'perform_all',
    'plan_runs',
    'resources',
    'run_command',
]


def compare(
    configs: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    plain: Sequence[str] = (),
    options: Sequence[str] = (),
    work_dir: str | Path = 'work_dirs/compare',
    results_path: str | Path | None = None,
    split: str = 'test',
    jobs: int | None = None,
    gpus: int | None = None,
    margin: float = MARGIN,
    images: int = 6,
    table_only: bool = False,
    against: Sequence[str] = (),
    execute: Execute = run_command,
    stream: TextIO = sys.stdout,
    command: str = '',
) -> int:
    """Plans, runs what is missing, prints the table and writes ``table.md`` and ``report.html``.

    The arguments are those of ``tools/compare.py``, which describes them; ``execute`` runs the
    commands of a run, ``stream`` gets what is printed, and ``command`` is the call that the report
    shows.

    Returns:
        The exit code: 0, 1 if a run failed, 2 if the plan is impossible, 130 if it was stopped.
    """
    work = Path(work_dir)
    results_file = Path(results_path) if results_path else work / 'results.jsonl'
    try:
        jobs, processes, devices = resources(jobs, gpus)
        plan = plan_runs(configs, seeds, plain, options, split, processes, against)
        if not margin > 0:
            raise ValueError(f'--margin must be above 0, not {margin}')
        results, notes = load_results(results_file, plan)
        todo = [run for run in plan.runs if run.key not in results]
        if not table_only:
            require_test_data(todo)
        require_same_data(results_file, plan, keep=not table_only)  # may write: the last refusal
    except (ValueError, FileNotFoundError) as error:
        print(f'compare: {error}', file=stream)
        return 2
    failures: dict[str, str] = {}
    costs = {run.name: run.cost for run in todo}
    progress = Progress(list(costs), stream, costs=costs)
    context = RunContext(work, results_file, jobs, processes, devices, progress, execute)
    where = f'{len(devices)} GPU(s)' if devices else f'{cpu_cores()} CPU core(s)'
    how = f'; {jobs} side by side with {processes} process(es) each, {where}'
    print(
        f'{len(plan.runs)} runs, {len(plan.runs) - len(todo)} of them done already'
        + ('' if table_only else how),
        file=stream,
        flush=True,
    )
    for note in [*plan.notes, *notes]:
        print(f'note: {note}', file=stream, flush=True)
    if table_only:
        measures = load_measures(results_file, plan)
    else:
        try:
            done, failures = perform_all(todo, context)
            results |= done
            measures = measure_all(plan, context, results)
        except (Stopped, KeyboardInterrupt):
            print('\nstopped; the same command continues from here', file=stream)
            return 130
    if not results:
        print(f'no result of these configs in {results_file}', file=stream, flush=True)
        return 1
    summary = summarise(plan, results, measures, margin, notes)
    text = markdown(summary)
    work.mkdir(parents=True, exist_ok=True)
    (work / 'table.md').write_text(text)
    origin = trace(plan, context, results, command)
    _write_report(plan, context, summary, results, images, origin)
    print(f'\n{text}\ntable:  {work / "table.md"}\nreport: {work / "report.html"}', file=stream)
    for name, message in failures.items():
        print(f'\nFAILED  {name}: {message}', file=stream)
    stream.flush()
    return 1 if failures else 0


def resources(jobs: int | None, gpus: int | None) -> tuple[int, int, list[str]]:
    """Returns the number of runs side by side, the processes of each, and the GPUs' names."""
    available = torch.cuda.device_count()
    if jobs is not None and jobs < 1:
        raise ValueError(f'--jobs must be 1 or more, not {jobs}')
    if gpus is not None and gpus < 1:
        raise ValueError(f'--gpus must be 1 or more, not {gpus}')
    if available:
        if gpus is not None and gpus > available:
            raise ValueError(f'--gpus {gpus}: this machine shows {available}')
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        names = visible.split(',') if visible else [str(i) for i in range(available)]
        devices = names[: gpus or available]
    else:
        devices = []
        if gpus is not None and jobs != 1:
            raise ValueError(
                f'--gpus {gpus}: this machine shows no GPU; --jobs 1 --gpus {gpus} trains with '
                f'{gpus} processes on the CPU'
            )
    side_by_side = jobs or len(devices) or cpu_cores()
    processes = gpus if gpus and jobs == 1 else 1
    return side_by_side, processes, devices


def _write_report(
    plan: Plan,
    context: RunContext,
    summary: Summary,
    results: dict[str, dict],
    images: int,
    origin: Origin | None = None,
) -> None:
    curves, metrics, detections, cfg = {}, {}, {}, None
    missing: list[str] = []
    for row in plan.rows:
        done = [(run, results[run.key]) for run in row.runs if run.key in results]
        curves[row.label] = [r['curves'] for _, r in done if r.get('curves')]
        metrics[row.label] = {run.seed: r['metrics'] for run, r in done if 'metrics' in r}
        run = row.runs[0]
        path = context.directory(run) / run.tested_in / 'detections.pth'
        if run.key in results and path.exists():
            detections[row.label] = path
            cfg = cfg or run.test_cfg
        elif run.key in results:
            missing.append(f'{row.label}: {path} is not there')
    pictures: list = []
    if cfg is not None and images:
        try:
            pictures = report.collect_pictures(cfg, detections, images, missing=missing)
        except Exception as error:  # every number is in the table without them
            missing.append(f'{type(error).__name__}: {error}')
    if not images:
        missing = ['the command asked for none (--images 0)']
    elif cfg is None:
        missing = []
    page = report.render(summary, curves, pictures, missing, metrics, origin)
    (context.work_dir / 'report.html').write_text(page)
