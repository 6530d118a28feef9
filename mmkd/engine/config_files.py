"""What a config inherits and names: the student's detector class, and files.

The files are looked for beside it first, as ``_base_`` is.
"""

from __future__ import annotations

import os.path as osp
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from ..recipe import UNTRAINED, dicts, own_detector


def locate_files(cfg: Config, from_shell: bool = False) -> Config:
    """Make the paths of teacher, start and pretrained weights absolute, where a file is there.

    These are ``model.teacher_config``, ``model.teacher_ckpt``, ``load_from`` and the checkpoint of
    each ``init_cfg``. A path is relative to the folder of the config, else of a config that it
    inherits, else to the working directory. One at which there is no file stays as it is.

    Args:
        cfg: changed in place.
        from_shell: whether the working directory comes first, as for what a command line says.

    Returns:
        The config itself.
    """
    for holder, key in _paths(cfg):
        found = [place for place in places(cfg, holder[key], from_shell) if osp.isfile(place)]
        if found:
            holder[key] = found[0]
    return cfg


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


def places(cfg: Any, path: str, from_shell: bool = False) -> list[str]:
    """The absolute paths at which a config's ``path`` is looked for, in this order."""
    if not _is_relative(path):
        return [osp.expanduser(path)]
    own = getattr(cfg, 'filename', None)
    folders = [osp.dirname(osp.abspath(file)) for file in (_files(str(own)) if own else ())]
    folders.insert(0 if from_shell else len(folders), osp.abspath('.'))
    return list(dict.fromkeys(osp.normpath(osp.join(folder, path)) for folder in folders))


def _paths(cfg: Any) -> Iterator[tuple[dict, str]]:
    """Where each relative path stands: the dict and the key."""
    model = cfg.get('model')
    pretrained = [d for d in dicts(model, ('teacher_config',)) if d.get('type') == 'Pretrained']
    holders = [(cfg, 'load_from'), *((each, 'checkpoint') for each in pretrained)]
    if isinstance(model, dict):
        holders += [(model, 'teacher_config'), (model, 'teacher_ckpt')]
    for holder, key in holders:
        path = holder.get(key)
        if isinstance(path, str) and path not in ('', UNTRAINED) and _is_relative(path):
            yield holder, key


def _is_relative(path: str) -> bool:
    return '::' not in path and '://' not in path and not osp.isabs(osp.expanduser(path))


def _files(path: str) -> Iterator[str]:
    """A config's file, and those that it inherits, the nearest first."""
    level = [path]
    while level:
        yield from level
        # No public function of MMEngine says what a config inherits.
        level = [
            Config._get_cfg_path(base, file)[0]
            for file in level
            if osp.isfile(file)
            for base in Config._get_base_files(file)
            if '::' not in base  # nothing of a user's lies beside an installed package's
        ]
