"""What the results hold besides mAP: AP by threshold, size and class, curves, kinds of errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .charts import Bars, Chart, bars, precision_chart
from .errors import KINDS
from .results import find_metric
from .statistics import paired_interval
from .table import PairSummary, RowSummary, Summary, format_number, mean_sd, spread

Metrics = Mapping[str, Mapping[int | None, dict]]
"""By network's label and seed (a teacher's is None), the metrics of a result."""
Table = tuple[list[str], list[list[str]]]
"""Head and body."""
Value = TypeVar('Value')

THRESHOLDS = {
    'AP75': ('AP75', 'bbox_mAP_75', 'bbox_AP75'),
    'AP small': ('AP_small', 'bbox_mAP_s', 'bbox_APs'),
    'AP medium': ('AP_medium', 'bbox_mAP_m', 'bbox_APm'),
    'AP large': ('AP_large', 'bbox_mAP_l', 'bbox_APl'),
}
"""By column, the name in a result's ``detail``, and those that COCO and LVIS metrics report."""


@dataclass
class Errors:
    """What kinds of errors cost a teacher, a baseline and a student, and what follows from it."""

    pair: PairSummary
    chart: Bars
    table: Table
    sentence: str


def threshold_table(summary: Summary, metrics: Metrics) -> Table | None:
    """mAP, AP50 and what there is of AP75 and AP by size: mean ± standard deviation over seeds."""
    cells = {
        name: {row.label: _at_threshold(metrics.get(row.label, {}), keys) for row in summary.rows}
        for name, keys in THRESHOLDS.items()
    }
    cells = {name: column for name, column in cells.items() if any(column.values())}
    if not cells:
        return None
    body = []
    for row in summary.rows:
        of_seeds = metrics.get(row.label, {}).values()
        at_50 = [100 * m['AP50'] for m in of_seeds if m.get('AP50') is not None]
        line = [spread(row), mean_sd(at_50)]
        line += [mean_sd(column[row.label]) for column in cells.values()]
        body.append([row.label, *line])
    return ['network', 'mAP', 'AP50', *cells], body


def _at_threshold(of_seeds: Mapping[int | None, dict], keys: Sequence[str]) -> list[float]:
    """In points."""
    name, *reported = keys
    values = []
    for metrics in of_seeds.values():
        detail = metrics.get('detail', {})
        value = detail.get(name) if name in detail else find_metric(metrics['reported'], *reported)
        if value is not None and value >= 0:  # COCO reports -1 where there is no object
            values.append(100 * value)
    return values


def class_table(summary: Summary, metrics: Metrics) -> Table | None:
    """Mean AP of each class, and its difference for each pair; None where there is one class."""
    found = {
        row.label: _of_detail(metrics, row.label, lambda detail: detail.get('classes'))
        for row in summary.rows
    }
    found = {label: of_seeds for label, of_seeds in found.items() if of_seeds}
    each = (classes for of_seeds in found.values() for classes in of_seeds.values())
    names = list(dict.fromkeys(name for classes in each for name in classes))
    if len(names) < 2:
        return None

    def mean(label: str, name: str, seeds: Sequence[int | None] | None = None) -> float | None:
        of_seeds = found[label]
        values = [of_seeds[s].get(name) for s in (of_seeds if seeds is None else seeds)]
        known = [value for value in values if value is not None]
        return 100 * float(np.mean(known)) if known else None

    pairs = [(pair, _common(pair, found)) for pair in summary.pairs if pair.own]
    pairs = [(pair, seeds) for pair, seeds in pairs if seeds]
    body = []
    for name in names:
        line = [name, *(format_number(mean(label, name)) for label in found)]
        for pair, seeds in pairs:
            one, other = mean(pair.label, name, seeds), mean(pair.reference, name, seeds)
            gain = None if one is None or other is None else one - other
            line.append(_signed(gain))
        body.append(line)
    return ['class', *found, *(f'{p.label} − {p.reference}' for p, _ in pairs)], body


