"""What each kind of error costs a detector, in AP50.

The kinds are those of TIDE (Bolya, Foley, Hays and Hoffman, *TIDE: A General Toolbox for
Identifying Object Detection Errors*, ECCV 2020), with its thresholds, 0.5 and 0.1. Detections are
matched to objects as COCO does it: best score first, each takes the free object of its class that
it overlaps most, if by an IoU of 0.5 or more. A detection that takes none is of the first kind that
fits:

==============  ================================================================================
localisation    its best IoU with an object of its class is from 0.1 to below 0.5
classification  its best IoU with an object of another class is 0.5 or more
duplicate       its best IoU with an object of its class is 0.5 or more: a better one took that
background      its IoU with every object is below 0.1
both            none of these: another class, and an IoU from 0.1 to below 0.5
==============  ================================================================================

An object is missed if no detection takes it and no localisation or classification error is about
it.

A kind costs what AP50 rises by if its errors alone are fixed. A localisation or classification
error becomes right; of several detections of one object the best score stays, and the others are
removed. Errors of the other kinds are removed, and missed objects are no longer looked for. The
costs do not add up to what AP50 lacks: one error hides another.

The authors' own tidecv, last released in 2020, removes a localisation or classification error whose
object another detection has taken, whichever score is better, and so reports less for these two;
the other four agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps

KINDS = ('classification', 'localisation', 'both', 'duplicate', 'background', 'missed')
FOREGROUND = 0.5
BACKGROUND = 0.1
RECALLS = np.linspace(0, 1, 101)
"""Where COCO's AP reads the precision."""


@dataclass
class Image:
    """The objects of an image and the detections in it; boxes are (x1, y1, x2, y2).

    Attributes:
        boxes: (G, 4), the objects.
        labels: (G,), their classes.
        crowds: (C, 4), groups of objects: a detection is no error if half of its area or more lies
            in a group of its class.
        crowd_labels: (C,).
        found: (D, 4), the detections.
        found_labels: (D,).
        scores: (D,).
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray
    crowd_labels: np.ndarray
    found: np.ndarray
    found_labels: np.ndarray
    scores: np.ndarray


def error_costs(images: Iterable[Image]) -> dict[str, float]:
    """By kind, the rise of AP50 (a fraction of 1) if its errors are fixed."""
    kinds, targets, scores, labels, objects = [], [], [], [], []
    before = 0
    for image in images:
        kind, target = judge_image(image)
        counts = kind != 'ignored'
        kinds.append(kind[counts])
        targets.append(np.where(target < 0, -1, target + before)[counts])
        scores.append(image.scores[counts])
        labels.append(image.found_labels[counts])
        objects.append(image.labels)
        before += len(image.labels)
    if not before:
        return dict.fromkeys(KINDS, 0.0)
    kind, target = np.concatenate(kinds), np.concatenate(targets)
    score, label, truth = np.concatenate(scores), np.concatenate(labels), np.concatenate(objects)
    count = np.bincount(truth)
    right = kind == 'right'
    now = mean_ap(score, label, right, count)
    missed = np.bincount(np.delete(truth, target[target >= 0]), minlength=len(count))
    costs = {'missed': mean_ap(score, label, right, count - missed) - now}
    for name in KINDS[:-1]:
        fixed, kept, named = right.copy(), kind != name, label.copy()
        if name in ('classification', 'localisation'):
            about = np.flatnonzero(right | ~kept)
            about = about[np.argsort(-score[about], kind='stable')]
            best = about[np.unique(target[about], return_index=True)[1]]
            kept[about] = fixed[about] = False
            kept[best] = fixed[best] = True
            named[best] = truth[target[best]]
        costs[name] = mean_ap(score[kept], named[kept], fixed[kept], count) - now
    # The precision is read at 101 recalls, which can make a cost of 0 look negative.
    return {name: max(0.0, costs[name]) for name in KINDS}


def judge_image(image: Image) -> tuple[np.ndarray, np.ndarray]:
    """What each detection is, and which object it is about.

    Returns:
        (D,) of ``'right'``, ``'ignored'`` (in a crowd) or a kind of error; (D,) indices of objects,
        -1 where the detection is about none.
    """
    overlap = _overlaps(image.found, image.boxes)
    same = image.found_labels[:, None] == image.labels[None]
    # A column of zeros: an object that nothing overlaps, where an image has no other.
    own = np.pad(np.where(same, overlap, 0), ((0, 0), (0, 1)))
    other = np.pad(np.where(same, 0, overlap), ((0, 0), (0, 1)))
    best_own, best_other = own.max(1), other.max(1)
    kind = np.select(
        [
            (best_own >= BACKGROUND) & (best_own < FOREGROUND),
            best_other >= FOREGROUND,
            best_own >= FOREGROUND,
            np.maximum(best_own, best_other) < BACKGROUND,
        ],
        ['localisation', 'classification', 'duplicate', 'background'],
        'both',
    )
    inside = _overlaps(image.found, image.crowds, 'iof')
    inside *= image.found_labels[:, None] == image.crowd_labels[None]
    kind[(inside >= FOREGROUND).any(1)] = 'ignored'
    free = own.copy()
    target = np.full(len(kind), -1)
    for index in np.argsort(-image.scores, kind='stable'):
        best = int(free[index].argmax())
        if free[index, best] >= FOREGROUND:
            kind[index], target[index] = 'right', best
            free[:, best] = 0
    for name, overlaps in (('localisation', own), ('classification', other)):
        target[kind == name] = overlaps[kind == name].argmax(1)
    return kind, target


def _overlaps(a: np.ndarray, b: np.ndarray, mode: str = 'iou') -> np.ndarray:
    first, second = (torch.as_tensor(np.reshape(x, (-1, 4)), dtype=torch.float64) for x in (a, b))
    return bbox_overlaps(first, second, mode).numpy()


def mean_ap(
    scores: np.ndarray, labels: np.ndarray, right: np.ndarray, objects: np.ndarray
) -> float:
    """COCO's AP at one IoU, the mean over classes that have objects.

    Args:
        scores: (N,) of the detections, in any order.
        labels: (N,), their classes.
        right: (N,), whether each has taken an object.
        objects: how many there are of each class.
    """
    values = []
    for label in np.flatnonzero(objects > 0):
        of_class = np.flatnonzero(labels == label)
        of_class = of_class[np.argsort(-scores[of_class], kind='stable')]
        hits = np.cumsum(right[of_class])
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        values.append(precision[np.searchsorted(hits / objects[label], RECALLS)].mean())
    # Without an object left to find, nothing is missed.
    return float(np.mean(values)) if values else 1.0
