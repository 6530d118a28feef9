"""Reads checkpoints by PyTorch's own reader, with an unpickler that looks no name up.

Two things guard every file:

- **Nothing in it is run.** :class:`Unpickler` is Python's own, so it knows every protocol, but all
  names come from a closed table: types that nobody can change, and for the rest a :class:`Form`,
  which notes what it is called with. Functions that check make values of the forms. Nothing is
  looked up, and no class or function that a pickle could change is within its reach.
- **Nothing in it does harm.** A forked process reads it first, within limits of memory and time
  that the system enforces, and checks the CRCs. What it survives is read once more here: by the
  same code, of the same bytes. Handing the tensors over would copy them, which takes longer.

The forked process has one thread, never calls CUDA (as a data loader's worker), and ends with its
parent. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import enum
import faulthandler
import gc
import math
import os
import pathlib
import pickle
import re
import resource
import signal
import sys
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

WAY_OUT = (
    'Ask its author for a file with tensors only, or re-save it where it was trained: '
    'torch.save(model.state_dict(), path)'
)
AGAIN = 'Download or copy it again'
ROOM = 160 * 2**20
"""Bytes that reading may take beyond the file's tensors and twice its pickle."""
TOO_LARGE = 'would take far more memory than a checkpoint of its size does, so it is refused'
PYTHON_2 = {'encoding': 'utf-8', 'errors': 'surrogateescape'}  # its texts may be bytes


class CheckpointError(ValueError):
    """A checkpoint is refused, damaged or not to be had: the message says which, and what to do."""


def need(condition: Any, what: str) -> None:
    """Refuses a file for what it holds."""
    if not condition:
        raise CheckpointError(f'holds {what}')


def show(value: Any) -> str:
    """A value in a message: short, on one line, and not written out where it holds others."""
    if type(value) in (tuple, list) and len(value) <= 8:
        parts = (f'<{type(v).__name__}>' if type(v) in (tuple, list) else show(v) for v in value)
        return f'({", ".join(parts)}{"," * (len(value) == 1)})'
    if type(value) is int and abs(value) >= 2**64:
        return f'an integer of {value.bit_length()} bits'
    if type(value) in (str, bytes):
        return ascii(value[:60]) + ('...' if len(value) > 60 else '')
    known = value is None or type(value) in (bool, int, float)
    label = getattr(value, 'label', '').rpartition('.')[2]
    return repr(value) if known else label or f'<{type(value).__name__}>'


def read(file: BinaryIO, size: int, map_location: Any) -> Any:
    """What a file holds, told by its first bytes: a zip archive, pickles, or safetensors.

    Args:
        file: open, with a descriptor.
        size: its bytes.
        map_location: as for ``torch.load``.

    Raises:
        CheckpointError: It is refused or damaged.
    """
    path, before = f'/proc/self/fd/{file.fileno()}', os.fstat(file.fileno())
    if is_safetensors(os.pread(file.fileno(), 9, 0), size):
        return _read_safetensors(path, map_location)
    receiver, sender = os.pipe()
    parent, result, status = os.getpid(), None, 0
    with warnings.catch_warnings():  # of threads, whose locks the child does without
        warnings.simplefilter('ignore', DeprecationWarning)
        child = os.fork()
    if not child:
        _rehearse(path, size, sender, parent)
    os.close(sender)
    try:
        with open(receiver, 'rb', buffering=0) as pipe:
            said = pipe.read(1)
            if said == b'+':  # the child checks the CRCs meanwhile
                result, said = _load(path, size, map_location)[0], b''
            said += pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        with suppress(ChildProcessError):  # where the program ignores SIGCHLD
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said != b'.':
        raise CheckpointError(said.decode('utf-8', 'replace') or _why(status))
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError('was written to while it was read: read it when it is complete')
    return result


