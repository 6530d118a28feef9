"""Checks of COCO annotation files before training.

MMDetection does not check them: a repeated id ends a run in an assertion, a class that the file
lacks shifts the labels of the classes after it, and an empty box is dropped silently.
"""

from __future__ import annotations

import json
import logging
import os
import os.path as osp
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.fileio import list_from_file
from mmengine.logging import print_log
from PIL import Image, UnidentifiedImageError

from ..options.class_map import did_you_mean, spelled_alike

SAMPLED_IMAGES = 8
"""Number of images of each file whose headers are read; reading all would take too long."""


class AnnotationError(ValueError):
    """An annotation file that cannot be used."""


def check_annotations(dataloader: Any, who: str = 'train') -> None:
    """Check the COCO files of a dataloader's config, and that their images exist.

    Boxes that MMDetection drops silently give a warning with their number and the first example.
    Data sets in another format, or not on a local path, are not checked.

    Args:
        dataloader: its config; anything else (a built one, None) is ignored.
        who: the name of the data in messages.

    Raises:
        AnnotationError: naming the file, the entry and its value.
    """
    if isinstance(dataloader, dict):
        for dataset in leaves(dataloader.get('dataset')):
            _check_dataset(dataset, who)


def require_annotations(dataloader: Any, who: str) -> None:
    """Check that the COCO files of a dataloader's config exist; a test may need no more of them.

    Raises:
        AnnotationError: naming the file.
    """
    if isinstance(dataloader, dict):
        for dataset in leaves(dataloader.get('dataset')):
            if (path := _coco_path(dataset)) is not None:
                _require_file(path, f'{who} annotations {path}')


def check_evaluator(evaluator: Any, dataloader: Any, who: str) -> None:
    """Check that evaluator and dataloader have the same annotations.

    A file of other boxes gives an mAP near 0, and no error if its ids are the same. The evaluator's
    file may contain more images, and other boxes in at most half of them.

    Args:
        evaluator: its config, or several; anything else is ignored.
        dataloader: its config; anything else is ignored.
        who: the name of the data in messages, val or test.

    Raises:
        AnnotationError: naming both files.
    """
    data = list(leaves(dataloader.get('dataset'))) if isinstance(dataloader, dict) else []
    if len(data) != 1 or data[0].get('backend_args'):
        return
    path = _join(data[0].get('data_root') or '', data[0].get('ann_file') or '')
    for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
        other = metric.get('ann_file') if isinstance(metric, dict) else None
        if not other or 'CocoMetric' not in str(metric.get('type')):
            continue
        if not ('://' in other or metric.get('backend_args') or osp.exists(other)):
            raise AnnotationError(
                f'{who}_evaluator.ann_file={other} does not exist: name the file of '
                f'{who}_dataloader ({path}), with its folder'
            )
        if not all(map(osp.isfile, (path, other))) or osp.realpath(path) == osp.realpath(other):
            continue
        shown = _boxes_by_image(read_coco(path, f'{who} annotations {path}'))
        scored = _boxes_by_image(read_coco(other, f'annotations {other} of {who}_evaluator'))
        unlike = [image for image in shown if shown[image] != scored.get(image)]
        if 2 * len(unlike) > len(shown):
            raise AnnotationError(
                f'{who}_evaluator.ann_file={other} is not of the images of {who}_dataloader '
                f'({path}): {len(unlike)} of {len(shown)} are not in it, or with other boxes. '
                'Name one file in both'
            )
        if unlike:
            _warn(
                f'{who}_evaluator.ann_file={other} has other boxes than {path} in {len(unlike)} of '
                f'{len(shown)} images, first in {unlike[0][1]}'
            )


def _boxes_by_image(content: dict[str, list[dict]]) -> dict[tuple, list[str]]:
    boxes: dict[Any, list[str]] = {}
    for each in content['annotations']:
        boxes.setdefault(str(each.get('image_id')), []).append(
            f'{each.get("bbox")} {each.get("category_id")}'
        )
    return {
        (str(image.get('id')), str(image.get('file_name'))): sorted(
            boxes.get(str(image.get('id')), [])
        )
        for image in content['images']
    }


