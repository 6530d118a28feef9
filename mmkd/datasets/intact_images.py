"""Loading an image raises ImageError, naming the file, if it is missing, truncated or no image.

OpenCV before 5 decodes the upper part of a truncated JPEG, with no more than a warning of libjpeg,
and the detector is trained on an image that is grey below. Reading every file before training
would take hours on network storage, so each file is checked when it is loaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine import fileio
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image, UnidentifiedImageError

EXIF_ORIENTATION = 0x0112
_WAY_OUT = 'copy it again, or take it out of the annotation file'


class ImageError(RuntimeError):
    """An image cannot be trained or tested on."""


def require_intact_images(dataset: Any) -> None:
    """Make the ``LoadImageFromFile`` transforms of a data set raise on files that are not intact.

    Intact files give the same pixels as before, to the bit. Each file is read once, by the backend
    of ``backend_args``. A subclass with a ``transform`` of its own is not changed.

    Args:
        dataset: a built data set, or a wrapper round one or several; changed in place.
    """
    for load in transforms_in(dataset):
        own = isinstance(load, LoadImageFromFile)
        if own and type(load).transform is LoadImageFromFile.transform:
            load.transform = functools.partial(_load_intact, load)


def transforms_in(node: Any) -> Iterator[Any]:
    """The transforms of a data set or a pipeline, also those inside wrappers."""
    inside: Any = []
    if isinstance(node, BaseTransform):
        yield node
    if isinstance(node, (list, tuple)):
        inside = node
    elif isinstance(node, dict):
        inside = node.values()
    elif isinstance(node, (BaseTransform, Compose)):
        inside = vars(node).values()
    else:
        own = getattr(node, '__dict__', {})
        inside = [own[k] for k in ('pipeline', 'dataset', 'datasets', '_dataset') if k in own]
    for each in inside:
        yield from transforms_in(each)


def _load_intact(load: LoadImageFromFile, results: dict) -> dict | None:
    """``LoadImageFromFile.transform`` with a check of the bytes.

    Raises:
        ImageError: naming the file, what is wrong with it, and what to do.
    """
    path = results['img_path']
    try:
        content = _read(load, path)
        if not content:
            raise ValueError('it is an empty file')
        cut, image = cut_short(content), None
        if not cut:
            image = mmcv.imfrombytes(content, flag=load.color_type, backend=load.imdecode_backend)
    except Exception as error:
        if load.ignore_empty:
            return None
        reason = getattr(error, 'strerror', None) or error
        raise ImageError(f'image {path} cannot be read ({reason}): {_WAY_OUT}') from None
    if cut:
        raise ImageError(
            f'image {path} is cut short: none of its {len(content)} bytes is the end of a {cut}, '
            f'so a part of the picture is missing: {_WAY_OUT}'
        )
    if image is None:
        raise ImageError(
            f'image {path} is no image that {load.imdecode_backend} can decode ({len(content)} '
            f'bytes, beginning with {content[:8]!r}): {_WAY_OUT}'
        )
    results['img'] = image.astype(np.float32) if load.to_float32 else image
    results['img_shape'] = results['ori_shape'] = image.shape[:2]
    return results


def _read(load: LoadImageFromFile, path: str) -> bytes:
    if load.file_client_args is not None:
        return fileio.FileClient.infer_client(load.file_client_args, path).get(path)
    return fileio.get(path, backend_args=load.backend_args)


def cut_short(content: bytes) -> str | None:
    """'JPEG' or 'PNG' if such a file lacks its end marker, else None.

    Bytes after the marker are allowed: cameras and phones append data to their files.
    """
    if content.startswith(b'\x89PNG\r\n\x1a\n'):
        return None if content.rfind(b'IEND') > 0 else 'PNG'
    if not content.startswith(b'\xff\xd8'):
        return None
    # The header may contain a preview with an end marker of its own: skip its segments.
    at = 2
    while at + 4 <= len(content):
        if content[at] != 0xFF:
            return None  # an unknown kind of JPEG: the decoder decides
        marker = content[at + 1 : at + 2]
        if marker == b'\xda':
            return None if content.rfind(b'\xff\xd9', at) > 0 else 'JPEG'
        at += 1 if marker == b'\xff' else 2 + int.from_bytes(content[at + 2 : at + 4], 'big')
    return 'JPEG'


def turns_photographs(pipeline: Sequence[dict]) -> bool:
    """Whether the loader of a pipeline's config turns photographs as their EXIF data say."""
    named = [(t, t.get('type')) for t in pipeline if isinstance(t, dict)]
    loads = [t for t, kind in named if 'LoadImageFromFile' in getattr(kind, '__name__', str(kind))]
    load = loads[0] if loads else {}
    turning = load.get('color_type', 'color') in ('color', 'grayscale')
    return turning and (load.get('imdecode_backend') or 'cv2') in ('cv2', 'pillow')


def is_turned(path: str) -> bool:
    """Whether the EXIF data of an image say that it was taken with the camera turned."""
    try:
        with Image.open(path) as image:
            # Of a PNG without EXIF data getexif() decodes the picture.
            known = image.format != 'PNG' or 'exif' in image.info
            return known and image.getexif().get(EXIF_ORIENTATION, 1) != 1
    except Exception:  # OpenCV passes damaged EXIF data over
        return False


def unreadable(paths: Sequence[str], pictures: bool = True) -> dict[str, str]:
    """Why files cannot be images, as far as their first bytes tell, by path.

    Args:
        paths: of the files.
        pictures: whether OpenCV or Pillow have to be able to read them.
    """

    def look(path: str) -> str | None:
        try:
            if not os.path.getsize(path):
                return 'it is an empty file'
            if pictures and not cv2.haveImageReader(path):
                with Image.open(path):
                    return None
        except UnidentifiedImageError:
            return 'it is no image'
        except OSError as error:
            return error.strerror or str(error)
        return None

    with ThreadPoolExecutor(16) as pool:  # it is the disk, or the network, that takes the time
        return {p: why for p, why in zip(paths, pool.map(look, paths), strict=True) if why}


class IntactImagesHook(Hook):
    """Calls :func:`require_intact_images` again: a hook may have replaced the pipeline."""

    priority = 'LOWEST'

    def before_train_epoch(self, runner: Runner) -> None:
        """Covers the pipeline of this epoch."""
        require_intact_images(getattr(runner.train_loop.dataloader, 'dataset', None))
