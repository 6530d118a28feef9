"""Checkpoints: read without running what is in them, written so that plain PyTorch reads them.

MMEngine's training checkpoints hold more than tensors: the log's ``HistoryBuffer`` objects, numpy
arrays and scalars. :func:`read_checkpoint` reads them by :mod:`mmkd.io.reader`,
for which a file is data.
:func:`to_plain` and :func:`from_plain` keep such objects out of the files that mmkd writes.
:func:`install` puts the reader behind every door of MMEngine and makes its writes atomic.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import http.client
import logging
import os
import os.path as osp
import re
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.error import URLError
from urllib.parse import urlsplit

import mmengine
import numpy as np
import torch
from mmengine.dist import broadcast_object_list, get_dist_info
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import checkpoint as checkpoint_io
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    _get_mmengine_home,
    _process_mmcls_checkpoint,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..literals import show
from . import reader
from .reader import WAY_OUT, CheckpointError, history_buffer, is_safetensors

NUMPY_DTYPES = frozenset(
    np.dtype(code)
    for code in (
        *('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8'),
        *('f2', 'f4', 'f8', 'c8', 'c16'),
    )
)
"""The element types of arrays that are written: those that a tensor can hold."""

TAG = '__mmkd__'
"""Key that marks the plain form of something that is not plain, see :func:`to_plain`."""

MapLocation: TypeAlias = str | torch.device | Callable | dict | None


# --- Reading --------------------------------------------------------------------------------------


def read_checkpoint(
    path: str | os.PathLike,
    map_location: MapLocation = 'cpu',
    sha256: str | None = None,
    config_text: bool = False,
) -> dict:
    """Reads a checkpoint file without running anything in it, see :mod:`mmkd.io.reader`.

    Tensors and plain containers come back as ``torch.load`` gives them; numpy data, dates, paths,
    ``HistoryBuffer`` and ``Namespace`` objects as real ones, built from their values; dicts whose
    items are attributes (ConfigDict, EasyDict, CfgNode) as plain dicts; a member of an enumeration
    that this process has not imported is refused. The text of a config is left out
    (``meta.config``, ``meta.cfg`` and ``message_hub.runtime_info.cfg``): ``Runner.resume`` and the
    inferencer run it as Python. What :func:`to_plain` put in plain form stays so. A safetensors
    file, whatever its name, gives its tensors by name.

    Args:
        path: a local file. Where its name ends as OpenMMLab's published files do, with a date and
            8 digits of its SHA-256 (``name_20200130-1a2b3c4d.pth``), they have to fit.
        map_location: as for ``torch.load``.
        sha256: the file's SHA-256, 64 hex digits.
        config_text: whether ``meta.cfg`` stays, for who reads it as data.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file names something that is neither tensor nor plain container, or is
            no checkpoint (empty, a git-LFS pointer, a web page), or is cut off or damaged, or would
            take far more memory than its size, or is another one than ``sha256`` says.
    """
    path = osp.expanduser(os.fspath(path))
    if not osp.exists(path):
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    try:
        checkpoint = _read(path, map_location, sha256, osp.basename(path))
        config_left_out = _drop_config_text(checkpoint, keep_cfg=config_text)
    except CheckpointError as error:
        raise CheckpointError(readable(f'checkpoint {path} {error}')) from None
    for weights in (checkpoint, *map(checkpoint.get, ('state_dict', 'ema_state_dict'))):
        for value in (weights or {}).values():
            if isinstance(value, Tensor):
                _SOURCES[value] = path
    if config_left_out:
        print_log(
            f'the config text in checkpoint {path} is left out: resuming would run it',
            logger='current',
        )
    return checkpoint


def _read(
    path: str, map_location: MapLocation, sha256: str | None, name: str, url: str = ''
) -> dict:
    _check_kind(path)
    try:
        with open(path, 'rb') as file:
            # The one handle, so that what is checked is what is read.
            _check_hash(file, sha256, _digits(name, url or _URLS.get(path, '')))
            size = os.fstat(file.fileno()).st_size
            checkpoint = reader.read(file, size, map_location)
        if not isinstance(checkpoint, dict):
            raise CheckpointError(
                f'holds one {type(checkpoint).__name__} instead of a dict of tensors. {WAY_OUT}'
            )
        for part in ('state_dict', 'ema_state_dict'):
            weights = checkpoint.get(part, {})
            if not isinstance(weights, dict) or not all(type(key) is str for key in weights):
                raise CheckpointError(f'holds a {part} that is no dict of tensors by name')
        return checkpoint
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can be wrong in any way
        text = str(error).split('\n')[0].split('. ')[0]
        raise CheckpointError(
            f'cannot be read as tensors and plain containers ({type(error).__name__}'
            f'{": " if text else ""}{text:.200}): it is damaged, cut off or not a checkpoint. '
            f'{WAY_OUT}'
        ) from None


_OF_OPENMMLAB, _OF_ZOOS = r'_20\d{6}-([0-9a-f]{8})\.pth$', r'-([0-9a-f]{8})\.pth$'


_URLS: dict[str, str] = {}
"""Where the downloaded files are from."""


def _digits(name: str, url: str = '') -> str | None:
    """The first digits of the SHA-256 that a file's name states.

    A local name states them in OpenMMLab's form alone: other names end in eight digits of their
    own (``model-12345678.pth``, ``ckpt-00012000.pth``). The zoos' addresses always do.
    """
    host = (urlsplit(url).hostname or '').split('.')[-2:]
    of_zoo = host in (['openmmlab', 'com'], ['pytorch', 'org'])
    found = re.search(_OF_ZOOS if of_zoo else _OF_OPENMMLAB, name)
    return found[1] if found else None


def _check_hash(file: BinaryIO, sha256: str | None, in_name: str | None) -> None:
    """Leaves the file at its beginning.

    Raises:
        CheckpointError: It is another file than ``sha256``, or its name, says.
    """
    if sha256 is not None and not re.fullmatch('[0-9a-fA-F]{64}', str(sha256)):
        raise CheckpointError(
            f'cannot be checked against the SHA-256 {sha256!r}: give the 64 hex digits that '
            '`sha256sum` prints'
        )
    if sha256 is None and in_name is None:
        return
    own = hashlib.sha256()
    while part := file.read(2**20):
        own.update(part)
    file.seek(0)
    wanted = [sha256.lower()] if sha256 is not None else []
    wanted += [in_name] if in_name else []
    for digits in wanted:
        if not own.hexdigest().startswith(digits):
            raise CheckpointError(
                f'is another file than it should be: its SHA-256 is {own.hexdigest()}, and '
                f'{digits} {"is in its name" if len(digits) == 8 else "was asked for"}. Download '
                'or copy it again; if it was changed on purpose, rename it or give its own digest'
            )


def require_finite(network: nn.Module, weights: Mapping[str, Any], source: str = '') -> None:
    """Where weights meet a network: its parameters are numbers. Buffers may be anything (a mask).

    Args:
        network: whose parameters they are to be.
        weights: by the network's names, ``module.`` before them or not.
        source: the file, for the message; '': where :func:`read_checkpoint` read them.

    Raises:
        CheckpointError: with the name of the first parameter that is NaN or infinite.
    """
    parameters = {name.removeprefix('module.') for name, _ in network.named_parameters()}
    for key, value in weights.items():
        if not isinstance(value, Tensor) or key.removeprefix('module.') not in parameters:
            continue
        value = value.detach()
        if not (value.is_floating_point() or value.is_complex()):
            continue
        value = value.float() if value.element_size() < 4 else value
        # The sum of finite numbers may be infinite, but one that is not finite makes the sum so.
        if value.sum().isfinite() or value.isfinite().all():
            continue
        source = source or _SOURCES.get(weights[key], 'that is loaded')
        raise CheckpointError(
            readable(f'checkpoint {source} holds weights that are NaN or infinite, first in ')
            + readable(f'{key:.200}: ')
            + 'the training that wrote it had failed. Take an earlier checkpoint'
        )


_SOURCES = WeakIdKeyDictionary()
"""The file that each of the weights that were read is from, as long as it lives."""


def _check_kind(path: str) -> None:
    """Names what is not a checkpoint at all.

    Raises:
        CheckpointError: a directory, an empty file, a git-LFS pointer, a web page, a zip archive
            without its end, or a file that is neither of these nor a pickle or safetensors.
    """
    if path.endswith('.distcp') or osp.isfile(osp.join(path, '.metadata')):
        raise CheckpointError(
            'is of a distributed checkpoint (torch.distributed.checkpoint), which is a folder. '
            'Where you trust it, make one file of it: python -m '
            'torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth'
        )
    if osp.isdir(path):
        raise CheckpointError('is a directory: name the file in it')
    if not osp.isfile(path):
        raise CheckpointError('is no regular file')
    size = osp.getsize(path)
    with open(path, 'rb') as file:
        head = file.read(512)
        file.seek(max(0, size - 2**16 - 22))  # a zip archive's end, and its comment
        tail = file.read()
    if not head:
        raise CheckpointError('is empty (0 bytes): download or copy it again')
    if head.startswith(b'version https://git-lfs'):
        raise CheckpointError(
            'is a git-LFS pointer, not the file that it points to: fetch that with `git lfs pull`'
        )
    if head.lstrip(b'\xef\xbb\xbf \t\r\n').lower().startswith((b'<!doctype', b'<html', b'<?xml')):
        raise CheckpointError(
            'is a web page (HTML or XML), most likely an error page saved under its name: '
            'download it again and look at the address'
        )
    if head.startswith(b'PK'):
        if b'PK\5\6' not in tail:
            raise CheckpointError(
                f'is cut off: a zip archive without its end ({size} bytes are there). '
                'Download or copy it again'
            )
    elif not head.startswith((b'\x80', _MAGIC)) and not is_safetensors(head[:9], size):
        raise CheckpointError(
            f'is no PyTorch checkpoint: it starts with {head[:12]!r}, '
            'which is neither a zip archive, a pickle nor safetensors'
        )


_MAGIC = b'L119547037146038801333356L'
"""The beginning of PyTorch's old format in the protocols 0 and 1."""


