"""Reads the files that ``torch.save`` and safetensors write, as data: nothing in them is run.

A pickle is a program for a small machine. This is that machine without its dangers: it knows the
instructions that ``torch.save`` writes, answers the names in a file from a closed list of inert
stand-ins, and pays for what it builds out of a budget that the file's size sets. What holds the
tensors (a zip archive, the older format of several pickles, or safetensors) is checked before
memory is taken: sizes, overlaps, CRCs, views beyond their storage.
"""

from __future__ import annotations

import _compat_pickle
import codecs
import io
import json
import math
import struct
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

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
AGAIN = 'Download or copy it again'

BUDGET = 2**27
"""Bytes that a file's objects may take beyond the pickle's size and a quarter of the file's.

With the tensors' that makes 1.25 times the file, and this.
"""
_STEP, _CONTAINER, _CALL = 80, 256, 1024  # what one instruction can take, at most
MAX_DEPTH = 100
"""Containers in containers; a training checkpoint has some ten."""
MAX_VALUES = 10_000_000
"""Values in a file whose shared containers are counted wherever they appear."""
MAX_KEYS, MAX_PAIRS = 2**15, 2**12
"""Keys that are not text, and those of several numbers, whose hashes can be chosen to be one."""
_CHUNK, _LONG = 2**22, 2**16


def show(value: Any) -> str:
    """A value in a message: short, on one line, and not written out where it holds others."""
    if type(value) in (tuple, list) and len(value) <= 8:
        items = ', '.join(show(each) if type(each) in _SHOWN else _kind(each) for each in value)
        comma = ',' if len(value) == 1 else ''
        return f'({items}{comma})' if type(value) is tuple else f'[{items}]'
    if isinstance(value, str):  # a stand-in too
        value = str.__str__(value)
    if type(value) not in _SHOWN:
        return _kind(value)
    if type(value) is int and abs(value) >= 2**64:
        return f'an integer of {value.bit_length()} bits'
    return ascii(value[:60]) + '...' if type(value) in (str, bytes) and value[60:] else ascii(value)


_SHOWN = (type(None), bool, int, float, str, bytes)


def _kind(value: Any) -> str:
    return f'<{type(value).__name__}>'


def readable(said: str) -> str:
    """A message without what a terminal would take for an instruction, and not endless."""
    said = said if len(said) <= 1500 else f'{said[:1500]}...'
    return ''.join(
        letter if letter.isprintable() else letter.encode('unicode_escape').decode()
        for letter in said
    )


class CheckpointError(ValueError):
    """A checkpoint is refused, damaged or not to be had: the message says which, and what to do."""


class _Budget:
    def __init__(self, size: int, pickled: int) -> None:
        self.left = BUDGET + size // 4 + pickled

    def spend(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise CheckpointError(
                'would take far more memory than a checkpoint of its size does, so it is refused'
            )


# --- Inert stand-ins for the names in a file ------------------------------------------------------


class _StatisticsMethod(str):
    """Stands in for ``getattr(HistoryBuffer, name)``, one of the four methods it is saved with."""


class _Annealing(str):
    """Stands in for ``getattr(OneCycleParamScheduler, name)``; the scheduler has its own."""


class _OneCycle:
    """Stands in for the class that MMEngine's OneCycleLR names in its state."""


class _LongText:
    """A text of letters up to U+00FF, kept as latin1: most are an array's bytes and stay such."""

    def __init__(self, raw: bytes, budget: _Budget) -> None:
        self.raw, self.budget = raw, budget

    def real(self) -> str:
        self.budget.spend(len(self.raw))
        return self.raw.decode('latin1')


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
        for value in state.values():
            if type(value) is _Array:
                if value.owned:
                    raise CheckpointError('holds two HistoryBuffers of one array')
                value.owned = True
        self.state = state

    def real(self) -> HistoryBuffer:
        state = getattr(self, 'state', {})
        logs, counts = (state.get(key) for key in ('_log_history', '_count_history'))
        if type(logs) is not _Array or type(counts) is not _Array:
            raise CheckpointError('holds a HistoryBuffer whose histories are not numpy arrays')
        # It copies them.
        return history_buffer(logs.view(), counts.view(), state.get('max_length'))


class _Dtype:
    """Stands in for ``numpy.dtype``; a crafted real one can crash the process."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        try:
            dtype = np.dtype(code) if type(code) is str and len(code) < 4 else None
        except TypeError:
            dtype = None
        if dtype is None or dtype not in NUMPY_DTYPES:
            raise CheckpointError(f'holds numpy data of type {show(code)}, which is not numeric')
        self.dtype: np.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags)
        if type(state) is not tuple or len(state) != 8 or state[2:5] != (None, None, None):
            raise CheckpointError('holds a numpy dtype that is not a plain number')
        if type(state[1]) is not str or state[1] not in ('<', '>', '|', '='):
            raise CheckpointError(f'holds a numpy dtype of byte order {show(state[1])}')
        order: Any = state[1]
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for ``numpy.ndarray``; one in a HistoryBuffer is nowhere else."""

    owned = False

    def __setstate__(self, state: Any) -> None:
        # (version, shape, dtype, is Fortran order, bytes)
        if type(state) is not tuple or len(state) != 5:
            raise CheckpointError('holds a numpy array of an unknown form')
        self.state = state

    def real(self) -> np.ndarray:
        if self.owned:
            raise CheckpointError('holds an array of a HistoryBuffer outside of it')
        return self.view().copy()

    def view(self) -> np.ndarray:
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
                f'holds a numpy array of {len(raw)} bytes that claims the shape {show(shape)}'
            )
        return np.frombuffer(raw, dtype.dtype).reshape(shape, order='F' if fortran else 'C')


