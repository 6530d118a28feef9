"""Makes values of what a checkpoint holds, by a closed table: nothing in it is imported or run.

A child process (:mod:`.isolated_reader`) unpickles the file into forms, within limits of time and
memory that the system enforces; the tensors' bytes are read, and their CRCs checked, here.
"""

from __future__ import annotations

import argparse
import datetime
import enum
import math
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from . import isolated_reader
from .isolated_reader import (
    AGAIN,
    REFUSED,
    ROOM,
    TOO_LARGE,
    WAY_OUT,
    CheckpointError,
    damaged,
    need,
)

_SHOWN = (type(None), bool, int, float, str, bytes)


def show(value: Any) -> str:
    """A value in a message: short, on one line, and not written out where it holds others."""
    if type(value) in (tuple, list) and len(value) <= 8:
        items = ', '.join(show(v) if type(v) in _SHOWN else f'<{type(v).__name__}>' for v in value)
        comma = ',' if len(value) == 1 else ''
        return f'({items}{comma})' if type(value) is tuple else f'[{items}]'
    if isinstance(value, _Name):
        return value.rpartition('.')[2]
    if isinstance(value, _Method):
        value = str.__str__(value)
    if type(value) is int and abs(value) >= 2**64:
        return f'an integer of {value.bit_length()} bits'
    if type(value) not in _SHOWN:
        return f'<{type(value).__name__}>'
    return ascii(value[:60]) + '...' if type(value) in (str, bytes) and value[60:] else ascii(value)


def read(file: BinaryIO, size: int, map_location: Any) -> Any:
    """What a file holds, told by its first bytes: a zip archive, pickles, or safetensors.

    Args:
        file: open, with a descriptor.
        size: its bytes.
        map_location: as for ``torch.load``.

    Raises:
        CheckpointError: It is refused or damaged.
    """
    restore = torch.serialization._get_restore_location(map_location)
    if is_safetensors(os.pread(file.fileno(), 9, 0), size):
        return _read_safetensors(file, restore)
    command = [sys.executable, '-I', '-S', isolated_reader.__file__, str(os.getpid())]
    child = subprocess.Popen(
        command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, 'LC_ALL': 'C'},
    )  # fmt: skip
    result = cut_off = None
    try:
        with child, ThreadPoolExecutor(1) as pool:  # which checks CRCs beside the next read
            assert child.stdout is not None and child.stderr is not None
            try:
                values = _Values(child.stdout)
                names, storages, places, pieces = values.load()
                for name in names:
                    _check_name(name)
                values = _Values(child.stdout)
                values.storages = _Storages(file, size, restore, storages, places, pool)
                held = sum(map(values.storages.nbytes, storages)) if places else 0
                values.left = ROOM + 2 * max(0, size - held)
                result = values.load()
                values.storages.check()
                need(not pieces, 'a piece of a HistoryBuffer or of numpy data outside of one')
            except (EOFError, pickle.UnpicklingError) as error:  # the child says why
                cut_off = error
            said, status = child.stderr.read().decode('utf-8', 'replace').strip(), child.wait()
    finally:
        child.kill()
    if status or cut_off:
        raise CheckpointError(_why(status, said))
    return result