def readable(said: str) -> str:
    """A message without what a terminal would take for an instruction, and not endless."""
    said = said if len(said) <= 1500 else f'{said[:1500]}...'
    return ''.join(
        letter if letter.isprintable() else letter.encode('unicode_escape').decode()
        for letter in said
    )


def _drop_config_text(checkpoint: dict, keep_cfg: bool = False) -> bool:
    """Removes the configs that MMEngine would run as Python: on resume, or in an inferencer.

    Returns:
        Whether there was one that resuming would have run.

    Raises:
        CheckpointError: What holds them is in plain form, from which they would come back.
    """
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    for name, part in (('meta', meta), ('message_hub', hub), ('runtime_info', info)):
        if isinstance(part, dict) and TAG in part:
            raise CheckpointError(f'hides its {name} in a plain form, which mmkd never writes')
    if isinstance(info, dict):
        info.pop('cfg', None)
    if not isinstance(meta, dict):
        return False
    if not keep_cfg:
        meta.pop('cfg', None)
    return meta.pop('config', None) is not None


def _replace(obj: Any, convert: Callable[[Any], Any], memo: dict[int, tuple[Any, Any]]) -> Any:
    """Applies ``convert`` to everything in plain containers, inner first; dicts and lists in place.

    Raises:
        CheckpointError: a container that contains itself.
    """
    if id(obj) in memo:
        if memo[id(obj)][1] is memo:
            raise CheckpointError('holds a container that contains itself')
        return memo[id(obj)][1]
    kind, result = type(obj), obj
    if kind not in (dict, OrderedDict, Counter, list, tuple):
        result = convert(obj)
        if result is not obj:  # millions of numbers need no note
            memo[id(obj)] = (obj, result)
        return result
    memo[id(obj)] = (obj, memo)  # open; the object is kept, so that its id stays its own
    if kind in (dict, OrderedDict, Counter):
        for key, value in obj.items():
            obj[key] = _replace(value, convert, memo)
        if kind is OrderedDict:  # a state_dict's _metadata
            for key, value in vars(obj).items():
                vars(obj)[key] = _replace(value, convert, memo)
    elif kind is list:
        obj[:] = [_replace(value, convert, memo) for value in obj]
    elif kind is tuple:
        result = tuple(_replace(value, convert, memo) for value in obj)
    result = convert(result)
    memo[id(obj)] = (obj, result)
    return result


