"""What ``save_best`` of a checkpoint hook waits for, checked before hours of training."""

from __future__ import annotations

import difflib
from typing import Any

from mmdet.evaluation import CocoMetric
from mmengine.evaluator import BaseMetric, Evaluator

_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
"""What mmdet's CocoMetric gives of boxes and of masks unless ``metric_items`` says otherwise."""


def check_save_best(wanted: list[str], evaluator: Any) -> None:
    """Check that a validation can give what the best checkpoint is chosen by.

    Args:
        wanted: the names in ``save_best``, without ``auto``.
        evaluator: the validation's; what a class of its own gives is not judged.

    Raises:
        ValueError: a name that none of the evaluator's metrics gives, with the nearest that is.
    """
    if type(evaluator) is not Evaluator:
        return
    known = [_gives(metric) for metric in evaluator.metrics]
    for name in wanted:
        if any(given is None and name.startswith(begins) for begins, given in known):
            continue
        names = [each for _, given in known for each in given or []]
        if name in names:
            continue
        begin = [f'{begins}...' for begins, given in known if given is None]
        near = difflib.get_close_matches(name, names, 3, 0) + begin
        raise ValueError(
            f'default_hooks.checkpoint.save_best={name} is none of what val_evaluator gives, so no '
            f'best checkpoint would be chosen. Nearest: {", ".join(near) or "nothing"}'
        )


def _gives(metric: BaseMetric) -> tuple[str, list[str] | None]:
    """How the names of a metric's figures begin, and, where they are known, all of them."""
    begins = f'{metric.prefix}/' if metric.prefix else ''
    if type(metric) is not CocoMetric or metric.classwise:
        return begins, None
    if not {*metric.metrics} <= {'bbox', 'segm'}:
        return begins, None
    items = metric.metric_items or _ITEMS
    return begins, [f'{begins}{kind}_{item}' for kind in metric.metrics for item in items]