def _why(status: int, said: str) -> str:
    if status == REFUSED and said:
        return said
    if status in (-signal.SIGXCPU, -signal.SIGALRM):
        return 'takes longer to read than any checkpoint of its size, so it is refused'
    if status == -signal.SIGKILL:
        return 'cannot be read: the process that reads it was killed. Is there memory left?'
    if status < 0:
        name = signal.Signals(-status).name
        return f'is damaged or forged: the process that reads it crashed ({name}). {AGAIN}'
    last = said.split('\n')[-1]
    return f'cannot be read: {sys.executable}, which was to read it, ended with {status}: {last}'


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of so many bytes whose first 9 are these is a safetensors file."""
    return head[8:] == b'{' and int.from_bytes(head[:8], 'little') <= size - 8


def _read_safetensors(file: BinaryIO, restore: Any) -> dict[str, Tensor]:
    """By its library: safe by its format, so no child is needed."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        what = 'is a safetensors file, and the library that reads them is not installed'
        raise CheckpointError(f'{what}: `pip install safetensors`') from None
    try:
        mapped = load_file(f'/proc/self/fd/{file.fileno()}')
    except SafetensorError as error:
        raise CheckpointError(f'is no whole safetensors file ({error!s:.300}). {AGAIN}') from None
    tensors = {}
    for name, tensor in mapped.items():
        tensor = tensor.clone()  # of the mapped file, which may change
        _check_booleans(tensor, name)
        stored = restore(tensor.untyped_storage(), 'cpu')
        empty = torch.empty(0, dtype=tensor.dtype, device=stored.device)
        tensors[name] = empty.set_(stored, 0, tensor.shape, tensor.stride())
    return tensors


def _check_booleans(tensor: Tensor, name: str) -> None:
    if tensor.dtype == torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
        raise CheckpointError(f'is damaged: {name:.80} holds booleans that are neither 0 nor 1')


class _Storages:
    """The file's pieces of memory, each read when it is asked for, to the device asked for."""

    def __init__(
        self, file: Any, size: int, restore: Any, claims: dict, places: Any, pool: Any
    ) -> None:
        self.file, self.size, self.restore = file, size, restore
        self.claims, self.places = claims, places
        self.known: dict[str, tuple] = {}
        self.pool = pool
        self.crcs: dict[str, tuple[int, Future]] = {}
        if isinstance(places, list):  # torch's old format: one behind the other, with its length
            begin, keys = places
            self.places = {}
            for key in keys:
                count, nbytes = claims[key][2], self.nbytes(key)
                if int.from_bytes(os.pread(file.fileno(), 8, begin), 'little') != count:
                    raise CheckpointError(
                        f'is cut off or damaged at the storage {key:.60}. {AGAIN}'
                    )
                self.places[key] = begin + 8, nbytes, None
                begin += 8 + nbytes
            if begin != size:
                what = 'bytes lie behind its end' if begin < size else 'bytes are cut off'
                raise CheckpointError(f'is damaged: {abs(size - begin)} {what}. {AGAIN}')

    def check(self) -> None:
        """Insists on the CRCs of what was read."""
        for key, (wanted, found) in self.crcs.items():
            if found.result() != wanted:
                damaged(f'the CRC of its part data/{key:.60} does not fit')

    def nbytes(self, key: str) -> int:
        kind, _, count = self.claims[key]
        if kind not in _STORAGES or not 0 <= count <= self.size:
            raise CheckpointError(
                f'claims a storage of {show(count)} elements in a file of {self.size} bytes'
            )
        return count * getattr(_STORAGES[kind], 'itemsize', 1)

    def __call__(self, key: str) -> tuple[Any, torch.dtype | None, int]:
        """A storage, the type of its elements, and its bytes."""
        if key in self.known:
            return self.known[key]
        (kind, location, _), nbytes = self.claims[key], self.nbytes(key)
        if self.places[key] is None:
            raise CheckpointError(f'lacks the storage {key:.60}. {AGAIN}')
        begin, held, wanted = self.places[key]
        if held != nbytes:
            what = f'claims {nbytes} bytes for the storage {key:.60}, of which the file has {held}'
            raise CheckpointError(f'{what}. {AGAIN}')
        data = torch.empty(nbytes, dtype=torch.uint8, device='cpu')
        memory, done = memoryview(data.numpy()), 0
        while done < nbytes:
            count = os.preadv(self.file.fileno(), [memory[done:]], begin + done)
            if not count:
                raise CheckpointError(f'is cut off: it ends in the storage {key:.60}. {AGAIN}')
            done += count
        if wanted is not None:
            self.crcs[key] = wanted, self.pool.submit(zlib.crc32, memory)
        if _STORAGES[kind] == torch.bool:
            _check_booleans(data.view(torch.bool), f'the storage {key}')
        try:
            stored = self.restore(data.untyped_storage(), location)
        except (RuntimeError, AssertionError):
            raise CheckpointError(
                f'was saved from the device {show(location)}, which is not there: read it '
                "with map_location='cpu'"
            ) from None
        need(stored.device.type != 'meta', 'tensors without numbers (of the device meta)')
        self.known[key] = stored, _STORAGES[kind], nbytes
        return self.known[key]