# --- Writing: plain form and back -----------------------------------------------------------------

_PLAIN_TYPES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
    *(torch.Size, torch.device, torch.dtype, torch.layout),
)
"""Types that ``torch.load(weights_only=True)`` reads as they are."""

_DROP = object()


def to_plain(checkpoint: dict) -> dict:
    """A checkpoint in the form that ``torch.load(path)`` reads, with nothing allowlisted.

    Tensors (not copied), numbers, text and dict, OrderedDict, Counter, list, tuple and set stay.
    Other mappings become dicts, and other subclasses what they derive from. ``HistoryBuffer``
    objects, numpy arrays and numpy scalars become ``{'__mmkd__': name, ...}`` with tensors, which
    :func:`from_plain` turns back. Anything else is left out (in a list, ``None`` takes its place)
    with a warning that names it: training must not end because of what it cannot save.

    Returns:
        New containers; the checkpoint passed is not changed.
    """
    return _plain(checkpoint, 'checkpoint', {})


def _plain(obj: Any, path: str, memo: dict[int, tuple[Any, Any]]) -> Any:
    kind = type(obj)
    if kind is bytes and not obj:  # pickle writes it as a call of bytes, which torch refuses
        return {TAG: 'no bytes'}
    if kind in _PLAIN_TYPES:
        return obj
    if isinstance(obj, Tensor):
        # Attributes set on a tensor are pickled with it; a detached one has none.
        if kind in (Tensor, nn.Parameter) and not vars(obj):
            return obj
        return obj.detach().as_subclass(Tensor)
    if id(obj) in memo:
        if memo[id(obj)][1] is memo:
            return _drop(obj, path, 'contains itself')
        return memo[id(obj)][1]

    memo[id(obj)] = (obj, memo)
    result: Any = _DROP
    if isinstance(obj, HistoryBuffer):
        logs, counts = (_tensor(data) for data in obj.data)
        if logs is not None and counts is not None:
            result = {
                TAG: 'HistoryBuffer',
                'log_history': logs,
                'count_history': counts,
                'max_length': int(obj.max_length),
            }
    elif isinstance(obj, str):  # numpy.str_ among them, so before numpy's scalars
        result = str.__str__(obj)
    elif isinstance(obj, bytes):
        result = bytes(obj)
    elif kind is np.ndarray or isinstance(obj, np.generic):
        value = _tensor(np.asarray(obj))
        if value is not None:
            result = {TAG: 'ndarray' if kind is np.ndarray else 'scalar', 'value': value}
    elif isinstance(obj, int):
        result = int(obj)
    elif isinstance(obj, float | complex):
        result = float(obj) if isinstance(obj, float) else complex(obj)
    elif isinstance(obj, Mapping):
        result = _plain_dict(obj, path, memo)
    elif isinstance(obj, list | tuple):
        items = [_plain(value, f'{path}[{i}]', memo) for i, value in enumerate(obj)]
        items = [None if value is _DROP else value for value in items]
        result = items if isinstance(obj, list) else tuple(items)
    elif isinstance(obj, set) and all(_plain_key(value) is value for value in obj):
        result = set(obj)
    if result is _DROP:
        _drop(obj, path, 'is no tensor, number, text or container of such')
    memo[id(obj)] = (obj, result)
    return result