def leaves(dataset: Any) -> Iterator[dict]:
    """The configs of the data sets inside wrappers such as ConcatDataset and RepeatDataset."""
    if isinstance(dataset, (list, tuple)):
        for part in dataset:
            yield from leaves(part)
    elif isinstance(dataset, dict):
        keys = ('dataset', 'datasets', 'labelled')  # the last of a mixed one
        inner = [dataset[key] for key in keys if dataset.get(key)]
        yield from leaves(inner) if inner else [dataset]


def _check_dataset(dataset: dict, who: str) -> None:
    path = _coco_path(dataset)
    if path is None:
        return
    classes = metainfo_of(dataset).get('classes')
    if isinstance(classes, str):
        if not osp.isfile(classes):
            raise AnnotationError(
                f'metainfo.classes={classes!r} of the {who} data set is a string, so the name of a '
                'file with one class a line, and there is none. One class is a tuple too, with '
                f'its comma: classes=({classes!r},)'
            )
        classes = list_from_file(classes)
    what = f'{who} annotations {path}'
    content = read_coco(path, what)
    _check_coco(content, what, classes)
    prefix = (dataset.get('data_prefix') or {}).get('img', '')
    folder = _join(dataset.get('data_root') or '', prefix)
    _check_images(content['images'], folder, what, loads_pictures(dataset))


def class_of(dataset: dict) -> Any:
    """The class of a data set's config; None where no registry has it."""
    kind = dataset.get('type')
    return DATASETS.get(kind) if isinstance(kind, str) else kind


def metainfo_of(dataset: dict) -> dict:
    """The metainfo of a data set's config: its class's, and its own."""
    return {**getattr(class_of(dataset), 'METAINFO', {}), **(dataset.get('metainfo') or {})}


