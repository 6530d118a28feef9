"""The report of a comparison: one HTML file without network or script.

This file computes what the page shows; :file:`report.html.jinja` is the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.registry import DATASETS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from mmengine.fileio import get
from mmengine.registry import init_default_scope

from ...io.checkpoint import CheckpointError
from ..pages import jpeg_uri, render_page
from . import details
from .charts import forest_axis, log_charts
from .details import Metrics
from .errors import KINDS
from .origin import Origin
from .results import read_detections
from .table import Summary, columns, format_number, interval, pair_columns

SCORE_THRESHOLD = 0.3
IOU_THRESHOLD = 0.5
LONGEST = 640
"""Longer side of a picture in pixels."""


@dataclass
class Picture:
    """A test image with the ground truth and what each network found.

    ``truth`` and ``found`` hold boxes as (x1, y1, x2, y2) in pixels of the original image with the
    class's name ('' where there is one class), ``found`` by network's label with the score.
    """

    name: str
    width: int
    height: int
    data_uri: str
    truth: list[tuple[list[float], str]]
    found: dict[str, list[tuple[list[float], str, float]]]


@dataclass
class Mark:
    """A box drawn in a picture, in its pixels: ``kind`` is truth, right, wrong or missed."""

    box: Sequence[float]
    kind: str
    text: str
    x: float
    y: float
    size: float


@dataclass
class Panel:
    """The picture once, with one network's marks, or those of the ground truth."""

    title: str
    words: str
    marks: list[Mark]