def _plain_dict(obj: Mapping, path: str, memo: dict[int, tuple[Any, Any]]) -> dict:
    items = {}
    for key, value in obj.items():
        plain_key = _plain_key(key)
        if plain_key is _DROP:
            _drop(value, f'{path}[{key!r}]', f'has a key of type {type(key).__name__}')
            continue
        value = _plain(value, f'{path}.{key}', memo)
        if value is not _DROP:
            items[plain_key] = value
    if TAG in items:  # somebody else's dict that looks like a plain form
        return {TAG: 'dict', 'items': list(items.items())}
    if isinstance(obj, Counter):
        return Counter(items)
    if not isinstance(obj, OrderedDict):
        return items
    ordered = OrderedDict(items)
    for name, value in vars(obj).items():  # a state_dict's _metadata
        value = _plain(value, f'{path}.{name}', memo)
        if value is not _DROP:
            setattr(ordered, name, value)
    return ordered


def _plain_key(key: Any) -> Any:
    if type(key) in _PLAIN_TYPES and key != b'':
        return key
    if type(key) is tuple:
        keys = tuple(_plain_key(part) for part in key)
        return _DROP if _DROP in keys else keys
    if isinstance(key, np.bool_ | np.integer | np.floating):
        return key.item()
    return str.__str__(key) if isinstance(key, str) else _DROP


