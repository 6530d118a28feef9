"""An image that is gone, cut short or no image stops the run by its name, when it is its turn.

OpenCV before 5 decodes the upper part of a JPEG that was cut short, with a warning of libjpeg's
alone, and a detector is trained on a picture that is grey below. A look at every file before
training would take hours on network storage, so each is looked at as it is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine import fileio
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.runner import Runner

_WAY_OUT = 'copy it again, or take it out of the annotation file'


class ImageError(RuntimeError):
    """An image cannot be trained or tested on."""


def require_whole_images(dataset: Any) -> None:
    """Let a data set's ``LoadImageFromFile`` transforms refuse files that are not whole.

    What they load of whole files stays as it is, to the bit, and each file is read once, through
    whatever ``backend_args`` name. A class of one's own that loads in its own way is left alone.

    Args:
        dataset: a built data set, or a wrapper round one or several; changed in place.
    """
    for load in _loads(dataset):
        load.transform = functools.partial(_load_whole, load)


def _loads(node: Any) -> Iterator[LoadImageFromFile]:
    """The transforms that load images, inside wrappers of data sets and of transforms."""
    inside: Any = []
    if isinstance(node, LoadImageFromFile):
        if type(node).transform is LoadImageFromFile.transform:
            yield node
    elif isinstance(node, (list, tuple)):
        inside = node
    elif isinstance(node, dict):
        inside = node.values()
    elif isinstance(node, (BaseTransform, Compose)):
        inside = vars(node).values()
    else:
        own = getattr(node, '__dict__', {})
        inside = [own[k] for k in ('pipeline', 'dataset', 'datasets', '_dataset') if k in own]
    for each in inside:
        yield from _loads(each)


def _load_whole(load: LoadImageFromFile, results: dict) -> dict | None:
    """``LoadImageFromFile.transform``, with a look at the bytes.

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
    """The format, JPEG or PNG, of a file that lacks its end; None of any other.

    What follows the end does not matter: cameras and phones append to their files.
    """
    if content.startswith(b'\x89PNG\r\n\x1a\n'):
        return None if content.rfind(b'IEND') > 0 else 'PNG'
    if not content.startswith(b'\xff\xd8'):
        return None
    # The header may hold a preview with an end of its own, so its segments are stepped over.
    at = 2
    while at + 4 <= len(content):
        if content[at] != 0xFF:
            return None  # no JPEG that this knows: the decoder decides
        marker = content[at + 1 : at + 2]
        if marker == b'\xda':
            return None if content.rfind(b'\xff\xd9', at) > 0 else 'JPEG'
        at += 1 if marker == b'\xff' else 2 + int.from_bytes(content[at + 2 : at + 4], 'big')
    return 'JPEG'


class WholeImagesHook(Hook):
    """What loads images may be another than at the start: a hook has switched the pipeline."""

    priority = 'LOWEST'

    def before_train_epoch(self, runner: Runner) -> None:
        """Lets it refuse files that are not whole, too."""
        require_whole_images(getattr(runner.train_loop.dataloader, 'dataset', None))
