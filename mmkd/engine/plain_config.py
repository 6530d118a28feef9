"""The plain student's config: MMDetection alone reads it, tests with it and deploys by it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from ..datasets.two_views import apply_resolution
from ..recipe import dicts, plain_student

_KEPT = {
    *inspect.signature(Runner.__init__).parameters, 'custom_imports', 'auto_scale_lr', 'tta_model',
    'tta_pipeline',
} - {'self', 'work_dir', 'load_from', 'resume', 'launcher', 'experiment_name', 'cfg'}  # fmt: skip


def plain_config(cfg: Config, classes: Sequence[str] | None = None) -> Config:
    """The config of the student of a pair, complete, without mmkd and without the teacher.

    It has the student's own detector class and scale, no path of pretrained weights, and the names
    of the classes in every data set.

    Args:
        cfg: the config of a pair, or of a plain detector.
        classes: names of the classes for the data sets that have none of their own.

    Raises:
        ValueError: if mmkd would still be needed; the message has the entry.
    """
    cfg = apply_resolution(cfg)
    found = {key: copy.deepcopy(cfg[key]) for key in cfg if key in _KEPT}
    found['model'] = plain_student(cfg.model)
    plain: dict = Config(found)._cfg_dict.to_dict()
    for node in list(dicts(plain)):
        if (node.get('init_cfg') or {}) and 'checkpoint' in str(node['init_cfg']):
            node['init_cfg'] = None  # the weights are in the published file
        if 'pipeline' in node and isinstance(node['pipeline'], (list, tuple)):
            node['pipeline'] = list(_one_view(node['pipeline']))
        if 'switch_pipeline' in node:
            node['switch_pipeline'] = list(_one_view(node['switch_pipeline']))
        if classes and 'ann_file' in node and 'pipeline' in node:
            node['metainfo'] = {'classes': tuple(classes), **(node.get('metainfo') or {})}
    imports = plain.get('custom_imports')
    if imports:
        names = [imports['imports']] if isinstance(imports['imports'], str) else imports['imports']
        imports['imports'] = [name for name in names if name.partition('.')[0] != 'mmkd']
        if not imports['imports']:
            del plain['custom_imports']
    hooks = plain.get('custom_hooks') or []
    plain['custom_hooks'] = [hook for hook in hooks if not _ours(hook.get('type'))]
    for node in dicts(plain):
        if _ours(node.get('type')):
            raise ValueError(
                f'the config has type={node["type"]!r} outside of the distillation, so the plain '
                'student would still need mmkd: replace it by a class of MMDetection or your own'
            )
    return Config(plain)


def _one_view(pipeline: Sequence[dict]) -> Iterator[dict]:
    for transform in pipeline:
        if _ours(transform.get('type')) and str(transform['type']).endswith('TwoViews'):
            yield from transform['transforms']
        else:
            yield transform


def _ours(kind: Any) -> bool:
    if isinstance(kind, type):
        return kind.__module__.partition('.')[0] == 'mmkd'
    return str(kind).startswith('mmkd.')
