"""COCO's mAP on resamples of the test images, from the detections that a run has left."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope

from ..comparison.measure import COCOeval, evaluate
from ..comparison.plan import Run
from ..comparison.results import read_detections
from .statistics import DRAWS

_AT_ONCE = 100
"""Draws that are computed together: as large as memory is."""


def resampled_maps(run: Run, detections: Path, expected: float) -> np.ndarray:
    """mAP (points) on :data:`.statistics.DRAWS` resamples of the test images, of that shape.

    All runs on the same images get the same resamples.

    Raises:
        OSError: if the detections are not there.
        ValueError: if the evaluator is none of COCO's, or the detections do not give the mAP
            (fraction) that is ``expected``.
    """
    cfg = run.test_cfg.copy()
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    predictions = read_detections(detections)
    if not any(len(sample['pred_instances']['bboxes']) for sample in predictions):
        return np.zeros(DRAWS)  # of which COCO's evaluator reports nothing
    with contextlib.redirect_stdout(io.StringIO()):
        metainfo = DATASETS.build(cfg.test_dataloader.dataset).metainfo
        evaluations = evaluate(cfg, predictions, metainfo)[1]
    if len(evaluations) != 1:
        raise ValueError('the evaluator is not CocoMetric')
    (found,) = evaluations
    images = len(found.params.imgIds)
    if abs(weighted_map(found, np.ones((1, images), int))[0] - expected) > 1e-6:
        raise ValueError(f'{detections} is of another test than the results of {run.name}')
    weights = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), DRAWS)
    parts = [weights[i : i + _AT_ONCE] for i in range(0, DRAWS, _AT_ONCE)]
    return 100 * np.concatenate([weighted_map(found, part) for part in parts])


def weighted_map(evaluation: COCOeval, weights: np.ndarray) -> np.ndarray:
    """mAP of a COCO evaluation in which each image counts as often as its weight says.

    It is the mAP of the data set with those copies, to the order of equal scores: two copies of a
    detection come after one another, and no recall is first reached between them.

    Args:
        evaluation: after ``evaluate()``.
        weights: whole numbers of shape (draws, images), in the order of ``params.imgIds``.

    Returns:
        Fractions of shape (draws,), over the classes that a draw has objects of.
    """
    params = evaluation.params
    images, areas = len(params.imgIds), len(params.areaRng)
    most = 100 if 100 in params.maxDets else params.maxDets[-1]
    total, classes = np.zeros(len(weights)), np.zeros(len(weights))
    for k in range(len(params.catIds)):
        start = k * areas * images  # the first area is all
        cells = [
            (i, cell)
            for i, cell in enumerate(evaluation.evalImgs[start : start + images])
            if cell is not None
        ]
        if not cells:
            continue
        objects = np.zeros(images, int)
        for i, cell in cells:
            objects[i] = (np.asarray(cell['gtIgnore']) == 0).sum()
        count = weights @ objects
        classes += count > 0
        scores = np.concatenate([cell['dtScores'][:most] for _, cell in cells])
        order = np.argsort(-scores, kind='mergesort')
        at = np.concatenate([np.full(len(cell['dtScores'][:most]), i) for i, cell in cells])[order]
        matched, ignored = (
            np.concatenate([cell[name][:, :most] for _, cell in cells], 1)[:, order].astype(bool)
            for name in ('dtMatches', 'dtIgnore')
        )
        of_detection = weights[:, at]
        seen = np.cumsum(of_detection, 1)
        for right, idle in zip(matched, ignored, strict=True):
            hits = np.flatnonzero(right & ~idle)
            if not len(hits):
                continue
            all_seen = np.cumsum(of_detection * ~idle, 1) if idle.any() else seen
            found = np.cumsum(of_detection[:, hits], 1)
            precision = found / np.maximum(all_seen[:, hits], 1)
            precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            recall = found / np.maximum(count, 1)[:, None]
            reached = np.searchsorted(params.recThrs, recall, side='right')
            steps = np.diff(reached, axis=1, prepend=0) * (count > 0)[:, None]
            total += (precision * steps).sum(1) / len(params.recThrs) / len(matched)
    return total / np.maximum(classes, 1)
