"""A teacher's detections as an annotation file: COCO's format, with a score for each box.

The file holds every detection of at least ``info.min_score``; readers apply their own threshold.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import os.path as osp
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..io.checkpoint import AtomicLocalBackend
from ..options.class_map import first_names
from ..shipped import command
from .annotations import AnnotationError, read_coco

IMAGE_EXTENSIONS = (
    '.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp',
)  # fmt: skip
"""Those that MMDetection's inferencer takes from a folder."""
OF_THE_DISK = ('lost+found', '$RECYCLE.BIN', 'System Volume Information')
"""Folders of file systems, which nobody may read, and which have no images."""


class LabelsError(ValueError):
    """Images that cannot be labelled, or a file of labels that cannot be used."""


@dataclass(frozen=True)
class Images:
    """Image files in the order in which they are labelled.

    Attributes:
        names: what a labels file calls them; each is unique.
        paths: where they are.
        ids: their ids in the labels file.
    """

    names: list[str]
    paths: list[str]
    ids: list

    def __len__(self) -> int:
        return len(self.names)


def find_images(source: str | Path, prefix: str | Path | None = None) -> Images:
    """The images of a folder, or of a COCO file, whose annotations are not read.

    Args:
        source: a folder, searched with all folders in it; or a ``.json`` file.
        prefix: the folder that the names in a file begin from; None: the file's own.

    Raises:
        LabelsError: if there are none, or the file has an image twice.
        AnnotationError: if the file is no COCO file.
    """
    if osp.isdir(source):
        return _in_folder(str(source))
    if not str(source).endswith('.json'):
        kind = 'is neither a folder nor a .json file' if osp.exists(source) else 'does not exist'
        raise LabelsError(f'images {source} {kind}: name a folder of images, or a COCO file')
    entries = read_coco(str(source), f'the list of images {source}', ('images',))['images']
    keys = 'file_name', 'id'
    for i, entry in enumerate(entries):
        name, number = (entry.get(key) for key in keys)
        if not name or not isinstance(name, str) or not isinstance(number, int | str):
            raise AnnotationError(
                f'the list of images {source}: images[{i}] needs a file_name and an id; it has '
                f'{name!r} and {number!r}'
            )
    names, ids = ([entry[key] for entry in entries] for key in keys)
    for values, what in ((names, 'file_name'), (ids, 'id')):
        if len(set(values)) < len(values):
            seen: set = set()
            twice = next(v for v in values if v in seen or seen.add(v))  # type: ignore[func-returns-value]
            raise LabelsError(f'{source} has an image with {what} {twice!r} twice: remove one')
    folder = str(osp.dirname(source) if prefix is None else prefix)
    paths = [osp.join(folder, name) for name in names]
    if not any(map(osp.isfile, paths)):
        raise LabelsError(
            f'none of the {len(paths)} images of {source} is there, the first would be {paths[0]}: '
            'name the folder that their names begin from (img_prefix; --img-prefix)'
        )
    return Images(names, paths, ids)


def _in_folder(folder: str) -> Images:
    found, seen = [], set()

    def refuse(error: OSError) -> NoReturn:
        raise LabelsError(
            f'folder {error.filename} cannot be read ({error.strerror}), so its images would be '
            'left out: change its permissions, or take it out'
        ) from None

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # A link may lead back into a folder above.
        new = [f for f in folders if osp.realpath(osp.join(root, f)) not in seen]
        folders[:] = [f for f in new if not f.startswith('.') and f not in OF_THE_DISK]
        seen |= {osp.realpath(osp.join(root, f)) for f in folders} | {osp.realpath(root)}
        found += [
            osp.join(root, file)
            for file in files
            if file.lower().endswith(IMAGE_EXTENSIONS) and not file.startswith('.')
        ]
    if not found:
        raise LabelsError(
            f'folder {folder} has no image in it, nor in the folders below: files that end in '
            f'{" ".join(IMAGE_EXTENSIONS)} are looked for'
        )
    names = sorted(Path(path).relative_to(folder).as_posix() for path in found)
    return Images(names, [osp.join(folder, n) for n in names], list(range(1, len(names) + 1)))