def _getattr(owner: Any, name: Any) -> _StatisticsMethod | _Annealing:
    """Stands in for ``getattr``, by which two of MMEngine's classes name methods of their own."""
    if owner is _OneCycle and name in ('_annealing_cos', '_annealing_linear'):
        return _Annealing(name)
    if owner is not _HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        owner = 'HistoryBuffer' if owner is _HistoryBuffer else show(owner)
        raise CheckpointError(f'calls builtins.getattr({owner}, {show(name)})')
    return _StatisticsMethod(name)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Stands in for numpy's function that makes the empty array which the state then fills."""
    if kind is not _Array:
        raise CheckpointError(f'holds a numpy array of the class {show(kind)}')
    return _Array()


def _scalar(dtype: Any, raw: Any) -> np.generic:
    """Stands in for numpy's function that makes a scalar from bytes."""
    if type(dtype) is not _Dtype or type(raw) is not bytes or len(raw) != dtype.dtype.itemsize:
        raise CheckpointError('holds a numpy scalar that is not a number')
    return np.frombuffer(raw, dtype.dtype)[0]


def _bytes() -> bytes:
    """Stands in for ``bytes``, by which pickle writes empty ones: those of an empty array."""
    return b''


def _encode(text: Any, encoding: Any = 'latin1') -> bytes:
    """Stands in for ``codecs.encode``, by which pickle writes bytes."""
    if type(text) not in (str, _LongText) or encoding not in ('latin1', 'latin-1'):
        raise CheckpointError(f'calls codecs.encode(..., {show(encoding)})')
    return text.raw if type(text) is _LongText else text.encode('latin1')


def _bytearray(data: Any = b'', encoding: Any = 'latin1') -> bytearray:
    return bytearray(data if type(data) is bytes else _encode(data, encoding))


def _complex(real: Any, imag: Any) -> complex:
    if type(real) is not float or type(imag) is not float:
        raise CheckpointError('holds a complex number that is not made of two floats')
    return complex(real, imag)


def _ordered_dict(items: Any = ()) -> OrderedDict:
    pairs = list(items) if type(items) in (list, tuple) else None
    if pairs is None or not all(type(p) in (list, tuple) and len(p) == 2 for p in pairs):
        raise CheckpointError('holds an OrderedDict that is not made of pairs')
    if not all(type(key) is str for key, _ in pairs):
        raise CheckpointError('holds an OrderedDict of keys that are not text')
    return OrderedDict(pairs)


def _config_dict(items: Any = None) -> dict:
    """Stands in for MMEngine's ConfigDict, in a data set's metainfo: the dict it is made of."""
    if type(items) is not dict:
        raise CheckpointError('holds a ConfigDict that is not made of a dict')
    return items


def _counter(items: Any = None) -> Counter:
    if type(items) is not dict and items is not None:
        raise CheckpointError('holds a Counter that is not made of a dict')
    return Counter(items)


def _set(items: Any = ()) -> set:
    if type(items) not in (list, tuple):
        raise CheckpointError('holds a set that is not made of a list')
    return set(items)


def _size(sizes: Any = ()) -> torch.Size:
    return torch.Size(_sizes(sizes))


def _layout(name: Any) -> torch.layout:
    if name not in ('torch.strided', 'torch.sparse_coo'):
        raise CheckpointError(f'holds the memory layout {show(name)}')
    return getattr(torch, name.removeprefix('torch.'))


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise CheckpointError(f'holds the device {show(kind)}')
    return torch.device(kind) if index is None else torch.device(kind, index)


class _Storage:
    """A file's piece of memory; ``data`` is None where the file is only looked through."""

    def __init__(self, dtype: torch.dtype | None, nbytes: int, data: Any, budget: _Budget) -> None:
        self.dtype, self.nbytes, self.data, self.budget = dtype, nbytes, data, budget


