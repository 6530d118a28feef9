"""What a distilling detector needs where it only predicts: not its teacher, but its own scale."""

from __future__ import annotations

import os
from typing import Any
from urllib.error import URLError

from mmdet.structures import SampleList
from mmengine.logging import MMLogger

from .options.resolution import Resolution, rescale
from .recipe import TERM_PREFIXES, MissingFileError, own_detector, pipelines
from .shipped import command


def is_missing(error: BaseException | None) -> bool:
    """Whether an error comes from a file, a module or an address that is not there."""
    if error is None:
        return False
    kinds = (MissingFileError, FileNotFoundError, ModuleNotFoundError, URLError)
    return isinstance(error, kinds) or is_missing(error.__cause__)


def without_teacher(error: Exception) -> Exception:
    """Let a detector be built whose teacher's files are missing: it predicts as it is.

    Args:
        error: by which the teacher could not be built.

    Returns:
        The error, for :func:`require_teacher`; any other than of a missing file is raised.
    """
    if not is_missing(error):
        raise error
    MMLogger.get_current_instance().warning(
        f'the teacher was not found, so this student predicts, and cannot be trained: {error}'
    )
    return error.with_traceback(None)


def require_teacher(model: Any) -> None:
    """Raise the error by which the detector's teacher could not be built, if it was built without.

    ``model`` may be any detector.
    """
    if getattr(model, 'missing_teacher', None) is not None:
        raise model.missing_teacher


def drop_terms(module: Any, state: dict, *_: Any) -> None:
    """A ``load_state_dict`` pre-hook: a detector without its teacher has no terms to load."""
    if module.missing_teacher is not None:
        for key in [key for key in state if key.startswith(TERM_PREFIXES)]:
            del state[key]


def require_own_class(cfg: Any, model: Any) -> None:
    """Refuse a config whose student has a detector class of its own, for a model that has not.

    mmkd's tools find the class in what the config inherits; an inferencer builds what is written.

    Raises:
        ValueError: naming the class and the line to write.
    """
    given = (cfg.get('model') if hasattr(cfg, 'get') else None) or {}
    path = str(getattr(cfg, 'filename', None) or '')
    if 'teacher_config' not in given or 'detector' in given or not os.path.isfile(path):
        return
    own = own_detector(path)
    if own is not None and own.rpartition('.')[2] not in [c.__name__ for c in type(model).__mro__]:
        raise ValueError(
            f'{path} inherits a student of class {own}, and builds it as the plain two-stage '
            "detector: write detector=_base_.model.type beside model's type"
        )


def at_own_scale(cfg: Any) -> Any:
    """Set the student's scale of ``distillation.resolution`` in a config's test pipelines.

    MMDetection's inferencers build their pipeline from the config that they were given, so it is
    changed in place; doing so twice is the same.

    Raises:
        ValueError: if a pipeline resizes by a factor.
    """
    model = (cfg.get('model') if hasattr(cfg, 'get') else None) or {}
    resolution = Resolution.of((model.get('distillation') or {}).get('resolution'))
    if resolution is not None:
        for holder in pipelines(cfg.get('test_dataloader')):
            holder['pipeline'] = [rescale(t, resolution.student) for t in holder['pipeline']]
    return cfg


def check_scale(resolution: Resolution | None, samples: SampleList) -> None:
    """Refuse to predict on images larger than the student's scale.

    Raises:
        ValueError: with both sizes and the way out.
    """
    if resolution is None:
        return
    limits = sorted(resolution.student)
    for sample in samples:
        size = sample.get('img_shape')
        if 'ori_shape' in sample and 'scale_factor' in sample:
            # Without padding.
            factors = sample.scale_factor[1::-1]
            size = [edge * by for edge, by in zip(sample.ori_shape[:2], factors, strict=True)]
        if size is not None and any(
            edge > limit + 1 for edge, limit in zip(sorted(size[:2]), limits, strict=True)
        ):
            height, width = (round(edge) for edge in size[:2])
            wide, high = resolution.student
            raise ValueError(
                f'the student is shown an image of {width}x{height}, and '
                f'distillation.resolution.student is {wide}x{high}: nothing has put its scale '
                f'into the pipeline. `{command("test")}` does, and runner_type = '
                "'mmkd.DistillationRunner' in the config; in a pipeline of your own write "
                f"dict(type='Resize', scale=({wide}, {high}), keep_ratio=True)"
            )
