"""The student's own detector class, which the ``type`` of a pair replaces in its config."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from ..recipe import own_detector


def keep_detector(cfg: Config) -> Config:
    """Name the detector class that the config inherits in ``model.detector``, if it has its own.

    Returns:
        The config, changed in place; as it is where it distils nothing, names a class, or was not
        read from a file.
    """
    model: Any = cfg.get('model') or {}
    if 'teacher_config' not in model or 'detector' in model or not cfg.filename:
        return cfg
    if 'TwoStageDetector' not in str(model.get('type')):
        return cfg
    own = own_detector(str(cfg.filename))
    if own is not None:
        model.detector = own
    return cfg
