"""What a recipe says, before anything is built."""

from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config
from mmengine.hub import get_config

ADAPTER_PREFIX = 'kd_adapters.'


UNTRAINED = 'random'


class TeacherError(ValueError):
    """The teacher's config or checkpoint is not what it has to be."""


def read_teacher_config(config: str | Path | dict) -> Config:
    """Resolve ``teacher_config``: a path, an ``mmdet::...`` name of the installed package, a dict.

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
    """The model config of a student alone: what plain MMDetection builds and tests.

    A config that distils nothing comes back as it is, in a copy.
    """
    model = copy.deepcopy(model)
    keys = ('teacher_config', 'teacher_ckpt', 'teacher_sha256', 'eval_teacher', 'distillation')
    if any(key in model for key in keys):
        for key in keys:
            model.pop(key, None)
        trident = 'Trident' in str(model['type'])
        model['type'] = 'TridentFasterRCNN' if trident else 'TwoStageDetector'
    return model


def terms(distillation: dict) -> list[str]:
    """Names of the entries that are terms: losses by their ``type``."""
    return [k for k, v in distillation.items() if isinstance(v, dict) and 'type' in v]


def terms_on(distillation: dict) -> list[str]:
    """Names of the terms whose weight is not the constant 0. Equation (2) weights a soft term with
    1 - hard_weight where no weight is given."""
    on = []
    for name in terms(distillation):
        term = distillation[name]
        default = 1 - term['hard_weight'] if 'hard_weight' in term else 1
        weight = term.get('loss_weight', default)
        if isinstance(weight, dict) or weight is None or weight != 0:
            on.append(name)
    return on
