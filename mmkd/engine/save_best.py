"""Checks before training that the metrics that a config names will be reported."""

from __future__ import annotations

import difflib
from typing import Any

from mmdet.evaluation import CocoMetric
from mmengine.evaluator import BaseMetric, Evaluator

_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
"""Default ``metric_items`` of MMDetection's CocoMetric, for boxes and masks."""


def check_metrics(
    wanted: list[str], evaluator: Any, where: str = 'default_hooks.checkpoint.save_best',
    else_: str = 'no best checkpoint would be saved',
) -> None:  # fmt: skip
    """Check that the validation computes metrics that a config names.

    Args:
        wanted: their names.
        evaluator: of the validation; a custom class is not checked.
        where: the entry of the config that names them.
        else_: what would happen without them.

    Raises:
        ValueError: a name that no metric of the evaluator reports, with the nearest that one does.
    """
    if type(evaluator) is not Evaluator:
        return
    known = [_reported_names(metric) for metric in evaluator.metrics]
    for name in wanted:
        if any(given is None and name.startswith(begins) for begins, given in known):
            continue
        names = [each for _, given in known for each in given or []]
        if name in names:
            continue
        begin = [f'{begins}...' for begins, given in known if given is None]
        near = difflib.get_close_matches(name, names, 3, 0) + begin
        raise ValueError(
            f'{where}={name} is none of the metrics of val_evaluator: {else_}. '
            f'Nearest: {", ".join(near) or "nothing"}'
        )


def _reported_names(metric: BaseMetric) -> tuple[str, list[str] | None]:
    """The prefix of a metric's names, and all of its names if they are known."""
    begins = f'{metric.prefix}/' if metric.prefix else ''
    if type(metric) is not CocoMetric or metric.classwise:
        return begins, None
    if not {*metric.metrics} <= {'bbox', 'segm'}:
        return begins, None
    items = metric.metric_items or _ITEMS
    return begins, [f'{begins}{kind}_{item}' for kind in metric.metrics for item in items]