@dataclass(frozen=True)
class Labelled:
    """An image and what the teacher found in it.

    Attributes:
        name: the image's ``file_name``.
        width, height: in pixels, as the image is loaded (turned as EXIF says).
        size, mtime_ns, sha256: of the image's file.
        rows: a list for each detection, best first: x, y, width, height in pixels, the class's
            number from 0 in the order of the file's categories, and the score.
    """

    name: str
    width: int
    height: int
    size: int
    mtime_ns: int
    sha256: str
    rows: list[list]

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """x1, y1, x2, y2 in pixels of the original image, (n, 4), float32."""
        boxes = np.array([row[:4] for row in self.rows], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes.astype(np.float32)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Class numbers, (n,), int64."""
        return np.array([row[4] for row in self.rows], np.int64)

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """Scores, (n,), float32, falling."""
        return np.array([row[5] for row in self.rows], np.float32)


@dataclass(frozen=True)
class Labels:
    """A labels file.

    Attributes:
        info: the teacher's ``name``, ``teacher_sha256`` of its weights and ``config_sha256`` of its
            config, ``mmkd``'s version, ``min_score``, and the images that were ``skipped``.
        classes: names, in the order of the class numbers.
        images: by name.
    """

    info: dict
    classes: list[str]
    images: dict[str, Labelled]


def read_labels(
    path: str | Path,
    teacher_digest: str | None = None,
    classes: Sequence[str] | None = None,
    names: Iterable[str] | None = None,
) -> Labels:
    """Read a labels file and check that it is what it has to be.

    Args:
        path: of the file.
        teacher_digest: the digest of the weights of the teacher that it has to be of
            (:func:`mmkd.digests.digest` of all tensors); None: of any.
        classes: the student's classes, in its order; None: any.
        names: images that have to be in it; None: any.

    Raises:
        LabelsError: naming the file, what is wrong, and the way out.
    """
    again = f'label the images again (`{command("pseudo-label")}`), or name another file'
    try:
        with open(path, encoding='utf-8') as file:
            labels = _parse(json.load(file))
    except FileNotFoundError:
        raise LabelsError(f'labels {path} do not exist: {again}') from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        said = f'{type(error).__name__}: {error}'
        raise LabelsError(f'labels {path} cannot be read ({said}): {again}') from None
    written = labels.info.get('content_sha256')
    if written is not None and written != content_digest(labels.classes, labels.images.values()):
        raise LabelsError(
            f'labels {path} are damaged, or were changed by hand after they had been written: '
            f'{again}, or remove info.content_sha256 from a file that you have changed on purpose'
        )
    if teacher_digest is not None and labels.info.get('teacher_sha256') != teacher_digest:
        of = labels.info.get('teacher', 'one that is not named')
        raise LabelsError(
            f'labels {path} are of another teacher: {of}, weights '
            f'{labels.info.get("teacher_sha256")} instead of {teacher_digest}: {again}'
        )
    if classes is not None and labels.classes != list(classes):
        raise LabelsError(
            f'labels {path} are of {len(labels.classes)} classes ({first_names(labels.classes)}), '
            f'the student has {len(classes)} ({first_names(classes)}), and they must be the same '
            f'in the same order: {again}'
        )
    missing = [name for name in names or () if name not in labels.images]
    if missing:
        raise LabelsError(
            f'labels {path} lack {len(missing)} of the images, the first is {missing[0]}: {again}'
        )
    return labels


def _parse(content: dict) -> Labels:
    """Labels of the content of a file; those of another program need no score, size or digest."""
    categories = sorted(content['categories'], key=lambda c: c['id'])
    label = {category['id']: i for i, category in enumerate(categories)}
    rows: dict[Any, list[list]] = {image['id']: [] for image in content['images']}
    for each in content['annotations']:
        x, y, width, height = each['bbox']
        row = [x, y, width, height, label[each['category_id']], each.get('score', 1.0)]
        if not all(isinstance(v, int | float) and abs(v) < float('inf') for v in row):
            raise ValueError(f'annotation {each.get("id")} has bbox and score {row}')
        rows[each['image_id']].append(row)
    images = {
        image['file_name']: Labelled(
            image['file_name'], image['width'], image['height'], image.get('size', -1),
            image.get('mtime_ns', -1), image.get('sha256', ''),
            sorted(rows[image['id']], key=lambda row: -row[5]),
        )
        for image in content['images']
    }  # fmt: skip
    return Labels(content.get('info') or {}, [c['name'] for c in categories], images)


def write_labels(path: str | Path, labels: Labels, ids: Sequence | None = None) -> None:
    """Write a labels file: under another name first, so it is there as a whole or not at all.

    Args:
        path: of the file.
        labels: what it is to hold.
        ids: of the images; None: 1, 2, ...
    """
    images: list[str] = []
    annotations: list[str] = []
    ids = range(1, len(labels.images) + 1) if ids is None else ids
    for number, image in zip(ids, labels.images.values(), strict=True):
        entry = dict(
            id=number, file_name=image.name, width=image.width, height=image.height,
            size=image.size, mtime_ns=image.mtime_ns, sha256=image.sha256,
        )  # fmt: skip
        images.append(json.dumps(entry))
        for x, y, width, height, label, score in image.rows:
            box = dict(
                id=len(annotations) + 1, image_id=number, category_id=label + 1,
                bbox=[x, y, width, height], area=round(width * height, 3), iscrowd=0, score=score,
            )  # fmt: skip
            annotations.append(json.dumps(box))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(labels.classes)]
    digest = content_digest(labels.classes, labels.images.values())
    text = ',\n'.join(
        f'"{key}": {value}'
        for key, value in (
            ('info', json.dumps({**labels.info, 'content_sha256': digest})),
            ('categories', json.dumps(categories)),
            ('images', '[\n' + ',\n'.join(images) + '\n]'),
            ('annotations', '[\n' + ',\n'.join(annotations) + '\n]'),
        )
    )
    AtomicLocalBackend().put(f'{{{text}}}\n'.encode(), str(path))


def content_digest(classes: Sequence[str], images: Iterable[Labelled]) -> str:
    """SHA-256 of classes and detections: whether a file is still what was written."""
    found = hashlib.sha256(json.dumps(list(classes)).encode())
    for image in images:
        found.update(to_line(image).encode())
    return found.hexdigest()


def to_line(image: Labelled) -> str:
    """An image's labels as one line of JSON; :func:`from_line` reads it."""
    return json.dumps([getattr(image, field.name) for field in fields(image)])


def from_line(line: str) -> Labelled:
    """What :func:`to_line` wrote."""
    return Labelled(*json.loads(line))
