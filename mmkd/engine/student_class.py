"""The student's own detector class, which the ``type`` of a pair replaces in its config."""

from __future__ import annotations

import functools
from typing import Any

from mmengine.config import Config

ADD_NOTHING = ('TwoStageDetector', 'FasterRCNN', 'CascadeRCNN', 'MaskRCNN')
"""Names that MMDetection has for one and the same detector."""


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
    inherited = _inherited(str(cfg.filename))
    if inherited is not None and inherited.rpartition('.')[2] not in ADD_NOTHING:
        model.detector = inherited
    return cfg


@functools.lru_cache  # the command line and the runner both ask
def _inherited(path: str) -> str | None:
    """The type of the detector in the nearest base of a config that distils nothing."""
    for base in Config._get_base_files(path):
        # No public function of MMEngine says what a config inherits.
        where, _ = Config._get_cfg_path(base, path)
        model = Config.fromfile(where, import_custom_modules=False).get('model') or {}
        kind = model.get('type')
        if kind is not None:
            return _inherited(where) if 'teacher_config' in model else str(kind)
    return None