def _why(status: int) -> str:
    if status in (-signal.SIGXCPU, -signal.SIGALRM):
        return 'takes longer to read than any checkpoint of its size, so it is refused'
    if status == -signal.SIGKILL:
        return 'cannot be read: the process that reads it was killed. Is there memory left?'
    name = signal.Signals(-status).name if status < 0 else status
    return f'is damaged or forged: the process that reads it crashed ({name}). {AGAIN}'


def _rehearse(path: str, size: int, sender: int, parent: int) -> NoReturn:
    """The forked process: reads a file within limits.

    Sends '+' when only the CRCs of its tensors are left to check, and '.' or why it is refused.
    """
    said = 'is read by nobody'

    def limit(nbytes: int) -> None:
        soft, hard = base + ROOM + nbytes, resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    try:
        gc.disable()  # what the parent has is the parent's to end
        faulthandler.disable()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        torch.set_num_threads(1)
        seconds = 3 + size // 2**25
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        signal.alarm(120 + size // 2**20)  # by the clock, for a disk that never answers
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open('/proc/self/statm') as memory:
            base = int(memory.read().split()[0]) * resource.getpagesize()
        limit(0)
        if os.getppid() == parent:
            archive = _load(path, size, 'cpu', limit)[1]
            os.write(sender, b'+')
            bad = archive.testzip() if archive else None
            if bad:
                raise zipfile.BadZipFile(f'Bad CRC-32 or header of {bad[:80]!a}')
            said = '.'
    except CheckpointError as error:
        said = str(error)
    except MemoryError:
        said = TOO_LARGE
    except RecursionError:
        said = f'holds containers that are nested too deep, or contain themselves. {WAY_OUT}'
    except zipfile.BadZipFile as error:
        said = f'is damaged or forged: {error}. {AGAIN}'
    except BaseException as error:  # a damaged file can be wrong in any way
        what = f'tensors and plain containers ({type(error).__name__}: {error!s:.200})'
        said = f'cannot be read as {what}: it is damaged, cut off or not a checkpoint. {WAY_OUT}'
    finally:
        try:
            os.write(sender, said.encode('utf-8', 'backslashreplace')[:4000])
        finally:
            os._exit(0)


# --- Formats --------------------------------------------------------------------------------------


def _load(path: str, size: int, map_location: Any, limit: Any = None) -> tuple[Any, Any]:
    """Reads a zip archive or pickles.

    Args:
        path: of the file.
        size: its bytes.
        map_location: as for ``torch.load``.
        limit: of the forked process: says how much memory reading may take.

    Returns:
        What it holds; the zip archive, if it has CRCs to check.
    """
    with open(path, 'rb') as file:
        if file.read(2) == b'PK':
            archive, root = _archive(file, size)
            infos = archive.infolist()
            sizes = {info.filename.removeprefix(f'{root}data/'): info.file_size for info in infos}
            with_crcs = any(info.CRC for info in infos)
            if limit:
                limit(size + 2 * sizes[f'{root}data.pkl'])
            if limit and with_crcs:
                archive.read(f'{root}data.pkl')  # checks its CRC
            result = _PickleModule(sizes).load_all(path, map_location, mmap=bool(limit))
            return result, archive if with_crcs else None
        if limit:
            limit(2 * size)
        file.seek(0)
        module = _PickleModule(size)
        result = module.load(file, **PYTHON_2)
        if type(result) is int and result == torch.serialization.MAGIC_NUMBER:
            file.seek(0)
            with suppress(tarfile.TarError):
                tarfile.open(fileobj=file, mode='r:').close()
                raise CheckpointError(f"is a tar archive, PyTorch's first format. {WAY_OUT}")
            file.seek(0)
            result = module.load_all(file, map_location, False)
            *_, system, keys = module.loaded
            need(system['little_endian'] is True, 'the numbers of a big-endian machine')
            need(sorted(keys) == sorted(module.claims), 'other storages than it lists')
        else:
            result = _Values().of(result)
            other = 'a pickle, but none that torch.save has written, and without arrays'
            need(module.names & {'_reconstruct', '_frombuffer'}, f'{other}. {WAY_OUT}')
        need(file.tell() == size, f'{size - file.tell()} bytes behind its end. {AGAIN}')
        return result, None


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of so many bytes whose first 9 are these is a safetensors file."""
    return head[8:] == b'{' and int.from_bytes(head[:8], 'little') <= size - 8


def _read_safetensors(path: str, map_location: Any) -> dict[str, Tensor]:
    """By its library: safe by its format, so nothing else has to read it first."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        what = 'is a safetensors file, and the library that reads them is not installed'
        raise CheckpointError(f'{what}: `pip install safetensors`') from None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f'is no whole safetensors file ({error!s:.300}). {AGAIN}') from None
    restore = torch.serialization._get_restore_location(map_location)
    for name, mapped in tensors.items():
        tensor = _checked(mapped.clone())  # the file may change
        storage = restore(tensor.untyped_storage(), 'cpu')
        empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        tensors[name] = empty.set_(storage, 0, tensor.shape, tensor.stride())
    return tensors