def precision_charts(summary: Summary, metrics: Metrics) -> list[Chart]:
    """For each pair the curves of teacher, baseline and student, each the mean over its seeds."""
    charts = []
    for pair in summary.pairs:
        curves = {}
        for label in _networks(pair):
            of_seeds = _of_detail(metrics, label, lambda detail: detail.get('precision'))
            if of_seeds:
                curves[label] = np.mean(list(of_seeds.values()), axis=0)
        if pair.own and pair.label in curves:
            charts.append(precision_chart(pair.label, curves))
    return charts


def error_tables(summary: Summary, metrics: Metrics) -> list[Errors]:
    """For each pair what each kind of error costs teacher, baseline and student, in AP50 points."""
    found = {
        row.label: _of_detail(metrics, row.label, lambda detail: detail.get('errors'))
        for row in summary.rows
    }
    tables = []
    for pair in summary.pairs:
        seeds = _common(pair, found)
        if not pair.own or not seeds:
            continue
        points = {
            label: {k: [100 * found[label][s][k] for s in seeds] for k in KINDS}
            for label in (pair.reference, pair.label)
        }
        if pair.teacher and found.get(pair.teacher):
            of_teacher = list(found[pair.teacher].values())
            known = {k: [100 * each[k] for each in of_teacher] for k in KINDS}
            points = {pair.teacher: known, **points}
        groups = {k: {label: float(np.mean(v[k])) for label, v in points.items()} for k in KINDS}
        student, baseline = points[pair.label], points[pair.reference]
        changes = {k: np.subtract(student[k], baseline[k]).tolist() for k in KINDS}
        body = []
        for kind, values in groups.items():
            line = [kind, *(f'{value:.1f}' for value in values.values())]
            body.append([*line, _signed(float(np.mean(changes[kind]))), _interval(changes[kind])])
        head = ['kind of error', *points, 'change', '95 % interval']
        chart = bars(pair.label, 'cost in points of AP50', groups)
        tables.append(Errors(pair, chart, (head, body), _sentence(changes)))
    return tables


def _signed(value: float | None) -> str:
    text = format_number(value, '+.1f')
    return '0.0' if text in ('+0.0', '-0.0') else text


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return 'none'
    low, high = paired_interval(values)
    return f'[{low:+.1f}, {high:+.1f}]'


def _sentence(changes: Mapping[str, Sequence[float]]) -> str:
    """Which kinds cost less and which more, where the interval over the seeds excludes 0."""
    n = len(changes[KINDS[0]])
    if n < 3:
        return f'n = {n}: a change of one kind proves nothing. Three seeds are the least.'
    means = {kind: float(np.mean(values)) for kind, values in changes.items()}
    less = [k for k in KINDS if paired_interval(changes[k])[1] < 0]
    more = [k for k in KINDS if paired_interval(changes[k])[0] > 0]
    if not less and not more:
        return 'No kind of error changed by more than it varies from seed to seed.'

    def listed(kinds: list[str]) -> str:
        kinds = sorted(kinds, key=lambda kind: -abs(means[kind]))
        return ', '.join(f'{kind} ({means[kind]:+.1f})' for kind in kinds)

    named = {'cost less': less, 'cost more': more}
    parts = [f'{how}: {listed(kinds)}' for how, kinds in named.items() if kinds]
    return f'With the terms on, these errors {"; these ".join(parts)}.'


def cost_table(summary: Summary) -> Table | None:
    """Size, arithmetic and speed of each network beside its teacher's; equal ones share a line."""
    measured = [row for row in summary.rows if row.params is not None]
    if not measured:
        return None
    teachers = {row.label: row for row in measured if row.role == 'teacher'}
    taught_by = {label: p.teacher for p in summary.pairs for label in (p.reference, p.label)}
    groups: dict[tuple, list[str]] = {}
    for row in measured:
        if row.role == 'teacher':
            whole = None
        elif len(teachers) == 1:
            (whole,) = teachers.values()
        else:
            whole = teachers.get(taught_by.get(row.label) or '')
        numbers = zip(_size(row), _size(whole), _FORMS, strict=True)
        cells = tuple(_beside(value, of_whole, *form) for value, of_whole, form in numbers)
        groups.setdefault((row.role == 'teacher', *cells), []).append(row.label)
    body = [['; '.join(labels), *cells] for (_, *cells), labels in groups.items()]
    return ['network', 'parameters', 'GFLOPs', 'images/s'], body