# --- What the names in a file stand for -----------------------------------------------------------


class _Name(str):
    """A name that is an argument, such as a class."""


class _Values(pickle.Unpickler):
    """Reads what the child has written, whose only name is :meth:`make`."""

    storages: Any = None
    left: float = math.inf

    def find_class(self, module: str, name: str) -> Any:
        return {'make': self.make}[name]

    def make(self, label: str, args: Any = None, state: Any = None, items: Any = ()) -> Any:
        """The value of a form."""
        if args is None:
            return _DTYPES.get(label) or _TYPES.get(label) or _Name(label)
        self.spend(500)
        for value in args:  # what is made may be a copy
            self.spend(len(value) if type(value) in (str, bytes, bytearray) else 0)
            self.spend(100 * len(value) if isinstance(value, list | tuple | dict) else 0)
        if label == 'storage':
            return self.storages(*args)
        if label in _FILLED:
            return _FILLED[label](self, args, state, items)
        if label not in _CALLED:
            return _member(label, *args)
        need(state is None and not items, f'a {label:.80} with a state')
        value = _CALLED[label](*args)
        if isinstance(value, Tensor):  # an expanded one is more than it is made of
            self.spend(max(0, value.nbytes - value.untyped_storage().nbytes()))
        return value

    def spend(self, nbytes: float) -> None:
        """Counts what is made beyond the file's own size."""
        self.left -= nbytes
        if self.left < 0:
            raise CheckpointError(TOO_LARGE)


def _check_name(label: str) -> None:
    if label in _NO_WEIGHTS:
        what = f'holds {_NO_WEIGHTS[label]} ({label})'
        raise CheckpointError(f'{what}: no detector has such. {WAY_OUT}')
    if not any(label in t for t in (_CALLED, _FILLED, _DTYPES, _TYPES, _STORAGES, _ARGUMENTS)):
        _enumeration(label)


def _enumeration(label: str) -> Any:
    """An enumeration that this process has already; nothing is imported for it."""
    parts = label.split('.')
    for i in range(1, len(parts)):
        found: Any = sys.modules.get('.'.join(parts[:i]))
        for part in parts[i:]:
            found = getattr(found, '__dict__', {}).get(part)
        if isinstance(found, type) and issubclass(found, enum.Enum):
            return found
    raise CheckpointError(
        f'names {label:.200}, which is neither a tensor nor a plain container: '
        f'reading it could run code, so it is refused. {WAY_OUT}'
    )


def _member(label: str, value: Any = None, *_: Any) -> Any:
    members = (member for member in _enumeration(label) if member.value == value)
    return next(members, value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False,
            hooks: Any = None, metadata: Any = None, dtype: Any = None) -> Tensor:  # fmt: skip
    """A tensor that lies within its storage."""
    known = type(storage) is tuple and isinstance(storage[0], torch.UntypedStorage)
    own: Any = dtype or storage[1] if known else None
    need(isinstance(own, torch.dtype), 'a tensor without a storage, or without a type')
    need(own != torch.bool or storage[1] == own, f'a tensor of type {own} in other memory')
    for sizes in (shape, stride):
        plain = isinstance(sizes, tuple) and all(type(n) is int and 0 <= n < 2**40 for n in sizes)
        need(plain and len(sizes) <= 64, f'a tensor of the shape or stride {show(sizes)}')
    where = f'a tensor of shape {show(shape)}, stride {show(stride)} and offset {show(offset)}'
    need(len(shape) == len(stride) and type(offset) is int and 0 <= offset < 2**40, where)
    plain = metadata is None or type(metadata) is dict and {*metadata} <= {'conj', 'neg'}
    need(plain and not hooks and type(requires_grad) is bool, 'a tensor with hooks or attributes')
    numel, held = math.prod(shape), storage[2] // own.itemsize
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    need(not numel or reach <= held, f'{where}, which lies beyond its storage of {held} elements')
    tensor = torch.empty(0, dtype=own, device=storage[0].device)
    tensor.set_(storage[0], offset, tuple(shape), tuple(stride))
    if metadata:
        torch._utils.set_tensor_metadata(tensor, metadata)
    return tensor.requires_grad_() if requires_grad else tensor


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any,
               dtype: Any, metadata: Any = None) -> Tensor:  # fmt: skip
    need(isinstance(dtype, torch.dtype), f'a tensor of type {show(dtype)}')
    return _tensor(storage, offset, shape, stride, requires_grad, hooks, metadata, dtype)


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None) -> nn.Parameter:
    need(isinstance(data, Tensor) and not hooks, 'a parameter that is not made of a tensor')
    return nn.Parameter(data, requires_grad)