def _checked(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool and tensor.numel():
        need(tensor.detach().view(torch.uint8).max() < 2, 'booleans that are neither 0 nor 1')
    return tensor


def _archive(file: BinaryIO, size: int) -> tuple[zipfile.ZipFile, str]:
    """A zip archive of which any reader sees the same parts, and the folder that they lie in."""
    archive = zipfile.ZipFile(file.name)
    infos, names = archive.infolist(), archive.namelist()
    root = next((name[:-8] for name in names if name.endswith('/data.pkl')), '')
    one = sum(name.endswith('/data.pkl') for name in names) == 1
    file.seek(max(0, size - 98))  # the end of the list, for files of 4 GiB, where it is; the end
    end = file.read().rjust(98, b'\0')
    is_long, is_end = end[56:60] == b'PK\6\7', end[76:80] == b'PK\5\6' and not archive.comment
    start = int.from_bytes(end[48:56] if is_long else end[92:96], 'little')
    where = int.from_bytes(end[64:72], 'little') if is_long else size - 98
    for fault, is_so in {
        'parts that are compressed or encrypted, of which a small file could fill the memory':
            any(info.flag_bits & 1 or info.compress_type for info in infos),
        'something before its beginning or behind its end':
            not is_end or (start, where) != (archive.start_dir, size - 98)
            or min(info.header_offset for info in infos),
        'two accounts of a part': len({name.lower() for name in names}) < len(names)
            or names != [i.orig_filename for i in infos] or sum(i.file_size for i in infos) > size,
        'not one data.pkl, in the folder of all the rest':
            not one or not all(name.startswith(root) for name in names),
        'a program: it is a TorchScript archive': f'{root}constants.pkl' in names,
    }.items():  # fmt: skip
        if is_so:
            what = 'is a zip archive, but none that torch.save has written'
            raise CheckpointError(f'{what}: it has {fault}. {WAY_OUT}')
    return archive, root


# --- Pickles --------------------------------------------------------------------------------------


class _Sealed(type):
    """Of classes that a pickle cannot change."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise TypeError('a class cannot be changed')


class Form(metaclass=_Sealed):
    """What a pickle does with a name: the call, the state, the items; and the value made of it."""

    __slots__ = ('args', 'items', 'made', 'state')
    args: tuple
    items: list[tuple[Any, Any]]
    made: Any
    label = ''
    members: list[enum.Enum] = []

    def __new__(cls, *args: Any) -> Form:
        self = object.__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = None if state is self else state  # addict's dicts are their own state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)


class Unpickler(pickle.Unpickler):
    """Python's own; a name stands for what :data:`_AS_IS` has, or for a :class:`Form`."""

    module: _PickleModule

    def find_class(self, module: str, name: str) -> Any:
        # Python 2's names, which the protocols 0 to 2 write.
        module, name = NAME_MAPPING.get((module, name), (module, name))
        module = IMPORT_MAPPING.get(module, module)
        label = f'{module}.{name}'
        self.module.names.add(name)
        if label in _AS_IS:
            return _AS_IS[label]
        if '._rebuild_' in label and label.startswith('torch.') and label not in _CALLED:
            need(False, f'a tensor of a kind that no detector has ({label}). {WAY_OUT}')
        known = label in _CALLED or label in _FILLED or label in _NAMED
        members = [] if known else _enumeration(module, name)
        body = {'label': label, 'members': members, '__slots__': ()}
        return _Sealed('Form', (Form,), body)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'persistent_load':  # which PyTorch sets
            load, value = value, lambda pid: self.module.load_storage(pid, load)
        super().__setattr__(name, value)


class _PickleModule:
    """What ``torch.load`` takes for the module pickle; checks the sizes of the storages.

    Args:
        sizes: of the storages in a zip archive, by their keys; or what one may have at most.
    """

    __name__ = 'pickle'

    def __init__(self, sizes: dict[str, int] | int) -> None:
        self.sizes = sizes
        self.claims: dict[str, tuple] = {}
        self.names: set[str] = set()
        self.loaded: list[Any] = []
        self.Unpickler = type('Checked', (Unpickler,), {'module': self})

    def load(self, file: BinaryIO, **options: Any) -> Any:
        """Reads one pickle."""
        self.loaded.append(self.Unpickler(file, **options).load())
        return self.loaded[-1]

    def load_all(self, source: Any, map_location: Any, mmap: bool) -> Any:
        """Reads a file that torch.save has written."""
        # PyTorch takes no unpickler where this variable is set.
        forced = os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD', None)
        try:
            options: Any = dict(weights_only=False, mmap=mmap, **PYTHON_2)
            return _Values().of(torch.load(source, map_location, self, **options))
        finally:
            os.environ.update({} if forced is None else {'TORCH_FORCE_WEIGHTS_ONLY_LOAD': forced})

    def load_storage(self, pid: Any, load: Callable[[Any], Any]) -> Any:
        """Reads a storage that the file has, by PyTorch's own function."""
        plain = type(pid) is tuple and pid[0] == 'storage' and pid[5:] in ((), (None,))
        need(plain, f'a reference to what is no storage, or a view of one. {WAY_OUT}')
        kind, key, location, numel = pid[1:5]
        kind = torch.UntypedStorage if getattr(kind, 'label', '') in _NAMED else kind
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        plain = type(key) is type(location) is str and location != 'meta' and type(numel) is int
        need(plain, f'a storage without numbers ({show(pid[2:5])})')
        same = self.claims.setdefault(key, (dtype, numel)) == (dtype, numel)
        need(same, f'tensors of two types or sizes in the storage {key:.60}')
        held = self.sizes if isinstance(self.sizes, int) else self.sizes.get(key, -1)
        nbytes = numel * dtype.itemsize
        if held < 0:
            raise CheckpointError(f'lacks the storage {key:.60}. {AGAIN}')
        if nbytes < 0 or nbytes > held or nbytes < held and held is not self.sizes:
            what = f'claims {show(numel)} elements for the storage {key:.60}'
            raise CheckpointError(f'{what}, of which the file has {held} bytes. {AGAIN}')
        try:
            return load(('storage', kind, *pid[2:]))
        except (RuntimeError, AssertionError):
            if location == 'cpu':
                raise
            device = f'the device {show(location)}, which is not there: read it'
            raise CheckpointError(f"was saved from {device} with map_location='cpu'") from None


def _enumeration(module: str, name: str) -> list[enum.Enum]:
    """The members of an enumeration that this process has already; nothing is imported for it."""
    found: Any = sys.modules.get(module)
    for part in name.split('.'):
        found = getattr(found, '__dict__', {}).get(part)
    if isinstance(found, type) and issubclass(found, enum.Enum):
        return list(found)
    raise CheckpointError(
        f'names {module:.100}.{name:.100}, which is neither a tensor nor a plain container: '
        f'reading it could run code, so it is refused. {WAY_OUT}'
    )


# --- Values ---------------------------------------------------------------------------------------


class _Values:
    """Makes values of what was unpickled, inner ones first, containers in place.

    What is in several containers is seen in each: one that unfolds without end takes too long.
    """

    def __init__(self) -> None:
        self.left = ROOM
        self.known: dict[int, Any] = {}

    def of(self, obj: Any) -> Any:
        """The value of an object."""
        kind = type(obj)
        if kind in _PLAIN:
            return obj
        if kind in (dict, OrderedDict, defaultdict, Counter):
            attributes = self.of(vars(obj)) if kind is OrderedDict else {}
            shadows = any(hasattr(OrderedDict, str(key)) for key in attributes)
            need(not shadows, 'an OrderedDict whose attributes are not its own')
            factory = getattr(obj, 'default_factory', None)
            need(factory is None or factory in _TYPES, f'a factory that is {show(factory)}')
            if isinstance(obj.get('anneal_func'), Form):
                del obj['anneal_func']  # a method of MMEngine's OneCycleLR, which has it itself
            items = {self.of(key): self.of(value) for key, value in obj.items()}
            obj.clear()
            obj.update(items)
        elif kind in (list, deque):
            values = [self.of(value) for value in obj]
            obj.clear()
            obj.extend(values)
        elif kind in (tuple, set, frozenset):
            values = [self.of(value) for value in obj]
            if any(value is not old for value, old in zip(values, obj, strict=True)):
                return kind(values)
        elif isinstance(obj, Form):
            direct = (_Sealed, torch.storage.TypedStorage)
            args = [arg if type(arg) in direct else self.of(arg) for arg in obj.args]
            state, items = self.of(obj.state), self.of(obj.items)
            if not hasattr(obj, 'made'):
                obj.made = self.made(obj, args, state, items)
                self.known[id(obj.made)] = obj.made
            return obj.made
        elif kind is argparse.Namespace:
            self.of(vars(obj))
        elif id(obj) not in self.known:
            parts = (obj.start, obj.stop, obj.step) if kind is slice else (obj,)
            plain = all(part is None or type(part) is int or part in _TYPES for part in parts)
            need(plain, f'a piece of a HistoryBuffer or of numpy data outside of one ({show(obj)})')
        return obj

    def made(self, form: Form, args: list, state: Any, items: list) -> Any:
        """The value of a form, by the closed table."""
        label = form.label
        if label in _FILLED:
            return _FILLED[label](args, state, items)
        need(state is None and not items, f'a {label:.80} with a state')
        if form.members:
            return next((member for member in form.members if member.value == args[0]), args[0])
        need(label in _CALLED, f'a call of {label}')
        value = _CALLED[label](*args)
        if isinstance(value, Tensor):  # an expanded one is more than it is made of
            nbytes = math.prod(value.shape) * value.itemsize
            self.left -= max(0, nbytes - value.untyped_storage().nbytes())
            if self.left < 0:
                raise CheckpointError(TOO_LARGE)
        return value


def _tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False,
               hooks: Any = None, metadata: Any = None) -> Tensor:  # fmt: skip
    return _tensor_v3(storage, offset, shape, stride, requires_grad, hooks, None, metadata)


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any,
               dtype: Any, metadata: Any = None) -> Tensor:  # fmt: skip
    """A tensor that lies within its storage."""
    need(isinstance(storage, torch.storage.TypedStorage), 'a tensor without a storage')
    need(not hooks, 'a tensor with hooks')
    where = f'a tensor of shape {show(shape)}, stride {show(stride)} and offset {show(offset)}'
    numbers = (offset, *shape, *stride)
    plain = all(type(n) is int and 0 <= n < 2**40 for n in numbers) and len(shape) == len(stride)
    need(plain and len(shape) <= 64, where)
    held = storage._untyped_storage.nbytes() // (dtype or storage.dtype).itemsize
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    beyond = f'{where}, which lies beyond its storage of {held} elements'
    need(0 in shape or reach <= held, beyond)
    args: Any = (storage, offset, shape, stride, requires_grad, OrderedDict())
    if dtype is None:
        return _checked(torch._utils._rebuild_tensor_v2(*args, metadata))
    return _checked(torch._utils._rebuild_tensor_v3(*args, dtype, metadata))


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None) -> nn.Parameter:
    need(isinstance(data, Tensor) and not hooks, 'a parameter that is not made of a tensor')
    return nn.Parameter(data, requires_grad)


