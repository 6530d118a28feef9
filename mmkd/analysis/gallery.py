"""A page of a teacher's boxes by score, so that a person sees what a threshold does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..datasets.teacher_labels import Labels
from .pages import jpeg_uri, render_page

STEPS = tuple(i / 10 for i in range(1, 10))
"""Thresholds of the table, after the file's own ``min_score``."""
CLASSES = 12
"""Classes with a column of their own: those with most boxes."""
SIDE = 160
"""Longer side of a picture in pixels."""
AROUND = 0.4
"""How much of the image is shown on each side of a box, as a share of the box's longer side."""


@dataclass
class Crop:
    """A part of an image with one box, in pixels of the part.

    Attributes:
        words: class, score and the image's name.
    """

    data_uri: str
    width: float
    height: float
    box: tuple[float, float, float, float]
    words: tuple[str, str, str]


@dataclass
class Bin:
    """The boxes with a score from ``low`` to below ``high``, and some of them."""

    low: float
    high: float
    count: int
    crops: list[Crop]


def write_gallery(out: Path, labels: Labels, paths: Mapping[str, str], count: int) -> None:
    """Write the page.

    Args:
        out: the ``.html`` file.
        labels: the teacher's.
        paths: where each image is, by its name.
        count: the most boxes shown, as many of each range of scores, at equal distances in the
            order of the scores.
    """
    steps = [s for s in STEPS if s > labels.info.get('min_score', 0)]
    thresholds = [labels.info.get('min_score', 0.0), *steps]
    boxes = [
        (float(score), name, i)
        for name, image in labels.images.items()
        for i, score in enumerate(image.scores)
    ]
    boxes.sort(key=lambda box: -box[0])
    scores = np.array([score for score, *_ in boxes])
    bins = []
    for low, high in reversed(list(zip(thresholds, [*steps, np.inf], strict=True))):
        inside = np.flatnonzero((scores >= low) & (scores < high))
        most = max(1, count // len(thresholds))
        shown = inside[
            np.unique(np.linspace(0, len(inside) - 1, min(most, len(inside)), dtype=int))
        ]
        crops = [_crop(labels, boxes[i], paths) for i in shown]
        bins.append(Bin(low, min(high, 1.0), len(inside), [c for c in crops if c is not None]))
    page = render_page(
        Path(__file__).with_name('gallery.html.jinja'),
        info=labels.info, images=len(labels.images), table=_table(labels, thresholds), bins=bins,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding='utf-8')


def _table(labels: Labels, thresholds: list[float]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: how many boxes are kept from which score on."""
    images = list(labels.images.values())
    named = np.concatenate([np.zeros(0, int), *(image.labels for image in images)])
    scores = np.concatenate([np.zeros(0), *(image.scores for image in images)])
    best = np.array([image.scores.max(initial=0) for image in images])
    totals = np.bincount(named, minlength=len(labels.classes))
    columns = np.argsort(-totals, kind='stable')[:CLASSES]
    head = ['score from', 'boxes', 'per image', 'images without']
    head += [labels.classes[c] for c in columns]
    others = len(totals) > CLASSES
    rows = []
    for threshold in thresholds:
        kept = named[scores >= threshold]
        counts = np.bincount(kept, minlength=len(totals))
        row = [f'{threshold:g}', f'{len(kept):,}', f'{len(kept) / max(1, len(images)):.1f}']
        row.append(f'{(best < threshold).mean() if len(best) else 0:.0%}')
        row += [f'{counts[c]:,}' for c in columns]
        rows.append(row + [f'{len(kept) - counts[columns].sum():,}'] * others)
    return head + [f'{len(totals) - CLASSES} others'] * others, rows


def _crop(labels: Labels, box: tuple[float, str, int], paths: Mapping[str, str]) -> Crop | None:
    score, name, index = box
    image = labels.images[name]
    pixels = cv2.imread(paths[name], cv2.IMREAD_COLOR)
    if pixels is None:
        return None
    # A loader of the config's own may give another size than OpenCV.
    scale = np.array([pixels.shape[1] / image.width, pixels.shape[0] / image.height] * 2)
    x1, y1, x2, y2 = image.boxes[index] * scale
    edge = max(AROUND * max(x2 - x1, y2 - y1), 8)
    left, top = (int(max(0, v - edge)) for v in (x1, y1))
    part = pixels[top : int(np.ceil(y2 + edge)), left : int(np.ceil(x2 + edge))]
    height, width = part.shape[:2]
    inside = (float(x1) - left, float(y1) - top, float(x2) - left, float(y2) - top)
    words = (labels.classes[image.labels[index]], f'{score:.2f}', name)
    return Crop(jpeg_uri(part, SIDE), width, height, inside, words)
