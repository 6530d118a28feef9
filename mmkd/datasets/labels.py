"""Checks of class labels: their number in the heads, and their order in annotation files."""

from __future__ import annotations

import json
import logging
import mmap
import os.path as osp
from collections.abc import Iterator
from typing import Any

from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.logging import print_log

from ..options.class_map import did_you_mean, first_names, fold, spelled_alike
from .annotations import leaves, metainfo_of


def check_num_classes(cfg: Config) -> None:
    """Compare ``num_classes`` of the heads with the classes of the training and validation data.

    MMDetection does not: with one too few, the last class is trained as background; with too many,
    a validation fails with an index error, hours later.

    Raises:
        ValueError: naming the head, the data set and both numbers.
    """
    for key in ('train_dataloader', 'val_dataloader'):
        for dataset in leaves((cfg.get(key) or {}).get('dataset')):
            names = _things(dataset)
            for where, count in _counts(cfg.get('model'), 'model') if names else ():
                if count != len(names or ()):
                    raise ValueError(
                        f'{where}.num_classes is {count}, and the {key.split("_")[0]} data '
                        f'({dataset.get("ann_file")}) have {len(names or ())} classes '
                        f'({first_names(names or ())}): set num_classes={len(names or ())}, or '
                        f'metainfo=dict(classes=...) of every data set to the {count} names'
                    )


def _things(dataset: Any) -> list[str] | None:
    """The classes with boxes of a data set's config; None if the config does not name them."""
    info = metainfo_of(dataset)
    names = info.get('thing_classes', info.get('classes'))
    if isinstance(names, str):
        return list_from_file(names) if osp.isfile(names) else None
    return None if names is None else list(names)


def _counts(node: Any, where: str) -> Iterator[tuple[str, int]]:
    """Path and ``num_classes`` of each box or mask head in a model's config."""
    if isinstance(node, (list, tuple)):
        for i, each in enumerate(node):
            yield from _counts(each, f'{where}[{i}]')
    elif isinstance(node, dict):
        name = where.rsplit('.', 1)[-1].split('[')[0]
        if name in ('bbox_head', 'mask_head') and 'num_classes' in node:
            if not node.get('class_agnostic'):
                yield where, node['num_classes']
            return
        for key, value in node.items():
            yield from _counts(value, f'{where}.{key}')


def check_labels(dataset: Any) -> None:
    """Check that a COCO data set numbers its classes in the order of ``metainfo['classes']``.

    MMDetection numbers them in the order of the annotation file's categories, whatever the order of
    the names. If the two differ, every name (and a class map) refers to a wrong class.

    Args:
        dataset: a data set, or a wrapper of one or several.

    Raises:
        ValueError: with the order to write.
    """
    for path, named, numbered in _numbered(dataset):
        if numbered in (named, []):
            continue
        missing = [name for name in named if name not in numbered]
        categories = _categories(path)
        alike, has = spelled_alike(missing, categories), 'It has '
        raise ValueError(
            f'metainfo=dict(classes=({first_names(named)})) does not fit {path}: '
            + (
                f'it has no category {first_names(missing)}, so the classes behind it are numbered '
                f'wrongly. {did_you_mean(alike) if alike else has + first_names(categories)}'
                if missing
                else 'MMDetection numbers classes in the order of the file'
            )
            + (
                ''
                if alike
                else f': write these names, or classes={tuple(numbered)!r} and as many num_classes'
                if missing
                else f'. Write classes={tuple(numbered)!r}'
            )
        )


def check_same_labels(train: Any, val: Any) -> None:
    """Check that all training data, and validation data, number the classes in the same way.

    Each COCO data set numbers them in the order of its own file's categories. If the order differs,
    one class is trained under two labels, or detections of one class are scored as another's.

    Args:
        train: the training data set, or a wrapper of one or several.
        val: the validation data set, or None.

    Raises:
        ValueError: naming both files and their orders.
    """
    parts = list(_numbered(train))
    others = [(part, 'trained under two labels') for part in parts]
    others += [(part, 'validated as another') for part in _numbered(val)]
    for at, (path, _, ours) in enumerate(parts):
        for (other, _, theirs), wrong in others[at + 1 :]:
            if _in_two_orders(ours, theirs):
                raise ValueError(
                    f'{path} has its categories in the order {first_names(ours)}, and {other} in '
                    f'the order {first_names(theirs)}: MMDetection numbers classes in the order of '
                    f'each file, so what is trained as one class would be {wrong}. '
                    'Write both files with the same categories in the same order'
                )
            alike = spelled_alike(set(ours) - set(theirs), set(theirs) - set(ours))
            if alike:
                print_log(
                    f'{path} and {other} spell {len(alike)} of their classes in two ways: '
                    f'{did_you_mean(alike)}',
                    logger='current',
                    level=logging.WARNING,
                )


def _in_two_orders(ours: list[str], theirs: list[str]) -> bool:
    """Whether two lists of the same classes, or one and a part of it, disagree about the order."""
    few, many = sorted((ours, theirs), key=len)
    folded = [fold(name) for name in few], [fold(name) for name in many]
    pairs = [(few, many), folded] if all(len(set(f)) == len(f) for f in folded) else [(few, many)]
    return any(set(a) <= set(b) and a != b[: len(a)] for a, b in pairs)


def _numbered(dataset: Any) -> Iterator[tuple[str, list[str], list[str]]]:
    """For each data set inside wrappers: file, class names, and the names in the file's order."""
    for part in getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]:
        if part is not None:
            yield from _numbered(part)
    # Some subclasses sort the categories in their own way.
    own = getattr(type(dataset), 'load_data_list', None) is CocoDataset.load_data_list
    if own and osp.isfile(dataset.ann_file):
        named = list(dataset.metainfo['classes'])
        yield dataset.ann_file, named, [n for n in _categories(dataset.ann_file) if n in named]


def _categories(path: str) -> list[str]:
    """Category names of a COCO file, without parsing all of it: COCO's has half a gigabyte."""
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(b'"categories"')
        start = content.find(b'[', at)
        if at < 0 or start < 0:
            return []
        text = content[start : start + 2**22].decode('utf-8', 'ignore')
    return [category['name'] for category in json.JSONDecoder().raw_decode(text)[0]]