def _encode(text: Any, encoding: Any = 'latin1') -> bytes:
    """By which the protocols 0 to 2 write bytes."""
    if encoding not in ('latin1', 'latin-1'):
        raise CheckpointError(f'calls codecs.encode(..., {show(encoding)})')
    return text.encode('latin1') if type(text) is str else bytes(text)


def _reconstructor(args: Any, state: Any, items: Any) -> Any:
    """By which the protocols 0 and 1 make objects: of a class, its base, and that base's value."""
    kind, base, value = args
    if kind is str is base:
        return str(value)
    label = getattr(kind, 'label', '')
    need(label in _FILLED, f'an object of the class {show(kind)}')
    return _FILLED[label]([] if base is object else [value], state, items)


def _numpy_dtype(args: Any, state: Any, items: Any) -> np.dtype:
    """A dtype by its code: a crafted state of numpy's own can crash the process."""
    known = type(args[0]) is str and re.fullmatch(r'[biufcmMSUO]\d{0,9}', args[0])
    need(known, f'numpy data of type {show(args[0])}, which is not plain')
    # (version, byte order, subarray, names, fields, item size, alignment, flags, unit of time)
    state = (3, '=', None, None, None) if state is None else state
    plain = state[2:5] == (None, None, None) and state[1] in ('<', '>', '|', '=')
    need(plain, 'a numpy dtype that is not plain')
    unit = f'[{state[8][-1][1]:d}{state[8][-1][0].decode()}]' if state[8:] else ''
    return np.dtype(state[1] + args[0] + unit * ('generic' not in unit))