def _sizes(sizes: Any) -> tuple[int, ...]:
    known = type(sizes) in (tuple, torch.Size) and len(sizes) <= 64
    if not known or not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
        raise CheckpointError(f'holds a tensor of the shape or stride {show(sizes)}')
    return tuple(sizes)


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Stands in for torch's functions that make a tensor: one that lies within its storage."""
    shape, stride = _sizes(shape), _sizes(stride)
    dtype = dtype or getattr(storage, 'dtype', None)
    if type(storage) is not _Storage or dtype is None:
        raise CheckpointError('holds a tensor without a storage, or without a type')
    if len(shape) != len(stride) or type(offset) is not int or offset < 0:
        raise CheckpointError(
            f'holds a tensor of shape {show(shape)}, stride {show(stride)}, offset {show(offset)}'
        )
    if hooks or metadata or type(requires_grad) is not bool:
        raise CheckpointError('holds a tensor with hooks or other state of its own')
    numel, held = math.prod(shape), storage.nbytes // dtype.itemsize
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    offset = offset if numel else 0  # that of an empty slice may lie anywhere
    if numel and offset + reach > held:
        raise CheckpointError(
            f'holds a tensor of shape {show(shape)}, stride {show(stride)} and offset '
            f'{show(offset)}, which lies beyond its storage of {held} elements'
        )
    # An expanded tensor is larger than what it is made of.
    storage.budget.spend(max(0, numel - held) * dtype.itemsize)
    if storage.data is None:
        return torch.empty(0)
    tensor = torch.empty((0,), dtype=dtype, device=storage.data.device)
    tensor.set_(storage.data, offset, shape, stride)
    return tensor.requires_grad_() if requires_grad else tensor


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    # It is for types without a storage of their own; a storage of booleans is checked as such.
    if type(dtype) is not torch.dtype or dtype not in _DTYPES.values() or dtype is torch.bool:
        raise CheckpointError(f'holds a tensor of type {show(dtype)}')
    return _tensor(storage, offset, shape, stride, requires_grad, hooks, metadata, dtype)


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None) -> nn.Parameter:
    if not isinstance(data, Tensor) or type(requires_grad) is not bool or hooks:
        raise CheckpointError('holds a parameter that is not made of a tensor')
    return nn.Parameter(data, requires_grad)


_DTYPES = {
    f'torch.{name}': getattr(torch, name)
    for name in (
        *('float64', 'float32', 'float16', 'bfloat16', 'complex64', 'complex128', 'bool'),
        *('int64', 'int32', 'int16', 'int8', 'uint8', 'uint16', 'uint32', 'uint64'),
        *('float8_e4m3fn', 'float8_e5m2'),
    )
    if hasattr(torch, name)
}


class _StorageType:
    """Stands in for ``torch.FloatStorage`` and the like."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


_STORAGES = {
    f'{module}.{name}Storage': _StorageType(dtype)
    for name, dtype in dict(
        Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16,
        Long=torch.int64, Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8,
        Bool=torch.bool, ComplexDouble=torch.complex128, ComplexFloat=torch.complex64, Untyped=None,
    ).items()
    for module in ('torch', 'torch.cuda', 'torch.storage')
}  # fmt: skip

_CALLABLE: dict[str, Any] = {
    '_codecs.encode': _encode,
    'builtins.bytearray': _bytearray,
    'builtins.bytes': _bytes,
    'builtins.complex': _complex,
    'builtins.getattr': _getattr,
    'builtins.set': _set,
    'collections.Counter': _counter,
    'collections.OrderedDict': _ordered_dict,
    'mmengine.config.config.ConfigDict': _config_dict,
    'mmengine.logging.history_buffer.HistoryBuffer': _HistoryBuffer,
    'numpy.core.multiarray._reconstruct': _reconstruct,
    'numpy._core.multiarray._reconstruct': _reconstruct,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
    'numpy.dtype': _Dtype,
    'torch.Size': _size,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch.device': _device,
    'torch.serialization._get_layout': _layout,
}
_NAMES = {
    **_CALLABLE,
    **_STORAGES,
    **_DTYPES,
    'numpy.ndarray': _Array,
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': _OneCycle,
}
_CALLABLE_IDS = {id(function) for function in _CALLABLE.values()}
_PIECES = (_Dtype, _Storage, _StorageType, _StatisticsMethod, _Annealing)
_PIECE_IDS = {id(value) for value in _NAMES.values()} - {id(value) for value in _DTYPES.values()}

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


def _named(module: str, name: str) -> Any:
    # Pickles of this protocol name things as Python 2 did.
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    full = f'{module}.{name}'
    if full in _NAMES:
        return _NAMES[full]
    if full in _NO_WEIGHTS:
        raise CheckpointError(
            f'holds {_NO_WEIGHTS[full]} ({full}): no detector has such. {WAY_OUT}'
        )
    raise CheckpointError(
        f'names {full:.200}, which is neither a tensor nor a plain container: '
        f'reading it could run code, so it is refused. {WAY_OUT}'
    )


# --- The machine ----------------------------------------------------------------------------------

_KEYS = (str, int, float, bool, type(None), bytes, complex, torch.dtype, torch.device)


class Keys:
    """The keys of one file's dicts and sets: the hash of a tuple of tuples could take for ever."""

    def __init__(self) -> None:
        self.numbers = self.pairs = 0

    def check(self, keys: Iterable[Any]) -> None:
        """Before they become some."""
        for key in keys:
            if type(key) is str:
                continue
            parts = key if type(key) is tuple and len(key) <= 16 else (key,)
            if not all(type(part) in _KEYS for part in parts):
                raise CheckpointError(f'holds a dict with a key that is a {type(key).__name__}')
            if any(type(part) is int and abs(part) >= 2**60 for part in parts):
                raise CheckpointError('holds a dict with a key that is a huge number')
            self.numbers += 1
            self.pairs += type(key) in (tuple, complex)
            if self.numbers > MAX_KEYS or self.pairs > MAX_PAIRS:
                raise CheckpointError(
                    f'holds more than {MAX_KEYS} keys that are not text, or more than {MAX_PAIRS} '
                    'that are several numbers'
                )


