"""From paired differences to a verdict: the interval of their mean and the word it allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MARGIN = 0.5
"""Smallest gain of interest, in mAP points: see :func:`judge`."""
LEVEL = 0.95


@dataclass(frozen=True)
class Verdict:
    """One distilled config against one reference. ``mean``, ``low`` and ``high`` in mAP points."""

    word: str
    mean: float
    low: float | None
    high: float | None
    n: int
    why: str


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of the mean of paired differences, with n - 1 degrees of freedom.

    Raises:
        ValueError: if there are fewer than two, or one is not finite.
    """
    values = _finite(differences)
    if len(values) < 2:
        raise ValueError(f'an interval needs two differences or more, not {len(values)}')
    n = len(values)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def judge(differences: Sequence[float], margin: float = MARGIN) -> Verdict:
    """Judges paired differences (distilled - reference, mAP points, one per seed).

    INCONCLUSIVE below three seeds, whatever they show. From three on: BEATS if the 95 % interval
    lies above 0, WORSE if it lies below, NO GAIN if it contains 0 and ends below ``margin``, the
    smallest gain of interest, else INCONCLUSIVE. Differences that are exactly equal and not 0 are
    INCONCLUSIVE too: the seed then has no effect on the runs, and there is one sample, not n.

    Raises:
        ValueError: if there is no difference, or one is not finite, or the margin is not positive.
    """
    values = _finite(differences)
    n = len(values)
    if n == 0:
        raise ValueError('no seed has both runs finished: there is nothing to judge')
    if not margin > 0:
        raise ValueError(f'the smallest gain of interest (--margin) must be above 0, not {margin}')
    mean = float(values.mean())
    if n == 1:
        return Verdict('INCONCLUSIVE', mean, None, None, n, 'one seed proves nothing')
    low, high = paired_interval(values.tolist())
    if n < 3:
        return Verdict('INCONCLUSIVE', mean, low, high, n, f'{n} seeds are too few, 3 are needed')
    if np.ptp(values) == 0 and mean != 0:
        why = f'all {n} differences are exactly equal: does the seed reach the runs?'
        return Verdict('INCONCLUSIVE', mean, low, high, n, why)
    word, why = interval_word(low, high, margin)
    return Verdict(word, mean, low, high, n, why)


def interval_word(low: float, high: float, margin: float = MARGIN) -> tuple[str, str]:
    """What an interval of a difference allows to say (see :func:`judge`), and why."""
    if low > 0:
        return 'BEATS', 'the interval lies above 0'
    if high < 0:
        return 'WORSE', 'the interval lies below 0'
    if high < margin:
        return 'NO GAIN', f'the interval contains 0 and ends below {margin:g}'
    return 'INCONCLUSIVE', (
        f'the interval contains 0 and reaches {margin:g} or more: more seeds would narrow it'
    )


def gap_share(student: float, reference: float, teacher: float) -> float | None:
    """(student - reference) / (teacher - reference); None where the teacher is not better."""
    return (student - reference) / (teacher - reference) if teacher > reference else None


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f'not a finite number among the differences: {list(values)}')
    return array