def _array(args: Any, state: Any, items: Any) -> np.ndarray:
    _, shape, dtype, fortran, raw = state
    raw = raw.encode(**PYTHON_2) if type(raw) is str else raw
    need(isinstance(dtype, np.dtype), 'a numpy array that is not made of numbers')
    need(type(raw) is (list if dtype.hasobject else bytes), 'a numpy array of another kind')
    fits = math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize) == len(raw)
    need(fits, f'a numpy array of {len(raw)} bytes that claims the shape {show(shape)}')
    order: Any = 'F' if fortran else 'C'
    if not dtype.hasobject:
        return np.ndarray(shape, dtype, bytearray(raw), order=order)
    need({type(value) for value in raw} <= _PLAIN, 'a numpy array of more than plain values')
    return np.array([*raw, None], dtype)[:-1].reshape(shape, order=order)


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _array((), (1, shape, dtype, order == 'F', bytes(raw)), ())


def _scalar(dtype: Any, raw: Any) -> Any:
    need(isinstance(dtype, np.dtype) and not dtype.hasobject, 'a numpy scalar that is not a number')
    return _array((), (1, (), dtype, False, raw), ())[()]


def _history(args: Any, state: Any, items: Any) -> HistoryBuffer:
    """MMEngine's own ``__setstate__`` writes the file's methods to the class."""
    return history_buffer(*map(state.get, ('_log_history', '_count_history', 'max_length')))