_HASHED = (list, tuple, dict)


def _cut_off() -> CheckpointError:
    return CheckpointError(f'cannot be read as tensors: it is cut off or damaged. {AGAIN}')


class _Machine:
    """Runs one pickle.

    Args:
        file: at the pickle's beginning.
        size: bytes in the file, so that nobody claims more.
        budget: what the objects may take.
        storage: gives the storage for a persistent id (type, key, location, elements, ...).
    """

    def __init__(self, file: BinaryIO, size: int, budget: _Budget, storage: Callable) -> None:
        self.file, self.size, self.budget, self.storage = file, size, budget, storage
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: list = []
        self.keys = Keys()

    def run(self) -> Any:
        read, spend = self.file.read, self.budget.spend
        while (code := read(1)) != b'.':
            spend(_STEP)
            if code not in _INSTRUCTIONS:
                raise (
                    _cut_off()
                    if not code
                    else CheckpointError(
                        f'cannot be read as tensors: {code!r} at byte {self.file.tell() - 1} is no '
                        'pickle instruction that torch.save writes'
                    )
                )
            _INSTRUCTIONS[code](self)
        if len(self.stack) != 1 or self.marks:
            raise _cut_off()
        return self.stack.pop()

    def read(self, count: int) -> bytes:
        data = self.file.read(count) if 0 <= count <= self.size else b''
        if len(data) != count:
            raise _cut_off()
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def text(self, count: int) -> None:
        if count > _LONG and (raw := self.latin1(count)) is not None:
            self.stack.append(_LongText(raw, self.budget))
            return
        self.budget.spend(4 * count)  # one wide letter makes all of them wide
        self.stack.append(self.read(count).decode('utf-8', 'surrogatepass'))

    def latin1(self, count: int) -> bytes | None:
        """A text in latin1, in parts, so that only one form of it is there; None: it is not."""
        self.budget.spend(count)
        start, result = self.file.tell(), io.BytesIO()
        decoder = codecs.getincrementaldecoder('utf-8')('surrogatepass')
        for left in range(count, 0, -_CHUNK):
            part = decoder.decode(self.read(min(left, _CHUNK)), final=left <= _CHUNK)
            try:
                result.write(part.encode('latin1'))
            except UnicodeEncodeError:
                self.file.seek(start)
                return None
        return result.getvalue()

    def line(self) -> str:
        line = self.file.readline(512)
        if not line.endswith(b'\n'):
            raise _cut_off()
        return line[:-1].decode()

    def name(self) -> None:
        module = self.line()
        self.stack.append(_named(module, self.line()))

    def container(self, value: Any) -> None:
        self.budget.spend(_CONTAINER)
        self.stack.append(value)

    def mark(self) -> None:
        self.budget.spend(_CONTAINER)
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise _cut_off()
        del self.stack[-count:]
        self.container(items)

    def put(self, index: int) -> None:
        if index > len(self.memo) + 1:  # pickles count from 0, those of Python 2 from 1
            raise CheckpointError('cannot be read as tensors: its memo skips numbers')
        self.memo += [None] * (index + 1 - len(self.memo))
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def append(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise CheckpointError('cannot be read as tensors: it appends to what is no list')
        self.stack[-1].extend(items)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter) or len(items) % 2:
            raise CheckpointError('cannot be read as tensors: it fills what is no dict')
        self.keys.check(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(value) is not _Annealing or key != 'anneal_func':
                target[key] = value

    def charge(self, values: Any) -> None:
        """What is made of other values may be a copy of them."""
        for value in values:
            if type(value) in (str, bytes):
                self.budget.spend(len(value))
            elif type(value) in (list, tuple, dict):
                self.budget.spend(100 * len(value))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if id(function) not in _CALLABLE_IDS or type(arguments) is not tuple:
            raise CheckpointError(
                f'cannot be read as tensors: it calls a {type(function).__name__}'
            )
        self.budget.spend(_CALL)
        self.charge(arguments)
        if function in (_set, _counter):  # they hash anew
            self.keys.check(arguments[0] if arguments and type(arguments[0]) in _HASHED else ())
        self.stack.append(function(*arguments))

    def new(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not _HistoryBuffer or arguments != ():
            raise CheckpointError('cannot be read as tensors: it makes an object of its own')
        self.container(_HistoryBuffer())

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self.budget.spend(_CALL)
        if type(target) is OrderedDict:
            if type(state) is not dict or any(hasattr(target, str(key)) for key in state):
                raise CheckpointError('holds an OrderedDict whose attributes are not its own')
            self.charge([state])
            vars(target).update(state)
        elif type(target) in (_HistoryBuffer, _Dtype, _Array):
            target.__setstate__(state)
            self.charge(state.values() if type(state) is dict else state)
        else:
            raise CheckpointError(
                f'cannot be read as tensors: it sets the state of a {type(target).__name__}'
            )

    def persistent(self) -> None:
        pid = self.stack.pop()
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != 'storage':
            raise CheckpointError('cannot be read as tensors: it refers to what is no storage')
        _, kind, key, location, numel = pid[:5]
        if (
            type(kind) is not _StorageType
            or type(key) is not str
            or type(location) is not str
            or type(numel) is not int
            or not 0 <= numel <= self.size
        ):
            raise CheckpointError(
                f'claims a storage of {show(numel)} elements in a file of {self.size} bytes'
            )
        if pid[5:] not in ((), (None,)):
            raise CheckpointError(f'holds a view of a storage, as old PyTorch wrote. {WAY_OUT}')
        nbytes = numel * (kind.dtype.itemsize if kind.dtype else 1)
        data = self.storage(key, location, nbytes, kind.dtype)
        self.budget.spend(_CALL)
        self.stack.append(_Storage(kind.dtype, nbytes, data, self.budget))


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b'\x80': lambda m: m.read(1),
    b'N': lambda m: m.stack.append(None),
    b'\x88': lambda m: m.stack.append(True),
    b'\x89': lambda m: m.stack.append(False),
    b'J': lambda m: m.stack.append(m.number('<i')),
    b'K': lambda m: m.stack.append(m.number('B')),
    b'M': lambda m: m.stack.append(m.number('<H')),
    b'\x8a': lambda m: m.stack.append(int.from_bytes(m.read(m.number('B')), 'little', signed=True)),
    b'G': lambda m: m.stack.append(m.number('>d')),
    b'X': lambda m: m.text(m.number('<I')),
    b'U': lambda m: m.text(m.number('B')),
    b']': lambda m: m.container([]),
    b'}': lambda m: m.container({}),
    b')': lambda m: m.stack.append(()),
    b'(': lambda m: m.mark(),
    b't': lambda m: m.container(tuple(m.since_mark())),
    b'\x85': lambda m: m.tuple_of(1),
    b'\x86': lambda m: m.tuple_of(2),
    b'\x87': lambda m: m.tuple_of(3),
    b'a': lambda m: m.append([m.stack.pop()]),
    b'e': lambda m: m.append(m.since_mark()),
    b's': lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    b'u': lambda m: m.set_items(m.since_mark()),
    b'q': lambda m: m.put(m.number('B')),
    b'r': lambda m: m.put(m.number('<I')),
    b'h': lambda m: m.get(m.number('B')),
    b'j': lambda m: m.get(m.number('<I')),
    b'c': lambda m: m.name(),
    b'R': lambda m: m.call(),
    b'\x81': lambda m: m.new(),
    b'b': lambda m: m.build(),
    b'Q': lambda m: m.persistent(),
}


def _check_form(obj: Any, counts: dict[int, int | None], depth: int = 0) -> int:
    """How many values an object holds where each shared container counts as often as it appears.

    Raises:
        CheckpointError: too many, too deep, a container in itself, a piece of something else.
    """
    if id(obj) in _PIECE_IDS or isinstance(obj, _PIECES):
        raise CheckpointError('holds a piece of a HistoryBuffer or of numpy data outside of one')
    if type(obj) not in (dict, OrderedDict, Counter, list, tuple):
        return 1
    if id(obj) in counts:
        count = counts[id(obj)]
        if count is None:
            raise CheckpointError('holds a container that contains itself')
        return count
    if depth > MAX_DEPTH:
        raise CheckpointError(f'holds containers that are nested deeper than {MAX_DEPTH}')
    counts[id(obj)] = None
    count = 1
    for value in _children(obj):
        count += _check_form(value, counts, depth + 1)
        if count > MAX_VALUES:
            raise CheckpointError(
                f'holds lists in lists that are more than {MAX_VALUES} values when written out'
            )
    counts[id(obj)] = count
    return count


def _children(obj: Any) -> Iterator[Any]:
    yield from obj.values() if isinstance(obj, dict) else obj
    if type(obj) is OrderedDict:
        yield from vars(obj).values()


def real(obj: Any) -> Any:
    """The real value behind a stand-in."""
    return obj.real() if isinstance(obj, _Array | _HistoryBuffer | _LongText) else obj


def history_buffer(logs: np.ndarray, counts: np.ndarray, max_length: Any) -> HistoryBuffer:
    """A HistoryBuffer of these numbers, if it can be one."""
    if logs.ndim != 1 or logs.shape != counts.shape or type(max_length) is not int:
        raise CheckpointError(
            f'holds a HistoryBuffer with logs of shape {logs.shape}, counts of shape '
            f'{counts.shape} and max_length {show(max_length)}'
        )
    if not len(logs) <= max_length:
        raise CheckpointError(f'holds a HistoryBuffer of {len(logs)} > max_length {max_length}')
    return HistoryBuffer(logs, counts, max_length)


# --- What holds the tensors -----------------------------------------------------------------------


class _Entry:
    """A part of a zip archive, which lies in the file as it is."""

    def __init__(self, name: str, offset: int, size: int, crc: int | None) -> None:
        self.name, self.offset, self.size, self.crc = name, offset, size, crc


def read(file: BinaryIO, size: int, map_location: Any, safetensors: bool) -> Any:
    """What a file holds; numpy data and HistoryBuffers are stand-ins still, see :func:`real`.

    Args:
        file: at its beginning.
        size: its bytes.
        map_location: as for ``torch.load``.
        safetensors: whether it is such a file; else it is told by its first bytes.

    Raises:
        CheckpointError: It is refused or damaged.
    """
    if safetensors:
        return _read_safetensors(file, size, map_location)
    zipped = file.read(2) == b'PK'
    file.seek(0)
    result = (_read_zip if zipped else _read_legacy)(file, size, map_location)
    _check_form(result, {})
    return result


def _storage_reader(file: BinaryIO, map_location: Any, find: Callable[[str], _Entry]) -> Callable:
    restore = torch.serialization._get_restore_location(map_location)
    known: dict[str, Any] = {}

    def storage(key: str, location: str, nbytes: int, dtype: torch.dtype | None) -> Any:
        entry = find(key)
        if entry.size != nbytes:
            raise CheckpointError(
                f'claims {nbytes} bytes for the storage {key}, of which the file has {entry.size}'
            )
        if key not in known:
            data = _read_bytes(file, entry, dtype).untyped_storage()
            try:
                known[key] = restore(data, location), dtype
            except (RuntimeError, AssertionError):
                raise CheckpointError(
                    f'was saved from the device {show(location)}, which is not there: read it '
                    "with map_location='cpu'"
                ) from None
            if known[key][0].device.type == 'meta':
                raise CheckpointError('holds tensors without numbers (of the device meta)')
        if known[key][1] is not dtype:
            raise CheckpointError(f'holds tensors of two types in the storage {key}')
        return known[key][0]

    return storage


def _read_bytes(file: BinaryIO, entry: _Entry, dtype: torch.dtype | None) -> Tensor:
    """An entry's bytes, (size,) of uint8, straight into the memory of their tensor."""
    data = torch.empty(entry.size, dtype=torch.uint8)
    memory = memoryview(data.numpy())
    here = file.tell()
    file.seek(entry.offset)
    crc = 0
    for start in range(0, entry.size, _CHUNK):
        part = memory[start : start + _CHUNK]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise _cut_off()
        if entry.crc is not None:
            crc = zlib.crc32(part, crc)
    file.seek(here)
    if entry.crc is not None and crc != entry.crc:
        raise CheckpointError(f'is damaged: the CRC of {entry.name} does not fit. {AGAIN}')
    if dtype is torch.bool and entry.size and int(data.max()) > 1:
        raise CheckpointError(f'is damaged: {entry.name} holds booleans that are neither 0 nor 1')
    return data


def _check_crc(file: BinaryIO, entry: _Entry) -> None:
    """Insists on the CRC of what is read bit by bit."""
    if entry.crc is None:
        return
    file.seek(entry.offset)
    crc = 0
    for left in range(entry.size, 0, -_CHUNK):
        crc = zlib.crc32(file.read(min(left, _CHUNK)), crc)
    if crc != entry.crc:
        raise CheckpointError(f'is damaged: the CRC of {entry.name} does not fit. {AGAIN}')


def _read_zip(file: BinaryIO, size: int, map_location: Any) -> Any:
    entries = _zip_entries(file, size, _Budget(size, 0))
    roots = [name.removesuffix('data.pkl') for name in entries if name.endswith('/data.pkl')]
    if len(roots) != 1 or not all(name.startswith(roots[0]) for name in entries):
        raise CheckpointError(
            'is a zip archive, but none that torch.save has written: it has not one data.pkl, in '
            f'the folder of all the rest. {WAY_OUT}'
        )
    root = roots[0]
    if f'{root}constants.pkl' in entries:
        raise CheckpointError(f'is a TorchScript archive, a program and no checkpoint. {WAY_OUT}')

    def find(key: str) -> _Entry:
        if f'{root}data/{key}' not in entries:
            raise CheckpointError(f'lacks the storage {key:.60} that it refers to')
        return entries[f'{root}data/{key}']

    order = entries.get(f'{root}byteorder')
    if order and (order.size > 6 or _read_bytes(file, order, None).numpy().tobytes() != b'little'):
        raise CheckpointError(f'was written on a big-endian machine. {WAY_OUT}')
    pickled = entries[f'{root}data.pkl']
    _check_crc(file, pickled)
    file.seek(pickled.offset)
    storage = _storage_reader(file, map_location, find)
    result = _Machine(file, size, _Budget(size, pickled.size), storage).run()
    if file.tell() > pickled.offset + pickled.size:
        raise _cut_off()
    return result


def _zip_entries(file: BinaryIO, size: int, budget: _Budget) -> dict[str, _Entry]:
    """The archive's parts: stored as they are, each its own bytes, under names of their own.

    Other readers take a zip archive by its beginning, its end, or either list of names; in one
    that passes here all of them see the same.
    """

    def at(offset: int, form: str) -> tuple:
        length = struct.calcsize(form)
        if not 0 <= offset <= size - length:
            raise damaged('an address beyond its end')
        file.seek(offset)
        return struct.unpack(form, file.read(length))

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f'is damaged or forged: a zip archive with {what}. {AGAIN}')

    end = size - 22
    mark, disk, first_disk, here, count, length, start, comment = at(end, '<4s4H2IH')
    if mark != b'PK\5\6' or comment or disk or first_disk or here != count:
        raise damaged('something behind its end, or an end that does not fit')
    if size >= 42 and at(end - 20, '<4s')[0] == b'PK\6\7':
        mark, disk, record, disks = at(end - 20, '<4sIQI')
        end = record
        mark, rest, _, _, *disks64, here64, count64, length64, start64 = at(record, '<4sQHH2I4Q')
        if (
            mark != b'PK\6\6'
            or any(disks64)
            or disk
            or disks > 1
            or record + 12 + rest != size - 42
        ):
            raise damaged('an end that does not fit')
        for short, long, limit in (
            (count, count64, 0xFFFF), (length, length64, 2**32 - 1), (start, start64, 2**32 - 1)
        ):  # fmt: skip
            if short not in (long, limit):
                raise damaged('two ends that differ')
        count, length, start = count64, length64, start64
    if start + length != end or count * 46 > length:
        raise damaged('a list of parts that does not fit')
    budget.spend(count * 600 + length)

    found, at_byte = [], start
    for _ in range(count):
        values = at(at_byte, '<4s6H3I5H2I')
        mark, _, _, flags, method, _, _, crc, packed, full, n, extra, comment = values[:13]
        offset = values[16]
        name, more = at(at_byte + 46, f'{n}s{extra}s')
        at_byte += 46 + n + extra + comment
        if mark != b'PK\1\2' or flags & 1:
            raise damaged('a part that is encrypted, or none')
        if method or packed != full:
            raise CheckpointError(
                f'is a zip archive whose part {show(name)} is compressed, which torch.save never '
                f'does: a small file could fill the memory. {WAY_OUT}'
            )
        if full == 2**32 - 1 or offset == 2**32 - 1:
            packed, full, offset = _zip64(more, packed, full, offset)
        found.append((name, offset, packed, full, crc))
    if at_byte != end:
        raise damaged('a list of parts that does not fit')

    entries: dict[str, _Entry] = {}
    checked = any(crc for *_, crc in found)  # torch can write without
    reached = 0
    for name, offset, packed, full, crc in sorted(found, key=lambda part: part[1]):
        mark, *_, n, extra = at(offset, '<4s5H3I2H')
        begin = offset + 30 + n + extra
        if mark != b'PK\3\4' or packed != full or at(offset + 30, f'{n}s')[0] != name:
            raise damaged(f'two accounts of {show(name)}')
        if offset < reached or begin + full > start:
            raise damaged(f'parts that lie on each other ({show(name)})')
        reached = begin + full
        text = name.decode()
        if text in entries:
            raise damaged(f'two parts of one name ({text:.80})')
        entries[text] = _Entry(text, begin, full, crc if checked else None)
    return entries