def _drop(obj: Any, path: str, why: str) -> Any:
    kind = type(obj)
    print_log(
        f'{path} is left out of the checkpoint: {kind.__module__}.{kind.__qualname__} {why}',
        logger='current',
        level=logging.WARNING,
    )
    return _DROP


def _tensor(array: np.ndarray) -> Tensor | None:
    """The same numbers as a tensor of their own; None where a tensor cannot hold them."""
    native = array.dtype.newbyteorder('=')
    if native not in NUMPY_DTYPES:
        return None
    return torch.from_numpy(np.array(array, dtype=native, order='C'))


def from_plain(checkpoint: dict) -> dict:
    """The inverse of :func:`to_plain`, in place; tensors are not copied.

    Raises:
        CheckpointError: Something is marked as a plain form and is none.
    """
    seen: set[int] = set()

    def convert(obj: Any) -> Any:
        if type(obj) is not dict or TAG not in obj:
            return obj
        for tensor in obj.values():
            # Each form has its own: a thousand copies of one tensor would be a thousand times it.
            if isinstance(tensor, Tensor) and tensor.numel():
                memory = tensor.untyped_storage().data_ptr()
                if memory in seen:
                    raise CheckpointError('the checkpoint holds plain forms that share a tensor')
                seen.add(memory)
        return _from_tagged(obj)

    return _replace(checkpoint, convert, {})


def _from_tagged(obj: Any) -> Any:
    form = {key: value for key, value in obj.items() if key != TAG}
    match obj[TAG] if type(obj[TAG]) is str else None, form:
        case 'HistoryBuffer', {
            'log_history': Tensor() as logs,
            'count_history': Tensor() as counts,
            'max_length': max_length,
        } if len(form) == 3:
            return history_buffer(_array(logs), _array(counts), max_length)
        case 'ndarray', {'value': Tensor() as value} if len(form) == 1:
            return _array(value)
        case 'scalar', {'value': Tensor() as value} if len(form) == 1 and value.ndim == 0:
            return _array(value)[()]
        case 'no bytes', {} if not form:
            return b''
        case 'dict', {'items': list(items)} if len(form) == 1 and all(
            type(item) is tuple and len(item) == 2 for item in items
        ):
            _check_keys([key for key, _ in items])
            return dict(items)
    raise CheckpointError(f'the checkpoint holds an unknown plain form {show(obj[TAG])}')


def _check_keys(keys: list) -> None:
    for key in keys:
        parts = key if type(key) is tuple and len(key) <= 16 else (key,)
        if any(isinstance(part, tuple | list | dict) for part in parts):
            raise CheckpointError('the checkpoint holds a key that is a container')
    if len(keys) > 500 and 2 * len({hash(key) for key in keys}) < len(keys):
        raise CheckpointError('the checkpoint holds a dict whose keys have one hash')


def _array(tensor: Tensor) -> np.ndarray:
    try:
        return tensor.detach().cpu().numpy().copy()
    except (TypeError, RuntimeError):
        raise CheckpointError(f'the checkpoint holds a numpy array of {tensor.dtype}') from None