def history_buffer(logs: Any, counts: Any, max_length: Any) -> HistoryBuffer:
    """A HistoryBuffer of these arrays, if it can be one."""
    shapes = [getattr(array, 'shape', None) for array in (logs, counts)]
    plain = type(logs) is type(counts) is np.ndarray and type(max_length) is int
    what = f'a HistoryBuffer with logs of shape {shapes[0]}, counts of shape {shapes[1]}'
    plain = plain and logs.ndim == 1 and logs.shape == counts.shape and len(logs) <= max_length
    need(plain, f'{what} and max_length {show(max_length)}')
    return HistoryBuffer(logs, counts, max_length)


def _getattr(owner: Any, name: Any) -> str:
    """The name of one of a HistoryBuffer's methods."""
    own = getattr(owner, 'label', '') == 'mmengine.logging.history_buffer.HistoryBuffer'
    if not own or name not in ('min', 'max', 'current', 'mean'):
        raise CheckpointError(f'calls builtins.getattr({show(owner)}, {show(name)})')
    return name


def _dict(args: Any, state: Any, items: Any) -> dict:
    """A dict of a dict or pairs; its state may hold the items once more."""
    state = {key: state[key] for key in state or () if not str(key).startswith('_')}
    return {**state, **dict(args[-1] if args else ()), **dict(items)}