_FORMS = (('.2f', 1e-6, ' M'), ('.3g', 1.0, ''), ('.3g', 1.0, ''))


def _size(row: RowSummary | None) -> tuple[float | None, ...]:
    return (row.params, row.gflops, row.images_per_second) if row else (None,) * 3


def _beside(value: float | None, whole: float | None, form: str, scale: float, unit: str) -> str:
    if value is None:
        return 'n/a'
    share = f'\xa0({100 * value / whole:.0f}\xa0%)' if whole else ''
    return format(value * scale, form) + unit + share


def cost_sentence(pair: PairSummary, rows: Mapping[str, RowSummary]) -> str:
    """What the student costs beside its teacher, '' where neither was measured."""
    student, teacher = rows.get(pair.label), rows.get(pair.teacher or '')
    if student is None or teacher is None:
        return ''
    parts = []
    if student.params and teacher.params:
        parts.append(f'{100 * student.params / teacher.params:.0f} % of its parameters')
    if student.gflops and teacher.gflops:
        parts.append(f'{100 * student.gflops / teacher.gflops:.0f} % of its arithmetic')
    if student.images_per_second and teacher.images_per_second:
        speed = student.images_per_second / teacher.images_per_second
        parts.append(f'{speed:.2g} times its speed')
    if not parts or teacher.mean is None or student.mean is None:
        return ''
    return (
        f'{student.mean:.1f} mAP beside {teacher.mean:.1f} of the teacher, with {", ".join(parts)}.'
    )


def left_out(metrics: Metrics, results: str, work_dir: str) -> list[str]:
    """A sentence for each thing that the results do not hold, and how to get it."""
    details = {
        label: [m.get('detail') for m in of_seeds.values()] for label, of_seeds in metrics.items()
    }
    sentences = []
    without = [label for label, each in details.items() if any(d is None for d in each)]
    if without:
        sentences.append(
            f'AP by class, precision and recall and kinds of errors are left out for '
            f'{", ".join(without)}: an earlier mmkd made these results and did not keep them. To '
            f'get them, delete the lines of kind "run" of these networks from {results} and repeat '
            f'the command: what is trained in {work_dir} is only tested again, the rest is '
            'trained again'
        )
    known = [d for each in details.values() for d in each if d is not None]
    if any('precision' not in d for d in known):
        sentences.append(
            'AP by class and precision and recall are left out where the evaluator is no '
            'CocoMetric for boxes'
        )
    if many := max((d['class_count'] for d in known if d.get('classes', {}) is None), default=0):
        sentences.append(f'AP by class is left out: {many} classes are too many for a result')
    if why := sorted({d['errors_why'] for d in known if 'errors_why' in d}):
        sentences.append(f'kinds of errors are left out: {"; ".join(why)}')
    return sentences


def _networks(pair: PairSummary) -> list[str]:
    return [*([pair.teacher] if pair.teacher else []), pair.reference, pair.label]


def _of_detail(
    metrics: Metrics, label: str, read: Callable[[dict], Value | None]
) -> dict[int | None, Value]:
    """By seed, a part of a network's ``detail``, where there is one."""
    parts = {seed: read(m.get('detail', {})) for seed, m in metrics.get(label, {}).items()}
    return {seed: part for seed, part in parts.items() if part is not None}


def _common(pair: PairSummary, found: Mapping[str, Mapping]) -> list[int]:
    """The seeds of a pair that both have."""
    both = (found.get(pair.label, {}), found.get(pair.reference, {}))
    return [seed for seed in pair.seeds if all(seed in each for each in both)]
