"""What a labeller does on labelled images: is it any good there, and from which score on?"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.logging import print_log

from ..datasets.annotations import boxes_of
from ..datasets.teacher_labels import Images, LabelsError, read_labels
from ..datasets.unlabelled import image_infos
from ..recipe import TeacherError
from ..shipped import command
from .labeller import Labeller, labeller_of
from .pseudo_labels import by_main, label_images
from .random_state import random_state_kept
from .teacher_check import BOXES, CLASS_RATIO, MIN_TRAIN_RECALL, OFF
from .thresholds import FEWEST, Threshold, match_detections, thresholds_of

TRIED = 64
"""Labelled images on which a detector is tried before it labels others."""


def best_thresholds(
    cfg: Config,
    out: str | Path | None = None,
    *,
    teacher: Any = None,
    clean_view: bool = False,
    workers: int = 2,
    check: Callable[[], None] | None = None,
) -> list[Threshold]:
    """The score of best F1 of each class on the pair's validation images, at IoU 0.5.

    The test split is not touched. All processes of a distributed job have to call it.

    Args:
        cfg: of a pair.
        out: where the teacher's detections on these images are kept, so that a resumed run does not
            make them again; None: nowhere.
        teacher: see :func:`labeller_of`.
        clean_view: whether the teacher sees images as its own config's test does, as the labels of
            clean images are made; else as the pair's validation does, at the teacher's scale.
        workers: processes that load images.
        check: see :func:`label_images`.

    Returns:
        One of each of the student's classes, in its order.

    Raises:
        LabelsError: there is no validation data, or it has too few objects.
        TeacherError: the teacher finds none of them.
    """
    data = (cfg.get('val_dataloader') or {}).get('dataset')
    if data is None:
        raise LabelsError(
            "threshold='auto' needs val_dataloader, which the config lacks: give a number instead"
        )
    with random_state_kept():
        labeller = labeller_of(cfg, teacher=teacher, pairs_own_view=not clean_view)
    truth = {info['img_path']: boxes_of(info) for info in image_infos(DATASETS.build(data))}
    kept = dict(workers=workers, keep_others=True, check=check)
    with _detections(cfg, labeller, list(truth), out, **kept) as file:
        return by_main(lambda: _choose(labeller, truth, file))


def require_labeller(cfg: Config, labeller: Labeller, infos: Sequence[dict]) -> None:
    """Check a detector on labelled images before it labels others, in its own view of them.

    Boxes of classes that it does not know, and images without another, are left out.

    Args:
        cfg: of the run.
        labeller: the detector.
        infos: what data sets know of labelled images.

    Raises:
        TeacherError: it finds next to nothing there, or knows no class.
    """
    known = [i for i, name in enumerate(labeller.classes) if name not in labeller.unknown]
    truth = {}
    for i in np.random.default_rng(0).permutation(len(infos)):
        boxes, labels, ignored = boxes_of(infos[i])
        own = np.isin(labels, known)
        if own.any():
            truth[infos[i]['img_path']] = boxes[own], labels[own], ignored[own]
        if len(truth) == TRIED:
            break
    if not truth:
        return
    with _detections(cfg, labeller, list(truth), workers=0) as file:
        by_main(lambda: _require_found(labeller, truth, file))


@contextlib.contextmanager
def _detections(
    cfg: Config, labeller: Labeller, paths: list[str], out: str | Path | None = None, **kwargs: Any
) -> Iterator[str | Path]:
    """The file of a detector's detections on images, which is temporary without ``out``."""
    images = Images(paths, paths, list(range(1, len(paths) + 1)))
    with contextlib.ExitStack() as stack:
        if out is None:
            folder = by_main(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
            out = Path(folder) / 'labels.json'
        label_images(cfg, images, out, labeller=labeller, **kwargs)
        yield out


def _require_found(labeller: Labeller, truth: dict[str, tuple], out: str | Path) -> None:
    found = read_labels(out).images
    shares = []
    for by_class in (False, True):
        matched = match_detections(
            [(b, n if by_class else 0 * n, ignored) for b, n, ignored in truth.values()],
            [
                (f.boxes, f.labels if by_class else 0 * f.labels, f.scores)
                for f in (found[path] for path in truth)
            ],
            len(labeller.classes),
        )
        objects = sum(n for *_, n in matched)
        if objects < BOXES:
            return
        shares.append(sum(int(right.sum()) for _, right, _ in matched) / objects)
    said = (
        f'the teacher finds {100 * shares[0]:.0f} % of {objects} boxes of labelled images (IoU 0.5)'
        f', {100 * shares[1]:.0f} % with the right class'
    )
    if shares[0] < MIN_TRAIN_RECALL or shares[1] < shares[0] / CLASS_RATIO:
        raise TeacherError(
            f'{said}, so its labels would be worth little: look at its checkpoint, at mean and std '
            'of the data_preprocessor in teacher_config, and at the names of its classes. ' + OFF
        )
    print_log(f'teacher check: {said}', 'current')


def _choose(labeller: Labeller, truth: dict[str, tuple], out: str | Path) -> list[Threshold]:
    """The thresholds for the ground truth of images, by path, and the detections in ``out``."""
    found = read_labels(out, labeller.info['teacher_sha256'], labeller.classes, truth).images
    matched = match_detections(
        list(truth.values()),
        [(found[path].boxes, found[path].labels, found[path].scores) for path in truth],
        len(labeller.classes),
    )
    objects = sum(n for *_, n in matched)
    way_out = 'give a number as the threshold'
    if objects < FEWEST:
        raise LabelsError(
            f"threshold='auto': the {len(truth)} validation images have {objects} objects, too few "
            f'to choose a threshold on: {way_out}'
        )
    best = thresholds_of(matched)
    if best is None:
        raise TeacherError(
            f'{labeller.info["teacher"]} finds none of the {objects} objects of the {len(truth)} '
            f"validation images at IoU 0.5, so there is no threshold='auto': look at the teacher "
            f'(`{command("check")} --data`), or {way_out}'
        )
    said = ', '.join(
        f'{name} {t.score:.2f} (F1 {t.f1:.2f}{"" if t.own else ", that of all classes"})'
        for name, t in zip(labeller.classes[:20], best, strict=False)
    )
    print_log(
        f'thresholds of best F1 on {len(truth)} validation images with {objects} objects: {said}'
        + (f' and {len(best) - 20} more' if len(best) > 20 else ''),
        'current',
    )
    return best