def _namespace(args: Any, state: Any, items: Any) -> argparse.Namespace:
    return argparse.Namespace(**(state or {}))


# --- What the names in a file stand for -----------------------------------------------------------

_NAMED = (
    *('numpy.ndarray', 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'),
    *('torch.UntypedStorage', 'torch.storage.UntypedStorage'),
)
_TYPES = (bool, int, float, complex, str, bytes, list, dict, tuple, set, frozenset, object)
_TORCH = (torch.device, torch.Size)
_PLAIN = {type(None), *_TYPES[:6], bytearray, range, torch.dtype, torch.layout, *_TORCH}
_AS_IS: dict[str, Any] = {
    **{f'{kind.__module__}.{kind.__name__}': kind
       for kind in (*_TYPES, *_TORCH, OrderedDict, defaultdict, deque, range, slice)},
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    'torch.torch_version.TorchVersion': str,
}  # fmt: skip
"""Types that nobody can change and whose calls only make a value."""
_CALLED: dict[str, Callable[..., Any]] = {
    '_codecs.encode': _encode,
    'builtins.bytearray': lambda *args: bytearray(_encode(*args or [b''])),
    'builtins.getattr': _getattr,
    'collections.Counter': Counter,
    **{f'datetime.{name}': getattr(datetime, name)
       for name in ('date', 'datetime', 'time', 'timedelta', 'timezone')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
    **{f'numpy.{core}.numeric._frombuffer': _frombuffer for core in ('core', '_core')},
    **{f'pathlib{local}.{pure}{system}Path': getattr(pathlib, f'Pure{system}Path')
       for local in ('', '._local') for pure in ('', 'Pure') for system in ('Posix', 'Windows')},
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_tensor': _tensor_v2,
    'torch._utils._rebuild_tensor_v2': _tensor_v2,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch.serialization._get_layout': torch.serialization._get_layout,
}  # fmt: skip
"""What makes a value of a call's arguments."""
_FILLED: dict[str, Callable[[Any, Any, Any], Any]] = {
    'argparse.Namespace': _namespace,
    'copyreg._reconstructor': _reconstructor,
    'mmengine.logging.history_buffer.HistoryBuffer': _history,
    'numpy.dtype': _numpy_dtype,
    **{f'numpy.{core}.multiarray._reconstruct': _array for core in ('core', '_core')},
    'types.SimpleNamespace': _namespace,
    **dict.fromkeys((
        *('addict.addict.Dict', 'easydict.EasyDict', 'munch.Munch', 'munch.munch.Munch'),
        *('mmengine.config.config.ConfigDict', 'mmcv.utils.config.ConfigDict', 'box.box.Box'),
        *('yacs.config.CfgNode', 'fvcore.common.config.CfgNode', 'attrdict.AttrDict'),
        *('detectron2.config.config.CfgNode', 'lightning.fabric.utilities.data.AttributeDict'),
        'lightning_fabric.utilities.data.AttributeDict',
        'pytorch_lightning.utilities.parsing.AttributeDict',
    ), _dict),
}  # fmt: skip
"""What makes a value of arguments, state and items."""
