"""Reads the class names of student and teacher from configs and checkpoints."""

from __future__ import annotations

import copy
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from ..datasets.annotations import leaves
from ..datasets.labels import check_num_classes
from ..inference import is_missing
from ..recipe import UNTRAINED, read_teacher_config


def apply_classes(cfg: Config) -> Config:
    """Write the class names of both networks to ``model.distillation.classes``, if they differ.

    The student's names are those of its training data, the teacher's those of the data in its
    config or of its checkpoint's meta. If either is unknown, the numbers of classes must agree;
    where the teacher's files are missing they are.

    Returns:
        The config itself, or a copy with the names.

    Raises:
        ValueError: the student's head and its data have different numbers of classes.
    """
    model = cfg.get('model') or {}
    distillation = model.get('distillation')
    if not distillation or 'teacher_config' not in model:
        return cfg
    check_num_classes(cfg)
    given = dict(distillation.get('classes') or {})
    student = given.get('student') or class_names(cfg)
    if student is None:
        return cfg
    teacher = given.get('teacher')
    if teacher is None:
        try:
            teacher_cfg = read_teacher_config(model['teacher_config'])
            teacher = teacher_names(teacher_cfg, model.get('teacher_ckpt'))
        except Exception as error:
            if not is_missing(error):
                raise
            return cfg  # the detector says so as it is built
    if teacher is None or list(teacher) == list(student):
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.model.distillation.classes = dict(given, student=list(student), teacher=list(teacher))
    return cfg


def teacher_names(cfg: Config, checkpoint: str | None) -> list[str] | None:
    """The teacher's class names: of the data in its config, or of its checkpoint; else None."""
    count = head_classes(cfg.model)
    names = _fitting(class_names(cfg), count)
    return names if names is not None else _fitting(_names_in(checkpoint), count)


def class_names(cfg: Config) -> list[str] | None:
    """The class names of a config's training data, else validation or test data; else None."""
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for dataset in leaves((cfg.get(key) or {}).get('dataset')):
            if 'classes' in (dataset.get('metainfo') or {}):
                return _list(dataset['metainfo']['classes'])
            kind = dataset.get('type')
            known = DATASETS.get(kind) if isinstance(kind, str) else kind
            if known is not None and 'classes' in getattr(known, 'METAINFO', {}):
                return _list(known.METAINFO['classes'])
    return None


def _fitting(names: list[str] | None, count: int | None) -> list[str] | None:
    # The default names of a data set's class may not be those that the config trains on.
    return names if names is not None and count in (None, len(names)) else None


def _names_in(checkpoint: str | None) -> list[str] | None:
    if checkpoint is None or checkpoint == UNTRAINED:
        return None
    meta = CheckpointLoader.load_checkpoint(checkpoint, 'cpu').get('meta') or {}
    names = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    return _list(names) if names else None


def head_classes(model: Any) -> int | None:
    """``num_classes`` of the (first) box head in a model config, else None."""
    head = (model.get('roi_head') or {}).get('bbox_head')
    head = head[0] if isinstance(head, (list, tuple)) else head
    return (head or {}).get('num_classes')


def _list(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