def _numpy_dtype(values: _Values, args: Any, state: Any, items: Any) -> np.dtype:
    """A dtype by its code: a crafted state of numpy's own can crash the process."""
    known = type(args[0]) is str and re.fullmatch(r'[biufcmMSUO]\d{0,9}', args[0])
    need(known, f'numpy data of type {show(args[0])}, which is not plain')
    # (version, byte order, subarray, names, fields, item size, alignment, flags, unit of time)
    state = (3, '=', None, None, None) if state is None else state
    plain = isinstance(state, tuple) and state[2:5] == (None, None, None)
    need(plain and state[1] in ('<', '>', '|', '='), 'a numpy dtype that is not plain')
    unit = f'[{state[8][-1][1]:d}{state[8][-1][0].decode()}]' if state[8:] else ''
    unit = '' if 'generic' in unit else unit
    return np.dtype(state[1] + args[0] + unit)


def _array(values: _Values, args: Any, state: Any, items: Any) -> np.ndarray:
    _, shape, dtype, fortran, raw = state
    raw = raw.encode('latin1') if type(raw) is str else raw  # of Python 2
    need(isinstance(dtype, np.dtype), 'a numpy array that is not made of numbers')
    need(type(raw) is (list if dtype.hasobject else bytes), 'a numpy array of another kind')
    values.spend(2 * len(raw))
    if math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize) != len(raw):
        what = f'a numpy array of {len(raw)} bytes that claims the shape {show(shape)}'
        raise CheckpointError(f'holds {what}')
    if dtype.hasobject:
        array = np.empty(len(raw), dtype)
        for i, value in enumerate(raw):
            array[i] = value
        return array.reshape(shape, order='F' if fortran else 'C')
    return np.ndarray(shape, dtype, bytearray(raw), order='F' if fortran else 'C')


def _frombuffer(values: _Values, args: Any, state: Any, items: Any) -> np.ndarray:
    raw, dtype, shape, order = args
    return _array(values, (), (1, shape, dtype, order == 'F', bytes(raw)), ())


def _scalar(values: _Values, args: Any, state: Any, items: Any) -> Any:
    dtype, raw = args
    raw = raw.encode('latin1') if type(raw) is str else raw  # of Python 2
    plain = isinstance(dtype, np.dtype) and type(raw) is bytes and len(raw) == dtype.itemsize
    need(plain and not dtype.hasobject, 'a numpy scalar that is not a number')
    return _array(values, (), (1, (), dtype, False, raw), ())[()]


def _history(values: _Values, args: Any, state: Any, items: Any) -> HistoryBuffer:
    """MMEngine's own ``__setstate__`` writes the file's methods to the class."""
    methods = state.get('statistics_methods', {}).values()
    own = all(type(method) is _Method for method in methods)
    need(own, 'a HistoryBuffer with statistics_methods other than its own four')
    logs, counts = (state.get(key) for key in ('_log_history', '_count_history'))
    plain = isinstance(logs, np.ndarray) and isinstance(counts, np.ndarray)
    need(plain, 'a HistoryBuffer whose histories are not numpy arrays')
    values.spend(logs.nbytes + counts.nbytes)
    return history_buffer(logs, counts, state.get('max_length'))


