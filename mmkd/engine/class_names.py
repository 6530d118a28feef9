"""Reads the class names of student and teacher from configs and checkpoints."""

from __future__ import annotations

import copy
import logging
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader

from ..datasets.annotations import leaves, metainfo_of
from ..datasets.labels import check_num_classes
from ..inference import is_missing
from ..io.checkpoint import CheckpointError, is_here
from ..options.class_map import first_names, fold
from ..recipe import UNTRAINED, read_teacher_config


def apply_classes(cfg: Config) -> Config:
    """Write the class names of both networks to ``model.distillation.classes``, if they differ.

    The student's names are those of its training data; the teacher's come from its config's data or
    its checkpoint. If either is unknown, as where the teacher's files are missing, the numbers of
    classes must agree.

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
    """The teacher's class names: of its checkpoint, or of the data in its config; else None.

    The checkpoint says what its weights were trained on. A name that differs from the config's by
    its spelling alone is the config's: early files of MMDetection have ``traffic_light``. A
    checkpoint that has to be downloaded first is asked only where the config has no names.
    """
    count = head_classes(cfg.model)
    said = _fitting(class_names(cfg), count)
    if said is not None and not _is_here(checkpoint):
        return said
    own = _fitting(_names_in(checkpoint), count)
    if own is None or said is None or list(map(fold, own)) == list(map(fold, said)):
        return own if said is None else said
    print_log(
        f'teacher_ckpt {checkpoint} was trained on the classes {first_names(own)}, and the data of '
        f'teacher_config {cfg.filename} have {first_names(said)}: the names of the checkpoint are '
        'used. If they are wrong, give distillation.classes.teacher=[...]',
        logger='current',
        level=logging.WARNING,
    )
    return own


def class_names(cfg: Config) -> list[str] | None:
    """The class names of a config's training data, else validation or test data; else None."""
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for dataset in leaves((cfg.get(key) or {}).get('dataset')):
            if 'classes' in (info := metainfo_of(dataset)):
                return _list(info['classes'])
    return None


def _fitting(names: list[str] | None, count: int | None) -> list[str] | None:
    # The default names of a data set's class may not be those that the config trains on.
    return names if names is not None and count in (None, len(names)) else None


def _names_in(checkpoint: str | None) -> list[str] | None:
    if not checkpoint or checkpoint == UNTRAINED:
        return None
    try:
        meta = CheckpointLoader.load_checkpoint(checkpoint, 'cpu').get('meta') or {}
    except (CheckpointError, FileNotFoundError):
        return None  # said when the teacher is loaded
    data: Any = meta.get('dataset_meta') if isinstance(meta, dict) else None
    names = (data or {}).get('classes') or meta.get('CLASSES')
    return _list(names) if names else None


def _is_here(checkpoint: str | None) -> bool:
    try:
        return is_here(str(checkpoint or UNTRAINED))
    except CheckpointError:
        return False  # said when the teacher is loaded


def head_classes(model: Any) -> int | None:
    """``num_classes`` of the (first) box head in a model config, else None."""
    head = (model.get('roi_head') or model).get('bbox_head')
    head = head[0] if isinstance(head, (list, tuple)) else head
    return (head or {}).get('num_classes')


def _list(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
