"""Checkpoints: read without running what is in them, written so that plain PyTorch reads them.

MMEngine's training checkpoints hold more than tensors: the log's ``HistoryBuffer`` objects, numpy
arrays and scalars. :func:`read_checkpoint` answers the few names that these need with inert
stand-ins of our own, so that nothing real is ever allowlisted; any other name is refused.
:func:`to_plain` and :func:`from_plain` keep such objects out of the files that mmkd writes.
:func:`install` puts the reader behind every door of MMEngine and makes its writes atomic.
"""

from __future__ import annotations

import difflib
import http.client
import logging
import math
import os
import os.path as osp
import re
import sys
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import mmengine
import numpy as np
import torch
from mmengine.dist import broadcast_object_list, get_dist_info
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer, print_log
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

TAG = '__mmkd__'
"""Key that marks the plain form of something that is not plain, see :func:`to_plain`."""

NUMPY_DTYPES = frozenset(
    np.dtype(code)
    for code in (
        *('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8'),
        *('f2', 'f4', 'f8', 'c8', 'c16'),
    )
)
"""The element types of arrays that are read and written: those that a tensor can hold."""

WAY_OUT = (
    'Ask its author for a file with tensors only, or re-save it where it was trained: '
    'torch.save(model.state_dict(), path)'
)

MapLocation: TypeAlias = str | torch.device | Callable | dict | None


class CheckpointError(ValueError):
    """A checkpoint is refused, damaged or not to be had: the message says which, and what to do."""


# --- Reading: inert stand-ins for the names in a training checkpoint ------------------------------


class _StatisticsMethod(str):
    """Stands in for ``getattr(HistoryBuffer, name)``, one of the four methods it is saved with."""


class _HistoryBuffer:
    """Stands in for MMEngine's, whose ``__setstate__`` writes the file's methods to the class."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise CheckpointError('holds a HistoryBuffer whose state is not a dict of its fields')
        methods = state.get('statistics_methods', {})
        if type(methods) is not dict or not all(
            type(method) is _StatisticsMethod for method in methods.values()
        ):
            raise CheckpointError(
                'holds a HistoryBuffer with statistics_methods other than its own four'
            )
        self.state = state

    def real(self) -> HistoryBuffer:
        state = getattr(self, 'state', {})
        logs, counts = (state.get(key) for key in ('_log_history', '_count_history'))
        if type(logs) is not _Array or type(counts) is not _Array:
            raise CheckpointError('holds a HistoryBuffer whose histories are not numpy arrays')
        return _history_buffer(logs.real(), counts.real(), state.get('max_length'))


class _Dtype:
    """Stands in for ``numpy.dtype``; a crafted real one can crash the process."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        try:
            dtype = np.dtype(code) if type(code) is str and len(code) < 4 else None
        except TypeError:
            dtype = None
        if dtype is None or dtype not in NUMPY_DTYPES:
            raise CheckpointError(f'holds numpy data of type {code!r:.40}, which is not numeric')
        self.dtype: np.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags)
        if type(state) is not tuple or len(state) != 8 or state[2:5] != (None, None, None):
            raise CheckpointError('holds a numpy dtype that is not a plain number')
        if type(state[1]) is not str or state[1] not in ('<', '>', '|', '='):
            raise CheckpointError(f'holds a numpy dtype of byte order {state[1]!r:.40}')
        order: Any = state[1]
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for ``numpy.ndarray``."""

    def __setstate__(self, state: Any) -> None:
        # (version, shape, dtype, is Fortran order, bytes)
        if type(state) is not tuple or len(state) != 5:
            raise CheckpointError('holds a numpy array of an unknown form')
        self.state = state

    def real(self) -> np.ndarray:
        _, shape, dtype, fortran, raw = getattr(self, 'state', (None,) * 5)
        if type(dtype) is not _Dtype or type(raw) is not bytes:
            raise CheckpointError('holds a numpy array that is not made of numbers')
        if (
            type(shape) is not tuple
            or len(shape) > 32
            or not all(type(size) is int and size >= 0 for size in shape)
            or math.prod(shape) * dtype.dtype.itemsize != len(raw)
        ):
            raise CheckpointError(
                f'holds a numpy array of {len(raw)} bytes that claims the shape {shape!r:.60}'
            )
        array = np.frombuffer(raw, dtype.dtype).reshape(shape, order='F' if fortran else 'C')
        return array.copy()


def _getattr(owner: Any, name: Any) -> _StatisticsMethod:
    """Stands in for ``getattr``, which a ``HistoryBuffer`` names for its four methods only."""
    if owner is not _HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        owner = 'HistoryBuffer' if owner is _HistoryBuffer else repr(owner)
        raise CheckpointError(f'calls builtins.getattr({owner:.60}, {name!r:.60})')
    return _StatisticsMethod(name)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Stands in for numpy's function that makes the empty array which the state then fills."""
    if kind is not _Array:
        raise CheckpointError(f'holds a numpy array of the class {kind!r:.60}')
    return _Array()