# --- MMEngine's doors -----------------------------------------------------------------------------


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local storage with writes that are there as a whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes bytes to a file: under a temporary name, to the disk, then renamed."""
        target = osp.realpath(filepath)  # a link stays one
        mmengine.mkdir_or_exist(osp.dirname(target))
        temporary = f'{target}.{os.getpid()}.partial'
        try:
            with open(temporary, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(osp.dirname(target))
        except BaseException:
            if osp.exists(temporary):
                os.remove(temporary)
            raise

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Writes text to a file, as :meth:`put` does."""
        self.put(obj.replace('\n', os.linesep).encode(encoding), filepath)


def _sync_folder(folder: str) -> None:
    """The new name is on the disk before an older file is removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def load_verified(filename: str, sha256: str) -> dict:
    """Reads a checkpoint that has to be the one of this SHA-256 (64 hex digits).

    Args:
        filename: a local file, a URL, or a name of a zoo (``torchvision://resnet50``).
        sha256: 64 hex digits.

    Raises:
        CheckpointError: It is another file, or it is refused.
    """
    scheme = filename.partition('://')[0] if '://' in filename else ''
    if scheme not in ('', 'http', 'https', *_TORCHVISION, *_OPENMMLAB):
        raise CheckpointError(
            f'{filename}: no SHA-256 is checked for {scheme}://. Download it and give its path'
        )
    return read_checkpoint(_located(filename), 'cpu', sha256)


def load_from_local(filename: str, map_location: MapLocation = None) -> dict:
    """Reads a local file, see :func:`read_checkpoint`."""
    return read_checkpoint(filename, map_location)


def load_from_http(filename: str, map_location: MapLocation = None) -> dict:
    """Downloads a checkpoint once, on the first rank, and reads it on all.

    Args:
        filename: the URL, or a name of a zoo (``torchvision://name``, ``open-mmlab://name``).
        map_location: as for ``torch.load``.

    Raises:
        CheckpointError: The URL cannot be downloaded, or what came is refused.
    """
    return read_checkpoint(_located(filename), map_location)


def download_path(url: str) -> str:
    """Where the file of a URL is kept, or will be."""
    name = osp.basename(url.split('?')[0].split('#')[0])
    return osp.join(torch.hub.get_dir(), 'checkpoints', name)


def is_here(filename: str) -> bool:
    """Whether a checkpoint is on this machine: a path, or a URL or a zoo's name once downloaded.

    Raises:
        CheckpointError: The zoo has no such name.
    """
    source = _source(filename)
    return osp.isfile(download_path(source) if _is_url(source) else osp.expanduser(source))


def _is_url(source: str) -> bool:
    return source.startswith(('http://', 'https://'))


_TORCHVISION = ('torchvision', 'modelzoo')
_OPENMMLAB = ('open-mmlab', 'openmmlab')


def _source(filename: str) -> str:
    """The URL or path that a name of a zoo stands for, by MMEngine's lists; another as it is."""
    scheme, _, name = filename.partition('://')
    if scheme in _TORCHVISION:
        # The list of old names needs no torchvision.
        urls = mmengine.load(osp.join(mmengine.__path__[0], 'hub', 'torchvision_0.12.json'))
        if name not in urls:
            try:
                urls = get_torchvision_models()
            except ImportError:
                print_log(
                    f'torchvision is not installed, and {name} is not among its old names',
                    logger='current',
                )
        return _entry(urls, name, filename)
    if scheme in _OPENMMLAB:
        name = get_deprecated_model_names().get(name, name)
        source = _entry(get_external_models(), name, filename)
        return source if _is_url(source) else osp.join(_get_mmengine_home(), source)
    return _entry(get_mmcls_models(), name, filename) if scheme == 'mmcls' else filename


def _located(filename: str) -> str:
    """The local path of a checkpoint, downloaded by the first rank; all ranks have to call it."""
    url = _source(filename)
    if not _is_url(url):
        return url
    rank, world_size = get_dist_info()
    failure: list = [None, False]
    if rank == 0:
        try:
            _download(url)
        except CheckpointError as error:
            failure = [str(error), isinstance(error.__cause__, URLError)]
    if world_size > 1:
        # The barrier too, and no rank waits for one that has failed.
        broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0]) from (URLError(url) if failure[1] else None)
    return _download(url)  # other machines' ranks