def _zip64(extra: bytes, packed: int, full: int, offset: int) -> tuple[int, int, int]:
    """The sizes and the offset of a part beyond 4 GiB."""
    if len(extra) > 1000:
        raise CheckpointError(f'is damaged or forged: a part beyond 4 GiB with additions. {AGAIN}')
    while len(extra) >= 4:
        kind, length = struct.unpack('<HH', extra[:4])
        if kind == 1:
            numbers = iter(struct.unpack(f'<{length // 8}Q', extra[4 : 4 + length // 8 * 8]))
            limit = 2**32 - 1
            full, packed, offset = (
                next(numbers) if value == limit else value for value in (full, packed, offset)
            )
            break
        extra = extra[4 + length :]
    return packed, full, offset


def _little_endian(system: Any) -> bool:
    return type(system) is dict and system.get('little_endian') is True


def _read_legacy(file: BinaryIO, size: int, map_location: Any) -> Any:
    """PyTorch's format before 1.6: pickles, then the storages one behind the other."""

    def pickled(storage: Callable, length: int = size) -> Any:
        return _Machine(file, size, _Budget(size, length), storage).run()

    def none(*_: Any) -> Any:
        raise CheckpointError('cannot be read as tensors: it has a storage before its beginning')

    claimed: dict[str, tuple[int, int]] = {}

    def claim(key: str, location: str, nbytes: int, dtype: torch.dtype | None) -> None:
        if claimed.setdefault(key, (nbytes, dtype.itemsize if dtype else 1))[0] != nbytes:
            raise CheckpointError(f'claims two sizes for the storage {key:.60}')

    if pickled(none) != 0x1950A86A20F9469CFC6C:
        raise CheckpointError(
            'cannot be read as tensors: it is a pickle, but none that torch.save has written. '
            f'{WAY_OUT}'
        )
    if pickled(none) != 1001:
        raise CheckpointError('cannot be read as tensors: it is of an unknown version')
    if not _little_endian(pickled(none)):
        raise CheckpointError(f'was written on a big-endian machine. {WAY_OUT}')
    start = file.tell()
    pickled(claim)  # looks only: where the storages lie is behind them
    length = file.tell() - start
    keys = pickled(none)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise CheckpointError('cannot be read as tensors: its list of storages is none')
    if sorted(keys) != sorted(claimed):
        raise CheckpointError('cannot be read as tensors: its list of storages is another one')
    entries, offset = {}, file.tell()
    for key in keys:
        nbytes, itemsize = claimed[key]
        file.seek(offset)
        head = file.read(8)
        if len(head) != 8 or offset + 8 + nbytes > size:
            raise _cut_off()
        if struct.unpack('<q', head)[0] * itemsize != nbytes:
            raise CheckpointError(f'claims two sizes for the storage {key:.60}')
        entries[key] = _Entry(f'storage {key}', offset + 8, nbytes, None)
        offset += 8 + nbytes
    if offset != size:
        raise CheckpointError(f'is damaged: {size - offset} bytes lie behind its end. {AGAIN}')
    file.seek(start)
    return pickled(_storage_reader(file, map_location, entries.__getitem__), length)


_SAFETENSORS = {
    'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64',
    'I32': 'int32', 'I16': 'int16', 'I8': 'int8', 'U8': 'uint8', 'U16': 'uint16', 'U32': 'uint32',
    'U64': 'uint64', 'BOOL': 'bool', 'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2',
}  # fmt: skip


def _read_safetensors(file: BinaryIO, size: int, map_location: Any) -> dict[str, Tensor]:
    """https://github.com/huggingface/safetensors: a length, a JSON header, the tensors' bytes."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f'is no whole safetensors file: {what}. {AGAIN}')

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise refuse('one name appears twice in its header')
        return dict(pairs)

    length = struct.unpack('<Q', file.read(8))[0] if size >= 8 else size
    if length > min(size - 8, 2**22):
        raise refuse(f'its header claims {length} bytes')
    header = json.loads(file.read(length), object_pairs_hook=unique)
    if type(header) is not dict or type(header.pop('__metadata__', {})) is not dict:
        raise refuse('its header is no list of tensors')
    restore = torch.serialization._get_restore_location(map_location)
    parts, reached, tensors = [], 0, {}
    for name, entry in header.items():
        match entry:
            case {'dtype': str(code), 'shape': list(shape), 'data_offsets': [int(a), int(b)]} if (
                code in _SAFETENSORS and f'torch.{_SAFETENSORS[code]}' in _DTYPES
            ):
                dtype = _DTYPES[f'torch.{_SAFETENSORS[code]}']
                parts.append((a, b, name, dtype, _sizes(tuple(shape))))
            case _:
                raise refuse(f'{show(name)} is described by {show(entry)}')
    for a, b, name, dtype, sizes in sorted(parts, key=lambda part: part[:2]):
        if a != reached or b - a != math.prod(sizes) * dtype.itemsize or b > size - 8 - length:
            raise refuse(f'{show(name)} lies from {a} to {b}, which is not its place')
        reached = b
        data = _read_bytes(file, _Entry(name, 8 + length + a, b - a, None), dtype)
        data = data.view(dtype) if data.numel() else torch.empty(0, dtype=dtype)
        stored = restore(data.untyped_storage(), 'cpu')
        tensor = torch.empty((0,), dtype=dtype, device=stored.device)
        stride = torch.empty(sizes, device='meta').stride()
        tensors[name] = tensor.set_(stored, 0, sizes, stride)
    if reached != size - 8 - length:
        raise refuse('bytes that belong to no tensor')
    return {name: tensors[name] for name in header}
