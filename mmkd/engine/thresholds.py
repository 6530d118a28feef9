"""The score from which a detection counts as an object: best F1 per class on labelled images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU = 0.5
"""From which overlap on a detection is right."""
FEWEST = 5
"""Objects of a class below which it takes the threshold of all classes together."""


@dataclass(frozen=True)
class Threshold:
    """The best threshold of a class.

    Attributes:
        score: detections of at least this score count.
        f1: the F1 there, from 0 to 1.
        objects: how many of the class the images have.
        own: whether it was found on detections of this class, or is that of all classes.
    """

    score: float
    f1: float
    objects: int
    own: bool = True


def best_threshold(
    scores: np.ndarray, right: np.ndarray, objects: int
) -> tuple[float, float] | None:
    """The threshold of best F1, 2 · right / (detections + objects); of equal ones the highest.

    Args:
        scores: of the detections, (n,).
        right: whether each is an object, (n,); no object is found twice.
        objects: how many there are.

    Returns:
        The threshold, which is one of the scores, and its F1; None if no detection is right.
    """
    order = np.argsort(-scores, kind='stable')
    scores, hits = scores[order], np.cumsum(right[order])
    # Detections of one score are kept or dropped together.
    last = np.flatnonzero(np.diff(scores, append=-np.inf))
    f1 = 2 * hits[last] / (last + 1 + objects)
    if not len(last) or not hits[-1]:
        return None
    best = int(f1.argmax())
    return float(scores[last][best]), float(f1[best])


def match_detections(
    truth: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: int,
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Match detections with objects as COCO's evaluation does, at IoU 0.5: best score first.

    Args:
        truth: of each image boxes (n, 4) as x1, y1, x2, y2, labels (n,), and whether each is a
            crowd, or ignored otherwise, (n,).
        found: of each image boxes (m, 4), labels (m,) and scores (m,).
        classes: how many.

    Returns:
        Of each class the scores of its detections (n,), whether each is right (n,), and the number
        of objects. Detections that match an ignored region are left out.
    """

    def entries(boxes: np.ndarray, labels: np.ndarray, image: int) -> list[dict]:
        sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(float)
        return [
            dict(image_id=image, category_id=int(label), bbox=box, area=box[2] * box[3], iscrowd=0)
            for box, label in zip(sides.tolist(), labels, strict=True)
        ]

    objects: list[dict] = []
    detections: list[dict] = []
    most = 0
    for image, ((boxes, labels, ignored), (theirs, named, scores)) in enumerate(
        zip(truth, found, strict=True), 1
    ):
        for entry, crowd in zip(entries(boxes, labels, image), ignored, strict=True):
            objects.append({**entry, 'id': len(objects) + 1, 'iscrowd': int(crowd)})
        for entry, score in zip(entries(theirs, named, image), scores, strict=True):
            detections.append({**entry, 'score': float(score)})
        most = max(most, len(scores))
    counts = np.bincount([o['category_id'] for o in objects if not o['iscrowd']], None, classes)
    scores_of: list[list] = [[np.zeros(0)] for _ in range(classes)]
    right_of: list[list] = [[np.zeros(0, bool)] for _ in range(classes)]
    for each in _evaluated(objects, detections, len(truth), classes, most):
        counted = ~each['dtIgnore'][0].astype(bool)
        scores_of[each['category_id']].append(np.array(each['dtScores'])[counted])
        right_of[each['category_id']].append(each['dtMatches'][0][counted] > 0)
    return [
        (np.concatenate(scores), np.concatenate(right), int(n))
        for scores, right, n in zip(scores_of, right_of, counts, strict=True)
    ]


def _evaluated(
    objects: list[dict], detections: list[dict], images: int, classes: int, most: int
) -> list[dict]:
    """pycocotools' matches of each image and class that has objects or detections."""
    if not detections:
        return []
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dict(
            info={}, images=[dict(id=i + 1) for i in range(images)], annotations=objects,
            categories=[dict(id=i) for i in range(classes)],
        )  # fmt: skip
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), 'bbox')
        params = evaluation.params
        params.iouThrs, params.maxDets = np.array([IOU]), [most]
        params.areaRng, params.areaRngLbl = [[0, 1e10]], ['all']
        evaluation.evaluate()
    return [each for each in evaluation.evalImgs if each is not None]


def thresholds_of(matched: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> list[Threshold] | None:
    """The best threshold of each class; where nothing can be told of one, that of all together.

    Args:
        matched: see :func:`match_detections`.

    Returns:
        None if all together have fewer than ``FEWEST`` objects, or none is found.
    """
    scores, right = (np.concatenate([np.zeros(0), *(each[i] for each in matched)]) for i in (0, 1))
    objects = sum(n for *_, n in matched)
    every = best_threshold(scores, right, objects) if objects >= FEWEST else None
    if every is None:
        return None
    found = [best_threshold(s, r, n) if n >= FEWEST else None for s, r, n in matched]
    return [
        Threshold(*(own or every), n, own is not None)
        for own, (*_, n) in zip(found, matched, strict=True)
    ]
