"""The arithmetic of a study: contrasts, the number of seeds, intervals over seeds and images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..comparison.statistics import LEVEL

DRAWS = 1000
"""Samples of a bootstrap."""
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Pooled:
    """``sd`` of the difference of two arms with one seed, and its degrees of freedom."""

    sd: float
    dof: int
    arms: int
    seeds: int


def pool(maps: Sequence[Sequence[float]]) -> Pooled | None:
    r"""Pools the variance of paired differences over arms, within seeds.

    ``maps`` are the mAPs of each arm (points), one per seed, in one order of seeds. With an effect
    of each arm and one of each seed taken out, what is left of an mAP is

    .. math:: e_{as} = y_{as} - \bar y_{a\cdot} - \bar y_{\cdot s} + \bar y_{\cdot\cdot},
        \qquad s^2 = \frac{\sum_{as} e_{as}^2}{(A - 1)(S - 1)},

    and the variance of a difference within one seed is :math:`2 s^2`: the mean over all pairs of
    arms of the variance of their paired differences. It holds if all arms vary alike. Of two arms,
    it is the variance of their paired differences.

    Returns:
        None where there are not two arms and two seeds.
    """
    y = np.asarray(maps, dtype=np.float64)
    if y.ndim != 2 or min(y.shape) < 2:
        return None
    left = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    dof = (y.shape[0] - 1) * (y.shape[1] - 1)
    return Pooled(math.sqrt(2 * (left**2).sum() / dof), dof, *y.shape)


def contrast_interval(mean: float, pooled: Pooled, declared: int = 1) -> tuple[float, float]:
    """Interval of a mean paired difference at the pooled variance, corrected after Bonferroni.

    ``mean ± t(1 - (1 - 0.95) / (2 declared), dof) * sd / sqrt(seeds)``: all ``declared`` intervals
    together cover with 95 %.
    """
    half = stats.t.ppf(1 - (1 - LEVEL) / (2 * declared), pooled.dof)
    half *= pooled.sd / math.sqrt(pooled.seeds)
    return mean - half, mean + half


def seeds_needed(sd: float, margin: float, power: float = 0.8) -> tuple[int, int]:
    """How many seeds a margin (points) needs at a standard deviation of paired differences.

    Returns:
        The least number at which the expected half width of the 95 % interval (paired t) is at
        most ``margin``, and the least at which a true difference of ``margin`` is found (the
        interval excludes 0) with probability ``power``; at most :data:`MOST_SEEDS` each.

    Raises:
        ValueError: if the margin is not above 0.
    """
    if not margin > 0 or not math.isfinite(margin):
        raise ValueError(f'--power must be a margin in mAP points above 0, not {margin}')
    n = np.arange(2, MOST_SEEDS + 1)
    critical = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    narrow = critical * sd <= margin * np.sqrt(n)
    if sd == 0:
        return 2, 2
    shift = margin * np.sqrt(n) / sd
    # Beyond a shift of 30 the non-central t is numerically idle, and the power is 1.
    found = np.where(shift > 30, 1.0, stats.nct.sf(critical, n - 1, np.minimum(shift, 30)))
    enough = (int(n[ok.argmax()]) if ok.any() else MOST_SEEDS for ok in (narrow, found >= power))
    first, second = enough
    return first, second


@dataclass(frozen=True)
class Bootstrap:
    """95 % interval of a difference (points), and the 2.5 % end of the share of the gap."""

    low: float
    high: float
    share: float | None


def bootstrap(
    student: np.ndarray, reference: np.ndarray, teacher: np.ndarray | float | None = None
) -> Bootstrap | None:
    """Percentile bootstrap of student - reference, over seeds and, where given, over images.

    Args:
        student, reference: mAP (points) by seed, of shape (S,), or (:data:`DRAWS`, S): each row on
            one resample of the test images, the same for all networks.
        teacher: its mAP, or one for each resample.

    Each draw takes S seeds with replacement, the same for both. So few samples spread too little:
    the deviation of a draw's mean over seeds from that over all of them is stretched by
    ``t(S - 1) / z * sqrt(S / (S - 1))``, at which normal means get the width of Student's t.

    Returns:
        None below three seeds. ``share`` is None without a teacher, or where more than 2.5 % of the
        draws have a teacher that is not above the reference.
    """
    n = student.shape[-1]
    if n < 3:
        return None
    picked = np.random.default_rng(0).integers(n, size=(DRAWS, n))
    wide = stats.t.ppf((1 + LEVEL) / 2, n - 1) / stats.norm.ppf((1 + LEVEL) / 2)
    wide *= math.sqrt(n / (n - 1))

    def resample(maps: np.ndarray) -> np.ndarray:
        maps = np.broadcast_to(maps, (DRAWS, n))
        mean = maps.mean(1)
        return mean + wide * (np.take_along_axis(maps, picked, 1).mean(1) - mean)

    of_student, of_reference = resample(student), resample(reference)
    gain = of_student - of_reference
    low, high = np.percentile(gain, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    share = None
    if teacher is not None:
        gap = np.broadcast_to(teacher, DRAWS) - of_reference
        shares = np.where(gap > 0, gain / np.where(gap > 0, gap, 1), -np.inf)
        end = np.percentile(shares, 50 * (1 - LEVEL), method='lower')
        share = float(end) if np.isfinite(end) else None
    return Bootstrap(float(low), float(high), share)
