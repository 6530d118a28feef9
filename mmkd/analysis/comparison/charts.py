"""The curves and bars of the report, as numbers that the template draws.

No axis is shorter than a difference that matters: an mAP has 10 points or more and begins at 0, a
difference in mAP 4 points, so that a tenth of a point looks like one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .table import PairSummary

SHORTEST = 10.0
"""Of an axis of mAP or AP50, in points."""
SHORTEST_DIFFERENCE = 2.0
"""To each side of 0, on an axis of differences in mAP, in points."""


@dataclass
class Axis:
    """Maps [low, high] to [start, end], in units of a drawing."""

    ticks: list[float]
    low: float
    high: float
    start: int
    end: int

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return self.start + share * (self.end - self.start)


@dataclass
class Chart:
    """Curves of one quantity by network's label, and what they show in words."""

    title: str
    unit: str
    lines: dict[str, list[tuple[float, float]]]
    x: Axis
    y: Axis
    x_title: str
    words: str


@dataclass
class Bars:
    """A group of bars for each name: the value of each network, by its label."""

    title: str
    unit: str
    groups: dict[str, dict[str, float]]
    x: Axis
    words: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * min((f for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999), default=10)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return [float(i * step) for i in np.arange(first, last + 1)]


def forest_axis(judged: Sequence[PairSummary], margin: float) -> Axis:
    """Covers all intervals, 0 and the margin."""
    ends = [-SHORTEST_DIFFERENCE, SHORTEST_DIFFERENCE, margin]
    for pair in judged:
        verdict = pair.verdict
        assert verdict is not None
        ends += [v for v in (verdict.mean, verdict.low, verdict.high) if v is not None]
    marks = ticks(min(ends), max(ends), 6)
    return Axis(marks, marks[0], marks[-1], 30, 670)


def mean_curve(curves: Sequence[dict], x_name: str, y_name: str) -> list[tuple[float, float]]:
    """Mean over seeds, interpolated at the iterations of the first."""
    lines = []
    for curve in curves:
        pairs = [
            (a, b)
            for a, b in zip(curve.get(x_name, []), curve.get(y_name, []), strict=False)
            if b is not None
        ]
        if pairs:
            lines.append(np.asarray(pairs, dtype=float))
    if not lines:
        return []
    xs = lines[0][:, 0]
    ys = np.mean([np.interp(xs, line[:, 0], line[:, 1]) for line in lines], axis=0)
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def log_charts(curves: Mapping[str, list[dict]]) -> list[Chart]:
    """mAP, the sum of all losses, the student's own losses, then those of the distillation."""
    train = [curve['train'] for of_seeds in curves.values() for curve in of_seeds]
    names = {name for entry in train for name in entry if name != 'iter'}
    quantities = [('val', 'mAP', 'points, validation split')]
    for name in sorted(names, key=lambda name: (name != 'loss', name.startswith('loss_kd'), name)):
        unit = 'distillation term, weighted' if name.startswith('loss_kd') else 'loss, weighted'
        quantities.append(('train', name, 'sum of all' if name == 'loss' else unit))
    charts = []
    for part, name, unit in quantities:
        lines = {
            label: mean_curve([curve[part] for curve in of_seeds], 'iter', name)
            for label, of_seeds in curves.items()
        }
        lines = {label: line for label, line in lines.items() if line}
        if lines:
            charts.append(_log_chart(name, unit, lines))
    return charts


def _log_chart(title: str, unit: str, lines: dict[str, list[tuple[float, float]]]) -> Chart:
    points = [point for line in lines.values() for point in line]
    last = max(iteration for iteration, _ in points)
    values = [value for _, value in points]
    marks = ticks(min(0, *values), max(SHORTEST if title == 'mAP' else 0, *values), 4)
    x = Axis([t for t in ticks(0, last, 4) if t <= last * 1.001], 0, last, 54, 436)
    ends = '; '.join(f'{label} ends at {line[-1][1]:.3g}' for label, line in lines.items())
    y = Axis(marks, marks[0], marks[-1], 210, 12)
    return Chart(title, unit, lines, x, y, 'iteration', f'over iterations: {ends}')


def precision_chart(title: str, curves: Mapping[str, Sequence[float]]) -> Chart:
    """Precision over recall, both in percent.

    Args:
        title: above the chart.
        curves: by network's label, the precision at recalls from 0 to 1, at equal distances.
    """
    lines = {
        label: list(zip(np.linspace(0, 100, len(curve)), 100 * np.asarray(curve), strict=True))
        for label, curve in curves.items()
    }
    half = '; '.join(f'{k} {100 * curve[len(curve) // 2]:.0f} %' for k, curve in curves.items())
    marks = [0.0, 25.0, 50.0, 75.0, 100.0]
    x, y = Axis(marks, 0, 100, 54, 436), Axis(marks, 0, 100, 210, 12)
    words = f'over recall. Precision at a recall of 50 %: {half}'
    return Chart(title, 'precision in %, IoU 0.5', lines, x, y, 'recall in %', words)


def bars(title: str, unit: str, groups: dict[str, dict[str, float]]) -> Bars:
    """Bars from 0, on an axis of at least ``SHORTEST`` points."""
    highest = max((value for group in groups.values() for value in group.values()), default=0)
    marks = ticks(0, max(SHORTEST, highest), 4)
    each = (
        f'{name}: ' + ', '.join(f'{label} {value:.1f}' for label, value in group.items())
        for name, group in groups.items()
    )
    return Bars(title, unit, groups, Axis(marks, 0, marks[-1], 110, 410), '; '.join(each))