def _scalar(dtype: Any, raw: Any) -> np.generic:
    """Stands in for numpy's function that makes a scalar from bytes."""
    if type(dtype) is not _Dtype or type(raw) is not bytes or len(raw) != dtype.dtype.itemsize:
        raise CheckpointError('holds a numpy scalar that is not a number')
    return np.frombuffer(raw, dtype.dtype)[0]


def _bytes() -> bytes:
    """Stands in for ``bytes``, by which pickle writes empty ones: those of an empty array."""
    return b''


STAND_INS: list[tuple[Callable, str]] = [
    (_bytes, 'builtins.bytes'),
    (_getattr, 'builtins.getattr'),
    (_HistoryBuffer, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (_Array, 'numpy.ndarray'),
    (_Dtype, 'numpy.dtype'),
    (_reconstruct, 'numpy.core.multiarray._reconstruct'),
    (_reconstruct, 'numpy._core.multiarray._reconstruct'),
    (_scalar, 'numpy.core.multiarray.scalar'),
    (_scalar, 'numpy._core.multiarray.scalar'),
]
"""What answers which name of a file. torch's own list has the rest (OrderedDict, codecs.encode)."""

_STAND_IN_OBJECTS = {function for function, _ in STAND_INS}
_STAND_IN_LOCK = threading.Lock()


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Allowlists the stand-ins, and for that time nothing that others have allowlisted.

    Without the latter, an ``add_safe_globals([getattr])`` somewhere in the process, the advice that
    is usually given, would hand the real ``getattr`` to every file.
    """
    with _STAND_IN_LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(STAND_INS)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def read_checkpoint(path: str | os.PathLike, map_location: MapLocation = 'cpu') -> dict:
    """Reads a checkpoint file without running anything that is in it.

    Tensors and plain containers come back as they are; ``HistoryBuffer`` objects and numpy data of
    a training checkpoint as real ones, built from their numbers. The text of a config is left out
    (``meta.config``, ``meta.cfg`` and ``message_hub.runtime_info.cfg``): ``Runner.resume`` and the
    inferencer run it as Python. What :func:`to_plain` put in plain form stays so.

    Args:
        path: a local file.
        map_location: as for ``torch.load``.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file names something that is neither tensor nor plain container, or is
            no checkpoint (empty, a git-LFS pointer, a web page), or is cut off or damaged.
    """
    path = osp.expanduser(os.fspath(path))
    if not osp.exists(path):
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    try:
        _check_kind(path)
        with _only_stand_ins():
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        if not isinstance(checkpoint, dict):
            raise CheckpointError(
                f'holds one {type(checkpoint).__name__} instead of a dict of tensors. {WAY_OUT}'
            )
        checkpoint = _replace(checkpoint, _real, {})
    except CheckpointError as error:
        message = str(error)
    except Exception as error:  # torch's readers raise almost anything on a damaged file
        message = _reason(error)
    else:
        _drop_config_text(checkpoint, path)
        return checkpoint
    # Outside of the handler: torch's message advises to turn the safety off, so it must not be
    # shown as the cause either.
    raise CheckpointError(f'checkpoint {path} {message}')


def _check_kind(path: str) -> None:
    """Names what is not a checkpoint at all.

    Raises:
        CheckpointError: a directory, an empty file, a git-LFS pointer, a web page, a zip archive
            without its end, or a file that is neither a zip archive nor a pickle.
    """
    if osp.isdir(path):
        raise CheckpointError('is a directory: name the file in it')
    with open(path, 'rb') as file:
        head = file.read(512)
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
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f'is cut off: a zip archive without its end ({osp.getsize(path)} bytes are there). '
                'Download or copy it again'
            )
    elif not head.startswith(b'\x80'):
        raise CheckpointError(
            f'is no PyTorch checkpoint: it starts with {head[:12]!r}, '
            'which is neither a zip archive nor a pickle'
        )


def _reason(error: Exception) -> str:
    """What is wrong with a file, from torch's message less its advice."""
    text = str(error)
    if match := re.search(r'GLOBAL (\S+) (?:was not an allowed|whose module)', text):
        name = match[1] if '.' in match[1] else f'builtins.{match[1]}'
        return (
            f'names {name}, which is neither a tensor nor a plain container: '
            f'reading it could run code, so it is refused. {WAY_OUT}'
        )
    if 'weights_only' in text:
        match = re.search(r'(?:Unpickler error:|\n\n)\s*(.+?)\s*(?:\n\nCheck|$)', text, re.DOTALL)
        text = match[1] if match else ''
    text = text.strip().split('\n')[0].split('. ')[0]
    if 'weights_only' in text or 'safe_globals' in text:
        text = ''
    return (
        f'cannot be read as tensors and plain containers ({type(error).__name__}'
        f'{": " if text else ""}{text}): it is damaged, cut off or not a checkpoint. {WAY_OUT}'
    )


def _drop_config_text(checkpoint: dict, path: str) -> None:
    """Removes the configs that MMEngine would run as Python: on resume, or in an inferencer."""
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    if isinstance(meta, dict):
        meta.pop('cfg', None)
        if meta.pop('config', None) is not None:
            print_log(
                f'the config text in checkpoint {path} is left out: resuming would run it',
                logger='current',
            )
    if isinstance(info, dict):
        info.pop('cfg', None)


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
    if kind in (dict, OrderedDict, list, tuple):
        memo[id(obj)] = (obj, memo)  # open; the object is kept, so that its id stays its own
    if kind in (dict, OrderedDict):
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


def _real(obj: Any) -> Any:
    """The real value behind a stand-in."""
    if isinstance(obj, _Array | _HistoryBuffer):
        return obj.real()
    if isinstance(obj, _Dtype | _StatisticsMethod) or (
        callable(obj) and any(obj is stand_in for stand_in in _STAND_IN_OBJECTS)
    ):
        raise CheckpointError('holds a piece of a HistoryBuffer or of numpy data outside of one')
    return obj


def _history_buffer(logs: np.ndarray, counts: np.ndarray, max_length: Any) -> HistoryBuffer:
    if logs.ndim != 1 or logs.shape != counts.shape or type(max_length) is not int:
        raise CheckpointError(
            f'holds a HistoryBuffer with logs of shape {logs.shape}, counts of shape '
            f'{counts.shape} and max_length {max_length!r:.40}'
        )
    if not len(logs) <= max_length:
        raise CheckpointError(f'holds a HistoryBuffer of {len(logs)} > max_length {max_length}')
    return HistoryBuffer(logs, counts, max_length)


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
    return _replace(checkpoint, _from_tagged, {})


def _from_tagged(obj: Any) -> Any:
    if type(obj) is not dict or TAG not in obj:
        return obj
    form = {key: value for key, value in obj.items() if key != TAG}
    match obj[TAG], form:
        case 'HistoryBuffer', {
            'log_history': Tensor() as logs,
            'count_history': Tensor() as counts,
            'max_length': max_length,
        } if len(form) == 3:
            return _history_buffer(_array(logs), _array(counts), max_length)
        case 'ndarray', {'value': Tensor() as value} if len(form) == 1:
            return _array(value)
        case 'scalar', {'value': Tensor() as value} if len(form) == 1 and value.ndim == 0:
            return _array(value)[()]
        case 'no bytes', {} if not form:
            return b''
        case 'dict', {'items': list(items)} if len(form) == 1 and all(
            type(item) is tuple and len(item) == 2 for item in items
        ):
            return dict(items)
    raise CheckpointError(f'the checkpoint holds an unknown plain form {obj[TAG]!r:.60}')


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
        except BaseException:
            if osp.exists(temporary):
                os.remove(temporary)
            raise

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Writes text to a file, as :meth:`put` does."""
        self.put(obj.replace('\n', os.linesep).encode(encoding), filepath)


def load_from_local(filename: str, map_location: MapLocation = None) -> dict:
    """Reads a local file, see :func:`read_checkpoint`."""
    return read_checkpoint(filename, map_location)


def load_from_http(
    filename: str, map_location: MapLocation = None, model_dir: str | None = None
) -> dict:
    """Downloads a checkpoint once, on the first rank, and reads it on all.

    Args:
        filename: the URL.
        map_location: as for ``torch.load``.
        model_dir: where downloads are kept, by default ``checkpoints`` in ``torch.hub.get_dir()``.

    Raises:
        CheckpointError: The URL cannot be downloaded, or what came is refused.
    """
    model_dir = model_dir or osp.join(torch.hub.get_dir(), 'checkpoints')
    rank, world_size = get_dist_info()
    failure: list[str | None] = [None]
    if rank == 0:
        try:
            _download(filename, model_dir)
        except CheckpointError as error:
            failure = [str(error)]
    if world_size > 1:
        # The barrier too, and no rank waits for one that has failed.
        broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])
    return read_checkpoint(_download(filename, model_dir), map_location)  # other machines' ranks


def _download(url: str, model_dir: str) -> str:
    """The local path of a URL, which is downloaded unless that is there.

    Raises:
        CheckpointError: It cannot be downloaded or written, its SHA-256 does not begin with the 8
            digits at the end of its name, or it is no checkpoint.
    """
    name = osp.basename(url.split('?')[0].split('#')[0])
    target = osp.join(model_dir, name)
    if osp.isfile(target):
        return target
    way_out = f'Download it by hand and give the local path instead (or put it at {target})'
    # A date is no hash, although its digits could be one.
    digits = re.search(r'-(?!(?:19|20)\d\d[01]\d[0-3]\d)([0-9a-f]{8})\.pth$', name)
    temporary = f'{target}.{os.getpid()}.download'
    try:
        os.makedirs(model_dir, exist_ok=True)
        print_log(f'downloading {url} to {target}', logger='current')
        torch.hub.download_url_to_file(
            url, temporary, digits and digits[1], progress=sys.stderr.isatty()
        )
        _check_kind(temporary)
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


def load_from_torchvision(filename: str, map_location: MapLocation = None) -> dict:
    """Reads ``torchvision://name`` by MMEngine's list of URLs; torchvision need not be there."""
    name = filename.split('://', 1)[1]
    urls = mmengine.load(osp.join(mmengine.__path__[0], 'hub', 'torchvision_0.12.json'))
    if name not in urls:
        try:
            urls = get_torchvision_models()
        except ImportError:
            print_log(f'torchvision is not installed, and {name} is not among its old names')
    return load_from_http(_entry(urls, name, filename), map_location)


def load_from_openmmlab(filename: str, map_location: MapLocation = None) -> dict:
    """Reads ``open-mmlab://name`` by the list of URLs in MMEngine."""
    name = filename.split('://', 1)[1]
    name = get_deprecated_model_names().get(name, name)
    source = _entry(get_external_models(), name, filename)
    if source.startswith(('http://', 'https://')):
        return load_from_http(source, map_location)
    return read_checkpoint(osp.join(_get_mmengine_home(), source), map_location)


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> dict:
    """Reads the backbone of ``mmcls://name`` by the list of URLs in MMEngine."""
    source = _entry(get_mmcls_models(), filename.split('://', 1)[1], filename)
    return _process_mmcls_checkpoint(load_from_http(source, map_location))


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

    It can be called again. ``pavi://``, ``s3://`` and ``petrel://`` stay MMEngine's.
    """
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        (('torchvision://', 'modelzoo://'), load_from_torchvision),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ('mmcls://', load_from_mmcls),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')