def collect_pictures(
    cfg: Config,
    detections: Mapping[str, Path],
    count: int,
    missing: list[str] | None = None,
) -> list[Picture]:
    """Takes ``count`` images at equal distances through the test set, so that nobody chose them.

    Args:
        cfg: a test config; its ``test_dataloader.dataset`` gives images and ground truth.
        detections: by network's label, the file that ``tools/test.py --out`` wrote; those with a
            score below ``SCORE_THRESHOLD`` are left out.
        count: how many images.
        missing: takes a sentence for each network whose detections cannot be read; None: that
            raises.
    """
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    classes = dataset.metainfo['classes']
    if len(classes) == 1:
        classes = ['']
    by_image: dict[str, dict] = {}
    for label, path in detections.items():
        try:
            by_image[label] = {sample['img_id']: sample for sample in read_detections(path)}
        except (CheckpointError, OSError, KeyError) as error:
            if missing is None:
                raise
            missing.append(f'{label}: {error}')
    pictures = []
    for index in sorted(set(np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int))):
        info = dataset.get_data_info(int(index))
        image = cv2.imdecode(np.frombuffer(get(info['img_path']), np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f'{info["img_path"]} is not an image that OpenCV can read')
        height, width = image.shape[:2]
        truth = [
            (list(map(float, instance['bbox'])), classes[instance['bbox_label']])
            for instance in info['instances']
            if not instance.get('ignore_flag')
        ]
        found = {}
        for label, samples in by_image.items():
            if info['img_id'] in samples:
                predicted = samples[info['img_id']]['pred_instances']
                fields = (np.asarray(predicted[k]).tolist() for k in ('bboxes', 'labels', 'scores'))
                rows = zip(*fields, strict=True)
                found[label] = [(b, classes[c], s) for b, c, s in rows if s >= SCORE_THRESHOLD]
        uri = jpeg_uri(image, LONGEST)
        pictures.append(Picture(Path(info['img_path']).name, width, height, uri, truth, found))
    return pictures


def match(
    truth: Sequence[tuple[Sequence[float], str]],
    found: Sequence[tuple[Sequence[float], str, float]],
    iou: float = IOU_THRESHOLD,
) -> tuple[list[bool], list[bool]]:
    """Matches detections to true boxes: best score first, each detection takes the free box of its
    class that it overlaps most.

    Returns:
        For each detection whether it is right (IoU of ``iou`` or more), for each true box whether
        it was found.
    """
    right, taken = [False] * len(found), [False] * len(truth)
    for i in sorted(range(len(found)), key=lambda i: -found[i][2]):
        box, name, _ = found[i]
        free = [j for j, (_, other) in enumerate(truth) if other == name and not taken[j]]
        if free:
            boxes = torch.tensor([truth[j][0] for j in free], dtype=torch.float64)
            best, index = bbox_overlaps(boxes.new_tensor([box]), boxes)[0].max(0)
            right[i] = taken[free[int(index)]] = bool(best >= iou)
    return right, taken


def render(
    summary: Summary,
    curves: Mapping[str, list[dict]],
    pictures: Sequence[Picture] = (),
    missing: Sequence[str] = (),
    metrics: Metrics | None = None,
    origin: Origin | None = None,
) -> str:
    """Renders the page.

    Args:
        summary: see :func:`.table.summarise`.
        curves: by row's label, what the trainings logged, one entry per seed
            (:func:`.results.read_curves`).
        pictures: see :func:`collect_pictures`.
        missing: a sentence for each network that is not in them, or for all.
        metrics: by row's label and seed, what :func:`.measure.score` returned.
        origin: where all this comes from.
    """
    metrics = metrics or {}
    trained = [row for row in summary.rows if row.role != 'teacher']
    order = {row.label: i for i, row in enumerate(trained)}
    curves = {label: of_seeds for label, of_seeds in curves.items() if of_seeds and label in order}
    judged = [pair for pair in summary.pairs if pair.verdict is not None]
    by_seed = [
        [row.label, *(format_number(row.by_seed.get(seed), '.2f') for seed in summary.seeds)]
        for row in trained
    ]
    rows = {row.label: row for row in summary.rows}
    files = dict(origin.facts) if origin else {}
    return render_page(
        Path(__file__).with_name('report.html.jinja'),
        summary=summary,
        interval=interval,
        numbers=columns(summary),
        costs=details.cost_table(summary),
        cost_sentence=lambda pair: details.cost_sentence(pair, rows),
        differences=pair_columns(summary),
        by_seed=(['network', *(f'seed {seed}' for seed in summary.seeds)], by_seed),
        judged=judged,
        forest_axis=forest_axis(judged, summary.margin),
        thresholds=details.threshold_table(summary, metrics),
        classes=details.class_table(summary, metrics),
        precision=details.precision_charts(summary, metrics),
        errors=details.error_tables(summary, metrics),
        kinds=KINDS,
        left_out=details.left_out(
            metrics,
            files.get('results', 'the results file'),
            files.get('work folder', 'the work folder'),
        ),
        order=order,
        drawn=list(curves),
        charts=log_charts(curves),
        pictures=[(picture, _panels(picture)) for picture in pictures],
        missing=missing,
        origin=origin,
        score_threshold=SCORE_THRESHOLD,
        iou_threshold=IOU_THRESHOLD,
    )


def _panels(picture: Picture) -> list[Panel]:
    """The ground truth, then what each network found of it."""
    unit = max(picture.width, picture.height) / 100
    size = 5.2 * unit

    def mark(box: Sequence[float], kind: str, text: str = '') -> Mark:
        # The text stays inside the picture: above the box where there is room, or below, where
        # what was missed is named, since a wrong detection may lie in the same place.
        above, below = box[1] - unit, min(box[3] + size, picture.height - unit)
        fits = box[1] > size + unit, box[3] + size + unit < picture.height
        y = (below if fits[1] else above) if kind == 'missed' else (above if fits[0] else below)
        x = min(max(box[0], 0), picture.width - 0.55 * size * len(text))
        return Mark(box, kind, text, x, y, size)

    count = len(picture.truth)
    marks = [mark(box, 'truth', name) for box, name in picture.truth]
    panels = [Panel('ground truth', f'{count} object{"" if count == 1 else "s"}', marks)]
    for label, found in picture.found.items():
        right, taken = match(picture.truth, found)
        hits = zip(picture.truth, taken, strict=True)
        marks = []
        for (box, name, score), hit in zip(found, right, strict=True):
            text = f'{name} {100 * score:.0f}'.strip()
            marks.append(mark(box, 'right' if hit else 'wrong', text))
        marks += [mark(box, 'missed', f'× {name}'.strip()) for (box, name), hit in hits if not hit]
        wrong = len(found) - sum(right)
        panels.append(Panel(label, f'{sum(taken)} of {count} found, {wrong} wrong', marks))
    return panels
