"""Checks before training that the metrics that a config names can be computed, and are reported."""

from __future__ import annotations

import difflib
from typing import Any

from mmdet.evaluation import CityScapesMetric, CocoMetric, CocoPanopticMetric, SemSegMetric
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.detectors.panoptic_two_stage_segmentor import TwoStagePanopticSegmentor
from mmengine.evaluator import BaseMetric, Evaluator

_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
"""Default ``metric_items`` of MMDetection's CocoMetric, for boxes and masks."""
_RECALLS = ('AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000')
"""The same for proposals."""


def check_predictions(model: Any, evaluator: Any, who: str) -> None:
    """Check that a two-stage detector predicts what an evaluator scores.

    MMDetection notices only at the end of the first validation. A detector or RoI head that
    overrides ``predict`` is not checked.

    Args:
        model: the detector, unwrapped.
        evaluator: its metrics are checked one by one.
        who: its name in the config, val_evaluator or test_evaluator.

    Raises:
        ValueError: naming the metric and the way out.
    """
    head = getattr(model, 'roi_head', None)
    if not isinstance(model, TwoStageDetector) or head is None:
        return
    if not all(_predicts_as_mmdet(each) for each in (model, head)):
        return
    panoptic = isinstance(model, TwoStagePanopticSegmentor)
    for metric in getattr(evaluator, 'metrics', None) or []:
        if getattr(metric, 'format_only', False):
            continue
        name, scores = type(metric).__name__, getattr(metric, 'metrics', None) or ()
        coco = isinstance(metric, CocoMetric)
        if not head.with_mask and (
            isinstance(metric, CityScapesMetric) or (coco and 'segm' in scores)
        ):
            rest = [each for each in scores if each != 'segm'] or ['bbox']
            raise ValueError(
                f'{who}: {name} scores masks (segm), and this detector predicts none: its roi_head '
                'has no mask_head. '
                + (f'Write metric={rest!r}' if coco else 'Take another metric, or a Mask R-CNN')
            )
        if coco and 'proposal_fast' in scores:
            raise ValueError(
                f'{who}: {name} with proposal_fast scores the proposals of an RPN alone, and this '
                "detector predicts detections: metric='proposal' gives their recall, 'bbox' their "
                'mAP'
            )
        if isinstance(metric, (CocoPanopticMetric, SemSegMetric)) and not panoptic:
            raise ValueError(
                f'{who}: {name} scores a segmentation of the whole image, and this detector '
                "predicts boxes: take type='CocoMetric'"
            )


def _predicts_as_mmdet(module: Any) -> bool:
    """Whether ``predict`` is MMDetection's, with mmkd's around it or not."""
    owners = [cls.__module__ for cls in type(module).__mro__ if 'predict' in vars(cls)]
    return all(owner.split('.')[0] in ('mmdet', 'mmkd') for owner in owners)


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
    names = []
    for kind in metric.metrics:
        if kind in ('bbox', 'segm'):
            names += [f'{kind}_{item}' for item in metric.metric_items or _ITEMS]
        elif kind == 'proposal':
            names += metric.metric_items or _RECALLS
        else:
            names += [f'AR@{number}' for number in metric.proposal_nums]
    return begins, [f'{begins}{name}' for name in names]
