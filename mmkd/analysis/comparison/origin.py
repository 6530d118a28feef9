"""Where the numbers of a report come from: data, versions, machine, commands, files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ...datasets.annotations import leaves
from .measure import versions
from .plan import Plan, Run, file_digest, files_of
from .runs import RunContext

UNKNOWN = 'not kept: an earlier mmkd made these results'


@dataclass
class Origin:
    """What the report says of its own making.

    Attributes:
        facts: names and values.
        data: file, what it was used for, its SHA-256.
        networks: label, the command that made it or the file that holds it, where it lies.
    """

    facts: list[tuple[str, str]]
    data: list[tuple[str, str, str]]
    networks: list[tuple[str, str, str]]


def trace(plan: Plan, context: RunContext, results: Mapping[str, dict], command: str) -> Origin:
    """Gather the origin of a comparison.

    Args:
        plan: what was compared.
        context: its folders and results file.
        results: by key.
        command: the command that called for the page, '' where it was called from Python.
    """
    made = [results[run.key] for run in plan.runs if run.key in results]
    now = datetime.now(timezone.utc).isoformat(' ', 'minutes')[:16]
    days = sorted({r['date'] for r in made if r.get('date')})
    of_runs = dict.fromkeys(_versions(r['versions']) for r in made if r.get('versions'))
    facts = [
        ('data set', _data_set(plan, made)),
        ('machine', '; '.join(sorted({r['machine'] for r in made if r.get('machine')}))),
        ('versions of the runs', '; '.join(of_runs) or UNKNOWN),
        ('date of the runs', ' to '.join(dict.fromkeys((*days[:1], *days[-1:]))) or UNKNOWN),
        ('page written', f'{now} UTC, by {_versions(versions())}'),
        ('command', command or 'called from Python'),
        ('results', _short(context.results)),
        ('work folder', _short(context.work_dir)),
    ]
    tested = {path for run in plan.runs for path in files_of(_tested(run))}
    data = [
        (_short(path), f'{plan.split} split' if path in tested else 'training', _digest(path))
        for path in sorted(plan.annotations | tested)
    ]
    networks = []
    for row in plan.rows:
        run = row.runs[0]
        if run.checkpoint is not None:
            weights = run.checkpoint
            networks.append((row.label, f'SHA-256 {_digest(weights)}', _short(weights)))
            continue
        folder = _short(context.directory(run))
        options = [option for option in run.options if not option.startswith('randomness.seed=')]
        seeds = ', '.join(str(each.seed) for each in row.runs)
        call = ['mmkd', 'train', _short(run.config), '--work-dir', folder, '--cfg-options']
        call += [*options, f'randomness.seed={run.seed}']
        also = f' (seeds {seeds}: each in a folder of its own)' if len(row.runs) > 1 else ''
        networks.append((row.label, shlex.join(call), folder + also))
    return Origin(facts, data, networks)


def _versions(found: Mapping[str, str]) -> str:
    return ', '.join(f'{name} {version}' for name, version in found.items())


def _data_set(plan: Plan, made: list[dict]) -> str:
    tested = [data for run in plan.runs for data in _tested(run)]
    kinds = dict.fromkeys(
        f'{getattr(data["type"], "__name__", data["type"])} in '
        f'{_short(data.get("data_root") or ".")}'
        for data in tested
    )
    metrics = [result['metrics'] for result in made]
    counts = sorted({f'{m["images"]:,} images' for m in metrics if 'images' in m})
    classes = {m['detail']['class_count'] for m in metrics if 'detail' in m}
    counts += [f'{n} class{"" if n == 1 else "es"}' for n in sorted(classes)]
    return ', '.join([*kinds, f'{plan.split} split', *counts])


def _tested(run: Run) -> list[dict]:
    return list(leaves(run.test_cfg.test_dataloader.get('dataset')))


def _digest(path: str) -> str:
    return file_digest(path)[:16] + '…' if os.path.exists(path) else 'not here'


def _short(path: str | Path) -> str:
    """Relative to the current folder where it lies below."""
    full = os.path.abspath(path)
    short = os.path.relpath(full)
    return full if short.startswith('..') else short