def history_buffer(logs: np.ndarray, counts: np.ndarray, max_length: Any) -> HistoryBuffer:
    """A HistoryBuffer of these numbers, if it can be one."""
    plain = logs.ndim == 1 and logs.shape == counts.shape and type(max_length) is int
    what = f'a HistoryBuffer with logs of shape {logs.shape}, counts of shape {counts.shape}'
    need(plain and len(logs) <= max_length, f'{what} and max_length {show(max_length)}')
    return HistoryBuffer(logs, counts, max_length)


class _Method(str):
    """One of a HistoryBuffer's methods, by its name."""


def _getattr(owner: Any, name: Any) -> _Method:
    own = type(owner) is _Name and owner.endswith('.HistoryBuffer')
    if not own or name not in ('min', 'max', 'current', 'mean'):
        raise CheckpointError(f'calls builtins.getattr({show(owner)}, {show(name)})')
    return _Method(name)


def _encode(text: Any, encoding: Any = 'latin1') -> bytes:
    if not isinstance(text, str) or encoding not in ('latin1', 'latin-1'):
        raise CheckpointError(f'calls codecs.encode(..., {show(encoding)})')
    return text.encode('latin1')


def _bytearray(data: Any = b'', encoding: Any = 'latin1') -> bytearray:
    return bytearray(data if type(data) is bytes else _encode(data, encoding))


def keys_of(keys: Any) -> Any:
    """Keys that can be hashed, before they are: texts, numbers and pairs of such."""
    for key in keys:
        parts = key if type(key) is tuple and len(key) <= 16 else (key,)
        need(
            not any(isinstance(p, tuple | list | dict) for p in parts), 'a key that is a container'
        )
    few = len(keys) > 500 and 2 * len({hash(key) for key in keys}) < len(keys)
    need(not few, 'a dict or set whose keys have one hash, which would take for ever')
    return keys


def _filled(kind: Any) -> Any:
    """Makes a dict of a kind: its arguments, then its items, then its attributes."""

    def fill(values: _Values, args: Any, state: Any, items: Any) -> Any:
        base = args[-1] if args and isinstance(args[-1], dict | list | tuple) else {}
        factory = args[0] if kind is defaultdict and args else None
        pairs = [*(base.items() if isinstance(base, dict) else map(tuple, base)), *items]
        keys_of([key for key, _ in pairs])
        need(factory is None or factory in _TYPES.values(), f'a factory that is {show(factory)}')
        result = defaultdict(factory, pairs) if kind is defaultdict else kind(dict(pairs))
        attributes = state if isinstance(state, dict) and kind is not defaultdict else {}
        if kind is OrderedDict:
            shadows = any(hasattr(result, str(key)) for key in attributes)
            need(not shadows, 'an OrderedDict whose attributes are not its own')
            vars(result).update(attributes)
        elif kind is dict:  # whose items may be its attributes too
            for key in attributes:
                if not str(key).startswith('_'):
                    result.setdefault(key, attributes[key])
        return result

    return fill


def _deque(values: _Values, args: Any, state: Any, items: Any) -> deque:
    return deque([*(args[0] if args else ()), *items], *args[1:])


def _namespace(values: _Values, args: Any, state: Any, items: Any) -> argparse.Namespace:
    plain = all(type(key) is str for key in state or {})
    need(plain and not args, 'a namespace whose attributes have no names')
    namespace = argparse.Namespace()
    vars(namespace).update(state or {})
    return namespace


def _reconstructor(values: _Values, args: Any, state: Any, items: Any) -> Any:
    """By which protocols 0 and 1 make objects: of a class, its base, and that base's value."""
    kind, base, value = args
    if base is str and _CALLED.get(kind) is str:
        return str(value)
    need(kind in _FILLED and kind in _OBJECTS, f'an object of the class {show(kind)}')
    return _FILLED[kind](values, () if base is object else (value,), state, items)