def boxes_of(info: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The boxes that a data set knows of an image, (n, 4), their labels and which are ignored."""
    instances = info['instances']
    return (
        np.array([each['bbox'] for each in instances], float).reshape(-1, 4),
        np.array([each['bbox_label'] for each in instances], int),
        np.array([bool(each.get('ignore_flag')) for each in instances], bool),
    )


def _coco_path(dataset: dict) -> str | None:
    """The annotation file of a data set's config; None for another format, or another disk."""
    cls = class_of(dataset)
    path = _join(dataset.get('data_root') or '', dataset.get('ann_file', ''))
    elsewhere = dataset.get('backend_args') or '://' in path
    return None if cls is None or not _reads_coco(cls) or elsewhere else path


def _reads_coco(cls: Any) -> bool:
    # A subclass that parses its file itself may use other keys.
    return issubclass(cls, CocoDataset) and all(
        getattr(cls, name) is getattr(CocoDataset, name)
        for name in ('load_data_list', 'parse_data_info')
    )


def _join(root: str, path: str) -> str:
    return osp.join(root, path) if root and not osp.isabs(path) and '://' not in path else path


def read_coco(
    path: str, what: str, lists: Sequence[str] = ('images', 'annotations', 'categories')
) -> dict[str, list[dict]]:
    """Read a COCO file; ``what`` names it in messages, ``lists`` are those that it has to have.

    Raises:
        AnnotationError: there is no such file, or it has another content.
    """
    _require_file(path, what)
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except ValueError as error:
        state = 'are an empty file' if not osp.getsize(path) else f'are not JSON ({error})'
        raise AnnotationError(f'{what} {state}: write or copy the file again') from None
    for name in lists:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise AnnotationError(
                f'{what} are no COCO file: {name} is no list of dicts; it needs {", ".join(lists)}'
            )
    if not content['images']:
        raise AnnotationError(f'{what}: images is empty, so there is nothing to train or test on')
    return content


def _require_file(path: str, what: str) -> None:
    if not osp.isfile(path):
        state = 'is a directory' if osp.isdir(path) else 'do not exist'
        raise AnnotationError(f'{what} {state}: ann_file is looked for below data_root')


def _check_coco(content: dict[str, list[dict]], what: str, classes: Sequence[str] | None) -> None:
    images, annotations, categories = (
        content[name] for name in ('images', 'annotations', 'categories')
    )
    image_ids = _ids(images, 'images', what)
    category_ids = _ids(categories, 'categories', what)
    _ids(annotations, 'annotations', what)
    names = _column(categories, 'name', 'categories', what)
    _unique(names, 'categories', 'name', what)
    missing = [name for name in classes or () if name not in names]
    if missing:
        # MMDetection numbers the classes that it finds, so those after a missing one move up.
        raise AnnotationError(
            f'{what}: categories has no {missing[0]!r} ({len(missing)} of {len(classes or ())} '
            f'classes of metainfo are missing); it has {", ".join(map(str, names[:8]))}'
            + (f'. {did_you_mean(alike)}' if (alike := spelled_alike(missing, names)) else '')
        )
    for i, name in enumerate(_column(images, 'file_name', 'images', what)):
        if not isinstance(name, str) or not name:
            raise AnnotationError(f'{what}: images[{i}].file_name={name!r} must be a path')
    sizes = np.stack([_numbers(images, key, 'images', what) for key in ('width', 'height')], 1)
    if (bad := np.flatnonzero(sizes.min(1) <= 0)).size:
        raise AnnotationError(
            f'{what}: images[{bad[0]}] (id {images[bad[0]]["id"]!r}) has width and height '
            f'{sizes[bad[0]].tolist()}; both must be above 0'
        )
    if not annotations:
        _warn(f'{what}: annotations is empty, so every image is background')
        return
    labels = _column(annotations, 'category_id', 'annotations', what)
    known = set(category_ids)
    for i, label in enumerate(labels):
        if not _hashable(label) or label not in known:
            raise AnnotationError(
                f'{what}: annotations[{i}] (id {annotations[i]["id"]!r}) has category_id='
                f'{label!r}, which is no id in categories (such as {category_ids[0]!r})'
                if category_ids
                else f'{what}: categories is empty, so no annotation has a class'
            )
    areas = _numbers(annotations, 'area', 'annotations', what)
    boxes = _boxes(annotations, what)
    row = {image: i for i, image in enumerate(image_ids)}
    of = _column(annotations, 'image_id', 'annotations', what)
    rows = np.array([row.get(image, -1) if _hashable(image) else -1 for image in of])
    homeless = rows < 0
    if homeless.all():
        raise AnnotationError(
            f'{what}: no annotation belongs to an image: the first has image_id={of[0]!r}, the '
            f'first image id={image_ids[0]!r}; the ids must be equal, type included'
        )
    x, y, width, height = boxes.T
    sides = sizes[rows]
    inside = np.minimum(boxes[:, :2] + boxes[:, 2:], sides) - np.maximum(boxes[:, :2], 0)
    flat = (width < 1) | (height < 1)
    outside = ~flat & (inside.min(1) <= 0) & ~homeless
    # Coordinates may be rounded: one pixel beyond the edge is no fault.
    beyond = (np.minimum(x, y) < -1) | ((boxes[:, :2] + boxes[:, 2:]) > sides + 1).any(1)
    for mask, message in (
        (homeless, 'are of images that the file does not have: they are dropped'),
        (flat & ~homeless, 'have a width or height below 1 pixel: they are dropped'),
        (outside, 'lie outside their image: they are dropped'),
        ((areas <= 0) & ~flat & ~outside & ~homeless, 'have no area: they are dropped'),
        (beyond & ~flat & ~outside & ~homeless, 'reach out of their image: they are clipped'),
    ):
        if mask.any():
            first = annotations[int(mask.argmax())]
            _warn(
                f'{what}: {mask.sum()} of {len(annotations)} boxes {message}, such as id '
                f'{first["id"]!r}, bbox {first["bbox"]}, of image {first["image_id"]!r}'
            )
    if (homeless | flat | outside | (areas <= 0)).all():
        raise AnnotationError(
            f'{what}: none of the {len(annotations)} boxes has an area inside its image, so '
            f'nothing would be learned; the first is {annotations[0]["bbox"]}, and bbox must be '
            '[x, y, width, height] in pixels'
        )


def _warn(message: str) -> None:
    # The run's logger writes on the first rank only.
    print_log(message, logger='current', level=logging.WARNING)


def _hashable(value: object) -> bool:
    return isinstance(value, (int, str, float))


def _column(entries: list[dict], key: str, of: str, what: str) -> list:
    try:
        return [entry[key] for entry in entries]
    except KeyError:
        i = next(i for i, entry in enumerate(entries) if key not in entry)
        raise AnnotationError(
            f'{what}: {of}[{i}] has no {key!r}; it has {", ".join(map(str, entries[i]))}'
        ) from None


def _unique(values: list, of: str, key: str, what: str) -> None:
    for i, value in enumerate(values):
        if not _hashable(value):
            raise AnnotationError(f'{what}: {of}[{i}].{key}={value!r} must be a number or a word')
    if len(set(values)) == len(values):
        return
    seen = set()
    for i, value in enumerate(values):
        if value in seen:
            raise AnnotationError(
                f'{what}: {of}[{i}].{key}={value!r} is taken twice '
                f'({len(values) - len(set(values))} repeated in all); each must be unique'
            )
        seen.add(value)


def _ids(entries: list[dict], of: str, what: str) -> list:
    ids = _column(entries, 'id', of, what)
    _unique(ids, of, 'id', what)
    return ids


def _numbers(entries: list[dict], key: str, of: str, what: str) -> np.ndarray:
    """The values of one key, (n,); raises unless all are finite numbers."""
    values = _column(entries, key, of, what)
    for i, value in enumerate(values):
        if type(value) not in (int, float) or not abs(value) < float('inf'):
            raise AnnotationError(
                f'{what}: {of}[{i}] (id {entries[i]["id"]!r}) has {key}={value!r}, which is no '
                'finite number'
            )
    return np.array(values, dtype=float)


def _boxes(annotations: list[dict], what: str) -> np.ndarray:
    """The boxes, (n, 4); raises unless all are finite numbers."""
    values = _column(annotations, 'bbox', 'annotations', what)
    for i, box in enumerate(values):
        if (
            type(box) is not list
            or len(box) != 4
            or any(type(v) not in (int, float) or not abs(v) < float('inf') for v in box)
        ):
            raise AnnotationError(
                f'{what}: annotations[{i}] (id {annotations[i]["id"]!r}) has bbox={box!r}, which '
                'must be four finite numbers [x, y, width, height]'
            )
    return np.array(values, dtype=float)


def loads_pictures(dataset: dict) -> bool:
    """Whether the files are pictures for Pillow too; a loader of one's own may read others."""
    loaders = [t for t in dataset.get('pipeline') or () if isinstance(t, dict)]
    return any(
        str(t.get('type')).rpartition('.')[2] == 'LoadImageFromFile'
        and t.get('imdecode_backend') != 'tifffile'
        for t in loaders
    )


def _check_images(images: list[dict], folder: str, what: str, pictures: bool = True) -> None:
    if '://' in folder:
        return
    paths = [osp.join(folder, image['file_name']) for image in images]
    there: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        parent, name = osp.split(path)
        if parent not in there:
            # Scanning a folder is cheaper than a stat of each of its 118,000 files.
            there[parent] = set()
            if osp.isdir(parent or '.'):
                with os.scandir(parent or '.') as entries:
                    there[parent] = {entry.name for entry in entries}
        if name not in there[parent]:
            missing.append(path)
    if missing:
        raise AnnotationError(
            f'{what}: {len(missing)} of {len(paths)} image files do not exist, the first is '
            f'{missing[0]}: set data_prefix.img, or take them out of the file'
        )
    for i in range(0, len(paths), max(1, len(paths) // SAMPLED_IMAGES)):
        try:
            with Image.open(paths[i]) as image:
                size, turn = image.size, image.getexif().get(0x0112, 1)
        except OSError as error:
            if isinstance(error, UnidentifiedImageError) and not pictures:
                continue
            raise AnnotationError(
                f'{what}: image {paths[i]} cannot be read ({error}): copy it again'
            ) from None
        said = (images[i]['width'], images[i]['height'])
        # MMDetection applies the EXIF orientation as it loads; 5 to 8 swap width and height.
        if turn in (5, 6, 7, 8) and size == said and size[0] != size[1]:
            _warn(
                f'{what}: image {paths[i]} is {size[0]}x{size[1]} as the file says, and its EXIF '
                f'orientation ({turn}) makes it {size[1]}x{size[0]} as MMDetection loads it, so '
                'boxes lie elsewhere: write the images turned, or load them by '
                "LoadImageFromFile(color_type='color_ignore_orientation')"
            )
        elif sorted(size) != sorted(said):
            _warn(
                f'{what}: image {paths[i]} has width and height {size}, the file says {said}: '
                'boxes may belong to another copy of the image'
            )
