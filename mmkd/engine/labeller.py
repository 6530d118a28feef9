"""The detector that labels images: a pair's teacher or any other, and what it calls its classes."""

from __future__ import annotations

import difflib
import json
import logging
import os.path as osp
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DefaultScope, init_default_scope

from ..datasets.annotations import loads_pictures
from ..datasets.teacher_labels import LabelsError
from ..datasets.two_views import at_teachers_scale
from ..digests import digest, short_sha256, tensor_digests
from ..io.teacher_weights import load_teacher
from ..options.class_map import ClassMap
from ..recipe import UNTRAINED, is_pair
from ..version import __version__
from .class_names import class_names, head_classes, teacher_names

MIN_SCORE = 0.05
"""Detections below this score are not kept."""

DESCRIPTION = "a detector's detections, scores included"
"""How a labels file says what it is."""


@dataclass(frozen=True)
class Labeller:
    """A detector that labels images.

    Attributes:
        network: in eval mode.
        pipeline: the config of the transforms by which it sees an image.
        classes: names of the classes in the labels file, in its order.
        labels: the file's class number for each of the detector's; -1: not in the file.
        info: of the labels file.
        source: where its weights are from.
    """

    network: Any
    pipeline: list
    classes: list[str]
    labels: list[int]
    info: dict
    source: str = ''

    @property
    def unknown(self) -> list[str]:
        """The classes of the file that the detector does not know."""
        return [name for i, name in enumerate(self.classes) if i not in self.labels]

    @property
    def loads_pictures(self) -> bool:
        """Whether OpenCV or Pillow read the images."""
        return loads_pictures(dict(pipeline=self.pipeline))


def labeller_of(
    cfg: Config,
    checkpoint: str | None = None,
    classes: dict[str, str] | None = None,
    teacher: Any = None,
    min_score: float = MIN_SCORE,
    pairs_own_view: bool = False,
) -> Labeller:
    """The detector of a config, or the teacher of a pair, ready to label images.

    Args:
        cfg: of a detector, or of a pair.
        checkpoint: of the detector, or of the teacher in place of the pair's; None: the pair's.
        classes: the detector's name for each class of the file; None: the student's classes as the
            pair matches them, or all of the detector's.
        teacher: the pair's teacher, if it has been loaded already (a
            :class:`mmkd.models.teacher.Teacher` that has not been prepared for training).
        min_score: detections below it are not kept.
        pairs_own_view: whether the teacher of a pair sees images as the pair's validation does, at
            the teacher's scale; else as its own config's test does, if it has one.

    Raises:
        TeacherError: the checkpoint does not fill the network.
        LabelsError: no pipeline or no class names can be found; a class is unknown.
    """
    if DefaultScope.get_current_instance() is None:
        init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = cfg.model
    pair = is_pair(model)
    if teacher is None:
        of_pair = pair and checkpoint is None
        teacher = load_teacher(
            model.teacher_config if pair else cfg,
            model.get('teacher_ckpt') if of_pair else checkpoint,
            model.get('teacher_sha256') if of_pair else None,
        )
    if teacher.source == UNTRAINED:
        print_log(
            'THE TEACHER IS UNTRAINED (random): its labels are noise', 'current', logging.WARNING
        )
    name = osp.basename(str(cfg.filename or 'a config') if not pair else teacher.name)
    names, labels = _match_classes(cfg, teacher, name, classes)
    pipeline = _pipeline(cfg, teacher.config, name, pairs_own_view)
    weights = getattr(teacher, 'digests', None) or tensor_digests(teacher.network)
    info = dict(
        description=DESCRIPTION,
        teacher=name,
        teacher_sha256=digest(weights),
        config_sha256=short_hash([_inference(dict(teacher.config.model)), pipeline, labels]),
        mmkd=__version__,
        min_score=min_score,
    )
    return Labeller(teacher.network, pipeline, names, labels, info, teacher.source)


def _match_classes(
    cfg: Config, teacher: Any, name: str, classes: dict[str, str] | None
) -> tuple[list[str], list[int]]:
    """The classes of the labels file, and the number there of each of the detector's (-1: none).

    Arguments and errors are those of :func:`labeller_of`; ``name`` is the detector's in messages.
    """
    given = (cfg.model.get('distillation') or {}).get('classes') or {}
    theirs = given.get('teacher') or teacher_names(teacher.config, teacher.source)
    student = (given.get('student') or class_names(cfg)) if is_pair(cfg.model) else None
    names = given.get('names') or {}
    if classes is not None:
        student, names = list(classes), classes
    count = head_classes(teacher.config.model)
    if theirs is None:
        if student is None or (count is not None and count != len(student)):
            raise LabelsError(
                f'neither the data in the config of {name} nor its checkpoint name the '
                f'{count or ""} classes: set metainfo=dict(classes=[...]) of '
                'test_dataloader.dataset'
            )
        theirs = student
    if count is not None and count != len(theirs):
        raise LabelsError(
            f'{name} has {count} classes, and {len(theirs)} names are known of them '
            f'({", ".join(theirs[:4])}): set metainfo=dict(classes=[...]) of its data sets'
        )
    student = theirs if student is None else student
    if classes is not None:
        _require_known(classes, theirs, name)
    try:
        matched = ClassMap(student, theirs, names)
    except ValueError as error:
        raise LabelsError(str(error)) from None
    if matched.twice:
        raise LabelsError(matched.twice)
    labels = [-1] * len(theirs)
    for own, index in enumerate(matched.indices):
        if index is not None:
            labels[index] = own
    if matched.unknown:
        print_log(
            f'{name} does not know {", ".join(matched.unknown)}: no box will have that label',
            'current',
            logging.WARNING,
        )
    return list(student), labels


def _require_known(classes: dict[str, str], known: Sequence[str], name: str) -> None:
    for own, their in classes.items():
        if their not in known:
            near = difflib.get_close_matches(their, known, 3, 0)
            raise LabelsError(f'{name} has no class {their!r}; near ones: {", ".join(near)}')
        twice = [other for other, same in classes.items() if same == their and other != own]
        if twice:
            raise LabelsError(
                f'class {their!r} of {name} is to be {own!r} and {twice[0]!r}: choose'
            )


def _pipeline(cfg: Config, own: Config, name: str, pairs_own_view: bool) -> list:
    if is_pair(cfg.model):
        pairs = at_teachers_scale(cfg)
        key = 'val_dataloader' if pairs_own_view else 'test_dataloader'
        candidates = [(pairs, key)] if pairs_own_view else [(own, key), (pairs, key)]
    else:
        candidates = [(cfg, 'test_dataloader'), (cfg, 'val_dataloader')]
    for config, key in candidates:
        if config.get(key):
            return get_test_pipeline_cfg(Config(dict(test_dataloader=config[key])))
    raise LabelsError(f'{name} has no test_dataloader, so no pipeline by which it sees an image')


def _inference(node: Any) -> Any:
    """A model's config without what prediction does not use."""
    if isinstance(node, dict):
        return {k: _inference(v) for k, v in node.items() if k not in ('init_cfg', 'train_cfg')}
    return [_inference(each) for each in node] if isinstance(node, list | tuple) else node


def short_hash(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for a value that JSON can hold."""
    # A new-style config holds classes and functions.
    text = json.dumps(value, sort_keys=True, default=lambda v: getattr(v, '__qualname__', str(v)))
    return short_sha256(text)
