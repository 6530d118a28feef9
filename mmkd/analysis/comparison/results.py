"""The results of a study: one file, one line of JSON for each run, appended when the run is done.

A line is of a kind: ``run`` (a training with its test, found again by ``key``), ``measure`` (size
and speed of a network), ``annotations`` (digests of the files with the ground truth), and what a
study of stages keeps besides. Where two lines have the same key, the later one counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...io.checkpoint import CheckpointError, from_plain, read_checkpoint
from .plan import Plan, arch_key, file_digest


@dataclass
class Results:
    """The lines of a results file by kind: runs and measures by key, annotations by file name."""

    runs: dict[str, dict] = field(default_factory=dict)
    measures: dict[str, dict] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    others: dict[tuple[str, str], dict] = field(default_factory=dict)
    """Lines of any other kind, by kind and key."""
    damaged: list[int] = field(default_factory=list)
    """Numbers of the lines that are not complete, from 1."""


def read_results(path: Path) -> Results:
    """Reads a results file; one that does not exist has no lines.

    A line that a kill cut short is skipped, and counted in ``damaged``.

    Raises:
        ValueError: if the path is a folder.
    """
    results = Results()
    if path.is_dir():
        raise ValueError(
            f'{path} is a folder, and the results of a comparison are one file: name a file, such '
            f'as {path}.jsonl'
        )
    if not path.exists():
        return results
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if line['kind'] == 'run':
                results.runs[line['key']] = line
            elif line['kind'] == 'measure':
                results.measures[line['key']] = line
            elif line['kind'] == 'annotations':
                results.annotations |= line['files']
            else:
                results.others[line['kind'], line.get('key', '')] = line
        except (ValueError, KeyError, TypeError):
            results.damaged.append(number)
    return results


def append_result(path: Path, line: dict) -> None:
    """Appends a line; threads and processes may do so at the same time.

    The line is on the disk when this returns. One that cannot be written whole (a full disk) is
    taken back; after one that a kill cut short, a new line begins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, separators=(',', ':'), allow_nan=False).encode() + b'\n'
    with open(path, 'a+b', buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b'\n':
                text = b'\n' + text
        try:
            if file.write(text) != len(text):
                raise OSError(f'{path}: the disk took only a part of a result')
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def load_results(path: Path, plan: Plan) -> tuple[dict[str, dict], list[str]]:
    """Results of the plan's runs by key, and notes on lines that do not count."""
    results = read_results(path)
    notes = damage(path, results)
    wanted = {run.key for run in plan.runs}
    planned = {(run.config, run.role, run.seed) for run in plan.runs}
    of_split = {key: run for key, run in results.runs.items() if run['split'] == plan.split}
    found = {key: run for key, run in of_split.items() if key in wanted}
    stale = [
        run['label'] if run['seed'] is None else f'{run["label"]}, seed {run["seed"]}'
        for key, run in of_split.items()
        if key not in wanted and (run['config'], run['role'], run['seed']) in planned
    ]
    if stale:
        notes.append(
            f'{len(stale)} stale result(s) ignored: config, options, teacher or start have changed '
            f'since ({"; ".join(stale[:3])}{"; ..." if len(stale) > 3 else ""})'
        )
    return found, notes


def damage(path: Path, results: Results) -> list[str]:
    """A note on the lines of a results file that are not complete, where there are any."""
    if not results.damaged:
        return []
    return [
        f'{path}: line(s) {", ".join(map(str, results.damaged))} cut short, as by a kill, and '
        'skipped; a run without a whole line is run again'
    ]


def load_measures(path: Path, plan: Plan) -> dict[str, dict]:
    """Sizes and speeds of the plan's networks by :func:`.plan.arch_key`."""
    wanted = {arch_key(run) for run in plan.runs}
    return {key: value for key, value in read_results(path).measures.items() if key in wanted}


def require_same_data(path: Path, plan: Plan, keep: bool) -> None:
    """Checks that the annotation files are those that the results were made with.

    Args:
        path: the results file.
        plan: with the annotation files.
        keep: whether to append the digests of files that the results do not know yet.

    Raises:
        ValueError: naming a file that has changed since.
    """
    known = read_results(path).annotations
    now = {name: file_digest(name) for name in sorted(plan.annotations)}
    for name in now:
        if known.get(name, now[name]) != now[name]:
            raise ValueError(
                f'{name} has changed since the results in {path} were made, so new runs would be '
                'compared with runs on other data: name another --work-dir (or --results), or '
                f'delete {path}'
            )
    new = {name: digest for name, digest in now.items() if name not in known}
    if keep and new:
        append_result(path, {'kind': 'annotations', 'files': new})


def read_curves(directory: Path, points: int = 60) -> dict:
    """Reads what a training logged from MMEngine's ``vis_data/scalars.json`` of all its attempts.

    Where an attempt repeats iterations of an earlier one, the later values count.

    Returns:
        ``{'train': {'iter': [...], 'loss': [...], 'loss_...': [...]}, 'val': {'iter', 'mAP'}}``;
        train values are means over at most ``points`` equal spans, losses not logged are None.
    """
    train: dict[int, dict] = {}
    val: dict[int, float] = {}
    for path in sorted(directory.glob('*/vis_data/scalars.json')):
        now = 0
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short
            if 'loss' in entry:
                now = int(entry.get('iter', entry['step']))
                train[now] = {k: v for k, v in entry.items() if k.startswith('loss')}
            else:
                with contextlib.suppress(KeyError):
                    val[now] = 100 * find_metrics(entry)[0]
    steps = sorted(train)
    spans = np.array_split(np.arange(len(steps)), max(1, min(points, len(steps))))
    bins = [span for span in spans if len(span)]
    names = sorted({name for entry in train.values() for name in entry})
    curves: dict = {'iter': [int(steps[b[-1]]) for b in bins]}
    for name in names:
        values = [[train[steps[i]].get(name) for i in b] for b in bins]
        finite = [[v for v in vs if v is not None and math.isfinite(v)] for vs in values]
        # Three digits are finer than a line of the report is wide.
        curves[name] = [float(f'{np.mean(vs):.3g}') if vs else None for vs in finite]
    points_val = sorted(val)
    return {
        'train': curves,
        'val': {'iter': points_val, 'mAP': [round(val[i], 2) for i in points_val]},
    }


def read_step_time(directory: Path) -> float | None:
    """Median of the milliseconds per training step that MMEngine logged, data loading included."""
    times = []
    for path in sorted(directory.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError):
                entry = json.loads(line)
                if 'loss' in entry:
                    times.append(float(entry['time']))
    return round(1000 * float(np.median(times)), 2) if times else None


def find_metrics(reported: dict[str, float]) -> tuple[float, float | None]:
    """mAP and AP50, as fractions, among what COCO-like and VOC metrics report.

    Raises:
        KeyError: if there is no box mAP.
    """

    value = find_metric(reported, 'bbox_mAP', 'bbox_AP', 'mAP')
    if value is None:
        raise KeyError(f'no box mAP among the metrics: {sorted(reported)}')
    return value, find_metric(reported, 'bbox_mAP_50', 'bbox_AP50', 'AP50')


def find_metric(reported: dict[str, float], *endings: str) -> float | None:
    """The first metric by one of these names, after any prefix such as ``coco/``."""
    keys = (k for e in endings for k in reported if k == e or k.endswith('/' + e))
    return next((float(reported[key]) for key in keys), None)


def read_detections(path: str | Path) -> list[dict]:
    """What ``tools/test.py --out NAME.pth`` wrote, image by image; the file is data, not code.

    Raises:
        CheckpointError: if the file is damaged, or holds anything else.
    """
    samples = from_plain(read_checkpoint(path)).get('detections')
    if not isinstance(samples, list) or not all(isinstance(each, dict) for each in samples):
        raise CheckpointError(f'{path} holds no detections: write it by tools/test.py --out')
    return samples
