"""Reads the distillation part of a model's config, before anything is built."""

from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config
from mmengine.hub import get_config

ADAPTER_PREFIX = 'kd_adapters.'
"""Prefix of adaptation layers in a distilled student's state dict."""
UNTRAINED = 'random'
"""A ``teacher_ckpt`` that leaves the teacher untrained, for tests."""


class TeacherError(ValueError):
    """The teacher's config, checkpoint or behaviour is wrong."""


def read_teacher_config(config: str | Path | dict) -> Config:
    """Read ``teacher_config``: a path, an ``mmdet::...`` name of the installed package, or a dict.

    Raises:
        TeacherError: if there is no such config, or it has no ``model``.
    """
    try:
        if isinstance(config, dict):
            resolved = Config(copy.deepcopy(dict(config)))
        elif '::' in str(config):
            resolved = get_config(str(config))
        else:
            resolved = Config.fromfile(config)
    except (OSError, ImportError, KeyError, ValueError) as error:
        raise TeacherError(f'teacher_config {config!r} cannot be read: {error}') from error
    if 'model' not in resolved:
        raise TeacherError(f'teacher_config {resolved.filename!r} defines no model')
    return resolved


def plain_student(model: dict) -> dict:
    """A copy of a model config without distillation, which plain MMDetection can build."""
    model = copy.deepcopy(model)
    keys = ('teacher_config', 'teacher_ckpt', 'teacher_sha256', 'eval_teacher', 'distillation')
    if any(key in model for key in keys):
        for key in keys:
            model.pop(key, None)
        trident = 'Trident' in str(model['type'])
        model['type'] = 'TridentFasterRCNN' if trident else 'TwoStageDetector'
    return model


def terms(distillation: dict) -> list[str]:
    """Names of the entries that are terms, which have a ``type``."""
    return [k for k, v in distillation.items() if isinstance(v, dict) and 'type' in v]


def terms_on(distillation: dict) -> list[str]:
    """Names of the terms whose weight is not the constant 0.

    By equation (2) the default weight of a soft term is 1 - hard_weight.
    """
    on = []
    for name in terms(distillation):
        term = distillation[name]
        default = 1 - term['hard_weight'] if 'hard_weight' in term else 1
        weight = term.get('loss_weight', default)
        if isinstance(weight, dict) or weight is None or weight != 0:
            on.append(name)
    return on