def _download(url: str) -> str:
    """The local path of a URL, which is downloaded unless that is there.

    Raises:
        CheckpointError: It cannot be downloaded or written, its SHA-256 does not begin with the 8
            digits at the end of its name, or it is no checkpoint.
    """
    target = download_path(url)
    name = osp.basename(target)
    _URLS[target] = url
    if osp.isfile(target):
        return target
    way_out = f'Download it by hand and give the local path instead (or put it at {target})'
    digits = _digits(name, url)
    temporary = f'{target}.{os.getpid()}.download'
    try:
        os.makedirs(osp.dirname(target), exist_ok=True)
        print_log(f'downloading {url} to {target}', logger='current')
        torch.hub.download_url_to_file(url, temporary, digits, progress=sys.stderr.isatty())
        # As a whole: what is cut off must not stay, and not every format has an end to look for.
        _read(temporary, 'cpu', None, name, url)
        os.replace(temporary, target)
    except CheckpointError as error:
        raise CheckpointError(f'what {url} gave {error}. {way_out}') from None
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise CheckpointError(
            f'{url} cannot be downloaded ({type(error).__name__}: {error}). {way_out}'
        ) from error
    finally:
        if osp.exists(temporary):
            os.remove(temporary)
    return target


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> dict:
    """Reads the backbone of ``mmcls://name`` by the list of URLs in MMEngine."""
    return _process_mmcls_checkpoint(load_from_http(filename, map_location))


def load_from_ceph(filename: str, map_location: MapLocation = None) -> dict:
    """Reads ``s3://...`` and ``petrel://...``, by way of a temporary file.

    Raises:
        CheckpointError: What came is refused.
    """
    store = get_file_backend(filename, backend_args={'backend': 'petrel'})
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, osp.basename(filename))
        Path(path).write_bytes(store.get(filename))
        try:
            return read_checkpoint(path, map_location)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(path, filename)) from None


def load_from_pavi(filename: str, map_location: MapLocation = None) -> dict:
    """Refuses ``pavi://...``, which MMEngine would read with all that is in it.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(f'checkpoint {filename} is not fetched: download it and give its path')


def _entry(urls: Mapping[str, str], name: str, filename: str) -> str:
    if name not in urls:
        near = difflib.get_close_matches(name, urls, n=3)
        raise CheckpointError(
            f'{filename}: no model of that name is known'
            f'{" (near it: " + ", ".join(near) + ")" if near else ""}. Give its URL or a local path'
        )
    return urls[name]


def install() -> None:
    """Puts the reader behind every scheme of MMEngine's loader, and makes its local writes atomic.

    It can be called again. Both registries belong to the process, and no narrower place covers
    everything: all parts of MMEngine load by CheckpointLoader, and its Runner and hooks write by
    the backend named ``local`` wherever a config gives no ``backend_args``.
    """
    for prefixes, loader in (
        ('', load_from_local),
        (
            tuple(f'{scheme}://' for scheme in ('http', 'https', *_TORCHVISION, *_OPENMMLAB)),
            load_from_http,
        ),
        ('mmcls://', load_from_mmcls),
        ((r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), load_from_ceph),
        ('pavi://', load_from_pavi),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')
    if checkpoint_io.load_state_dict is not _load_finite:
        _load_finite.original = checkpoint_io.load_state_dict  # type: ignore[attr-defined]
        checkpoint_io.load_state_dict = _load_finite


def _load_finite(module: nn.Module, state_dict: Mapping, *args: Any, **kwargs: Any) -> Any:
    """MMEngine's ``load_state_dict``, by which all its doors fill a network, of finite weights."""
    require_finite(module, state_dict)
    return _load_finite.original(module, state_dict, *args, **kwargs)  # type: ignore[attr-defined]