_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES: dict[str, torch.dtype | None] = {
    'torch.UntypedStorage': None, 'torch.storage.UntypedStorage': None,
    **{f'{module}.{name}': dtype for module in ('torch', 'torch.cuda')
       for dtype, name in torch.storage._dtype_to_storage_type_map().items()},
}  # fmt: skip
_TYPES = {
    f'builtins.{kind.__name__}': kind
    for kind in (bool, int, float, complex, str, bytes, list, dict, tuple, set, frozenset, object)
}
_ARGUMENTS = ('numpy.ndarray', 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler')
_NO_WEIGHTS = {
    'torch._utils._rebuild_sparse_tensor': 'a sparse tensor',
    'torch._utils._rebuild_qtensor': 'a quantized tensor',
    'torch._utils._rebuild_nested_tensor': 'a nested tensor',
    'torch._utils._rebuild_meta_tensor_no_storage': 'a meta tensor, which has no numbers',
    'torch._utils._rebuild_wrapper_subclass': 'a tensor of a subclass',
    'torch._tensor._rebuild_from_type_v2': 'a tensor of a subclass or with attributes',
    'torch._utils._rebuild_parameter_with_state': 'a parameter with attributes',
    'torch._utils._rebuild_device_tensor_from_numpy': "another device's tensor",
    'torch._utils._rebuild_device_tensor_from_cpu_tensor': "another device's tensor",
}
_CALLED: dict[str, Any] = {
    '_codecs.encode': _encode,
    'builtins.bytearray': _bytearray,
    'builtins.bytes': lambda: b'',
    'builtins.complex': lambda real, imag: complex(float(real), float(imag)),
    'builtins.frozenset': lambda keys=(): frozenset(keys_of(keys)),
    'builtins.getattr': _getattr,
    'builtins.range': range,
    'builtins.set': lambda keys=(): set(keys_of(keys)),
    'builtins.slice': slice,
    **{f'datetime.{name}': getattr(datetime, name)
       for name in ('date', 'datetime', 'time', 'timedelta', 'timezone')},
    **{f'pathlib{local}.{pure}{system}Path': getattr(pathlib, f'Pure{system}Path')
       for local in ('', '._local') for pure in ('', 'Pure') for system in ('Posix', 'Windows')},
    'torch.Size': torch.Size,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch.device': torch.device,
    'torch.serialization._get_layout': torch.serialization._get_layout,
    'torch.torch_version.TorchVersion': str,
}  # fmt: skip
_OBJECTS: dict[str, Any] = {
    'argparse.Namespace': _namespace,
    'mmengine.logging.history_buffer.HistoryBuffer': _history,
    'types.SimpleNamespace': _namespace,
    **dict.fromkeys((
        *('addict.addict.Dict', 'easydict.EasyDict', 'munch.Munch', 'munch.munch.Munch'),
        *('mmengine.config.config.ConfigDict', 'mmcv.utils.config.ConfigDict', 'box.box.Box'),
        *('yacs.config.CfgNode', 'fvcore.common.config.CfgNode', 'attrdict.AttrDict'),
        *('detectron2.config.config.CfgNode', 'lightning.fabric.utilities.data.AttributeDict'),
        'lightning_fabric.utilities.data.AttributeDict',
        'pytorch_lightning.utilities.parsing.AttributeDict',
    ), _filled(dict)),
}  # fmt: skip
_FILLED: dict[str, Any] = {
    **_OBJECTS,
    'collections.Counter': _filled(Counter),
    'collections.OrderedDict': _filled(OrderedDict),
    'collections.defaultdict': _filled(defaultdict),
    'collections.deque': _deque,
    'copyreg._reconstructor': _reconstructor,
    'numpy.dtype': _numpy_dtype,
    **{f'numpy.{core}.multiarray._reconstruct': _array for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
    **{f'numpy.{core}.numeric._frombuffer': _frombuffer for core in ('core', '_core')},
}
