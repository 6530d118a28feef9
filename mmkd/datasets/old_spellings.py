"""Refuses what MMDetection 2.x wrote in the data part of a config, with what 3.x writes there.

Some of it ends 3.x in an error that names neither the key nor the way out; some it reads past.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NoReturn

from mmdet.registry import TRANSFORMS
from mmengine.config import Config

from .annotations import class_of

_LOADER = {'samples_per_gpu': 'batch_size', 'workers_per_gpu': 'num_workers'}
_PACKING = ('DefaultFormatBundle', 'ImageToTensor', 'Collect')
_ARGUMENTS = {('Resize', 'img_scale'): 'scale', ('RandomFlip', 'flip_ratio'): 'prob'}


def refuse_old_spellings(cfg: Config) -> None:
    """Look through the data loaders of a config.

    Raises:
        ValueError: with the key, its value and what to write.
    """
    old = cfg.get('data')
    if isinstance(old, dict) and {'samples_per_gpu', 'workers_per_gpu'} & set(old):
        raise ValueError(
            'data=dict(samples_per_gpu=...) is of MMDetection 2.x, and nothing reads it: write '
            'train_dataloader=dict(batch_size=..., num_workers=..., dataset=dict(...)), and '
            'val_dataloader and test_dataloader likewise'
        )
    for part in ('train', 'val', 'test'):
        name = f'{part}_dataloader'
        loader = cfg.get(name)
        if not isinstance(loader, dict):
            continue
        for key, new in _LOADER.items():
            if key in loader:
                _refuse(f'{name}.{key}={loader[key]!r}', f'{new}={loader[key]!r}')
        for where, dataset in _datasets(loader.get('dataset'), f'{name}.dataset'):
            _check_dataset(dataset, where)


def _datasets(node: Any, where: str) -> Iterator[tuple[str, dict]]:
    """The data sets inside wrappers, and where they stand."""
    if isinstance(node, (list, tuple)):
        _refuse(
            f'{where}=[...], a list of {len(node)} data sets,',
            f"{where}=dict(type='ConcatDataset', datasets=[...])",
        )
    if not isinstance(node, dict):
        return
    if 'dataset' in node:
        yield from _datasets(node['dataset'], f'{where}.dataset')
    elif isinstance(node.get('datasets'), (list, tuple)):
        for i, each in enumerate(node['datasets']):
            yield from _datasets(each, f'{where}.datasets[{i}]')
    else:
        yield where, node
    for i, transform in enumerate(node.get('pipeline') or ()):
        _check_transform(transform, f'{where}.pipeline[{i}]')


def _check_dataset(dataset: dict, where: str) -> None:
    takes = _arguments(class_of(dataset))
    for key in ('ann_file', 'img_prefix', 'proposal_file'):
        value = dataset.get(key)
        if isinstance(value, (list, tuple)) and key not in takes:
            parts = ', '.join(f'dict(..., {key}={each!r})' for each in value)
            _refuse(
                f'{where}.{key}={list(value)!r}',
                f"{where}=dict(type='ConcatDataset', datasets=[{parts}])",
            )
    prefix = dataset.get('data_prefix')
    if isinstance(prefix, str) and 'data_prefix' not in takes:
        _refuse(f'{where}.data_prefix={prefix!r}', f'data_prefix=dict(img={prefix!r})')
    for key, new in (
        ('img_prefix', 'data_prefix=dict(img={!r})'),
        ('seg_prefix', 'data_prefix=dict(seg={!r})'),
        ('classes', 'metainfo=dict(classes={!r})'),
        ('filter_empty_gt', 'filter_cfg=dict(filter_empty_gt={!r})'),
        *((key, f'{new}={{!r}} in the data loader, not the data set') for key, new in
          _LOADER.items()),
    ):  # fmt: skip
        if key in dataset and key not in takes:
            _refuse(f'{where}.{key}={dataset[key]!r}', new.format(dataset[key]))


def _check_transform(transform: Any, where: str) -> None:
    if not isinstance(transform, dict):
        return
    kind = str(transform.get('type'))
    if kind in _PACKING and TRANSFORMS.get(kind) is None:
        _refuse(
            f'{where}, type={kind!r},',
            f"dict(type='PackDetInputs') in the place of {', '.join(_PACKING)}",
        )
    for (name, key), new in _ARGUMENTS.items():
        if kind == name and key in transform:
            _refuse(f'{where}, {name}({key}=...)', f'{new}={transform[key]!r}')


def _arguments(cls: Any) -> set[str]:
    """The arguments that a data set's class names beyond MMEngine's: one's own may be anything."""
    own = [c for c in getattr(cls, '__mro__', ()) if not c.__module__.startswith('mmengine.')]
    inits = [c.__init__ for c in own if '__init__' in vars(c)]
    return {name for init in inits for name in inspect.signature(init).parameters}


def _refuse(found: str, write: str) -> NoReturn:
    raise ValueError(
        f'{found} is a spelling of MMDetection 2.x, which 3.x does not read: write {write}'
    )
