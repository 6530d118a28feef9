"""Reads checkpoints by PyTorch's own reader, with an unpickler that looks no name up.

- **Nothing in a file is run.** The unpickler is Python's own, so it knows every protocol, but all
  names come from a closed table: types that nobody can change, and for the rest a :class:`Form`,
  which notes what it is called with. Functions that check make values of the forms.
- **Nothing in a file does harm.** A forked process of one thread reads it first, within limits of
  memory and time that the system enforces, and checks the CRCs. What it survives is read once more
  here, by the same code: handing the tensors over is slower. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import enum
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
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn
from torch.storage import TypedStorage

from ..literals import show

WAY_OUT = (
    'Ask its author for a file with tensors only, or re-save it where it was trained: '
    'torch.save(model.state_dict(), path)'
)
AGAIN = 'Download or copy it again'
ROOM = 160 * 2**20  # bytes that reading may take beyond the file's tensors and twice its pickle
TOO_LARGE = 'would take far more memory than a checkpoint of its size does, so it is refused'
TOO_LONG = 'takes longer to read than any checkpoint of its size, so it is refused'
KILLED = 'cannot be read: the process that reads it was killed. Is there memory left?'
ENDED = {-signal.SIGXCPU: TOO_LONG, -signal.SIGALRM: TOO_LONG, -signal.SIGKILL: KILLED}
FORCED = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # where it is set, torch.load takes no unpickler
PYTHON_2: dict[str, Any] = {'encoding': 'utf-8', 'errors': 'surrogateescape'}  # bytes as texts


class CheckpointError(ValueError):
    """A checkpoint is refused, damaged or not to be had: the message says which, and what to do."""


def need(condition: Any, what: str) -> None:
    """Refuses a file for what it holds."""
    if not condition:
        raise CheckpointError(f'holds {what}')


def read(file: BinaryIO, size: int, map_location: Any) -> Any:
    """What an open file of so many bytes holds; ``map_location`` as for ``torch.load``.

    Raises:
        CheckpointError: It is refused or damaged.
    """
    path, before = f'/proc/self/fd/{file.fileno()}', os.fstat(file.fileno()).st_mtime_ns
    if is_safetensors(os.pread(file.fileno(), 9, 0), size):
        return _read_safetensors(path, map_location)
    receiver, sender = os.pipe()
    parent, result, status = os.getpid(), None, 0
    child = os.fork()
    forced = os.environ.pop(FORCED, None)
    if not child:
        try:
            said = _rehearse(path, size, sender, parent).encode('utf-8', 'backslashreplace')
            os.write(sender, said[:4000])
        finally:
            os._exit(0)
    os.close(sender)
    try:
        with open(receiver, 'rb', buffering=0) as pipe:
            said = pipe.read(1)
            if said == b'+':  # the child checks the CRCs meanwhile
                result, said = _load(path, size, map_location)[0], b''
            said += pipe.read()
    except (RuntimeError, AssertionError) as error:  # the child can, on the CPU
        what = f"cannot be put on its device ({error!s:.200}): read it with map_location='cpu'"
        raise CheckpointError(what) from None
    finally:
        os.environ.update({FORCED: forced} if forced else {})
        with suppress(OSError):  # where the program ignores SIGCHLD, it is gone
            os.kill(child, signal.SIGKILL)  # it ends anyway, unless the parent was interrupted
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said != b'.':
        name = signal.Signals(-status).name if status < 0 else 'nobody knows how'
        crash = f'is damaged or forged: the process that reads it crashed ({name}). {AGAIN}'
        raise CheckpointError(said.decode('utf-8', 'replace') or ENDED.get(status, crash))
    if before != os.fstat(file.fileno()).st_mtime_ns:
        raise CheckpointError('was written to while it was read: read it when it is complete')
    return result


def _rehearse(path: str, size: int, sender: int, parent: int) -> str:
    """The forked process: '.', or why a file is refused; sends '+' before it checks the CRCs."""
    try:
        gc.disable()  # what the parent has is the parent's to end
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it warns of, so does the parent
        torch.set_num_threads(1)
        _limit(size, 0)
        signal.alarm(120 + size // 2**20)  # by the clock, for a disk that never answers
        if os.getppid() == parent:
            archive = _load(path, size, 'cpu', True)[1]
            os.write(sender, b'+')
            bad = archive and archive.testzip()
            if bad:
                raise zipfile.BadZipFile(f'Bad CRC-32 or header of {bad[:80]!a}')
        return '.'
    except CheckpointError as error:
        return str(error)
    except MemoryError:
        return TOO_LARGE
    except RecursionError:
        return f'holds containers that are nested too deep, or contain themselves. {WAY_OUT}'
    except BaseException as error:  # a damaged file can be wrong in any way
        what = f'tensors and plain containers ({type(error).__name__}: {error!s:.200})'
        what = f'cannot be read as {what}: it is damaged, cut off or not a checkpoint'
        return f'{what}. {AGAIN}. {WAY_OUT}'


def _limit(size: int, memory: int) -> None:
    """Limits time by the file's size, memory to what is held now, ROOM and so many bytes."""
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: 3 + size // 2**25}
    limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + ROOM + memory
    for kind, most in limits.items():
        with suppress(ValueError):  # the system's own limit is lower
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def _load(path: str, size: int, map_location: Any, forked: bool = False) -> tuple[Any, Any]:
    """What a zip archive or pickles hold; the archive, if it has CRCs. A fork limits its memory."""
    module, options = _PickleModule(), dict(weights_only=False, **PYTHON_2)
    with open(path, 'rb') as file:
        if os.pread(file.fileno(), 2, 0) == b'PK':
            archive, root, module.parts = _archive(file, size)
            if forked:
                _limit(size, size + 2 * module.parts['data.pkl'])
            if forked and archive:
                archive.read(f'{root}data.pkl')  # checks its CRC
            result = torch.load(path, map_location, module, mmap=forked, **options)
            return module.value(result), archive
        if forked:
            _limit(size, 2 * size)
        result = module.load(file, **PYTHON_2)
        if result == torch.serialization.MAGIC_NUMBER:
            need(not tarfile.is_tarfile(path), f"PyTorch's first format, a tar archive. {WAY_OUT}")
            file.seek(0)
            result = torch.load(file, map_location, module, **options)
            need(sorted(module.last) == sorted(module.claims), 'other storages than it lists')
        else:
            other = 'a pickle, but none that torch.save has written, and without arrays'
            need(module.names & {'_reconstruct', '_frombuffer'}, f'{other}. {WAY_OUT}')
        need(file.tell() == size, f'{size - file.tell()} bytes behind its end. {AGAIN}')
        return module.value(result), None


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of so many bytes whose first 9 are these is a safetensors file."""
    return head[8:] == b'{' and int.from_bytes(head[:8], 'little') <= size - 8


def _read_safetensors(path: str, map_location: Any) -> dict[str, Tensor]:
    """By its library: safe by its format, so nothing else has to read it first."""
    try:
        from safetensors.torch import load_file

        tensors = load_file(path)
    except ImportError:
        what = 'is a safetensors file, and the library that reads them is not installed'
        raise CheckpointError(f'{what}: `pip install safetensors`') from None
    except Exception as error:
        raise CheckpointError(f'is no whole safetensors file ({error!s:.300}). {AGAIN}') from None
    restore = torch.serialization._get_restore_location(map_location)
    for name, mapped in tensors.items():
        storage = restore(mapped.clone()._typed_storage(), 'cpu')  # the file may change
        tensors[name] = _tensor(storage, 0, mapped.shape, mapped.stride())
    return tensors


def _archive(file: BinaryIO, size: int) -> tuple[zipfile.ZipFile | None, str, dict[str, int]]:
    """A zip archive that any reader sees alike, if it has CRCs; its folder; its parts' sizes."""
    archive = zipfile.ZipFile(file.name)
    infos = archive.infolist()
    root = infos[0].filename.partition('/')[0] + '/'  # as PyTorch finds it
    parts = {info.filename.removeprefix(root): info.file_size for info in infos}
    # Its end says where the list of parts begins, and for files of 4 GiB, where it says so.
    end = os.pread(file.fileno(), 98, max(0, size - 98)).rjust(98)
    start, where = (n.to_bytes(8, 'little') for n in (archive.start_dir, max(0, size - 98)))
    is_long = (end[:4], end[48:60], end[64:72]) == (b'PK\6\6', start + b'PK\6\7', where)
    is_short = end[56:60] != b'PK\6\7' and end[92:96] + bytes(4) == start
    ends = end[76:80] == b'PK\5\6' and (is_long or is_short) and infos[0].header_offset == 0
    other = f': it is a zip archive, but none that torch.save has written. {WAY_OUT}'
    for i in infos:
        folder = i.file_size and (i.is_dir() or i.external_attr & 16)  # PyTorch reads nothing of it
        plain = not (folder or i.flag_bits & 1 or i.compress_type)
        need(plain, f'parts that are compressed, encrypted or marked as folders{other}')
    need(ends, f'something before its beginning or behind its end{other}')
    once = len({part.lower() for part in parts}) == len(infos) and ''.join(parts).isascii()
    need(once and sum(parts.values()) <= size, f'two accounts of a part{other}')
    inside = 'data.pkl' in parts and all(info.filename.startswith(root) for info in infos)
    need(inside, f'not one data.pkl, in the folder of all the rest{other}')
    need('constants.pkl' not in parts, f'a program: it is a TorchScript archive. {WAY_OUT}')
    return archive if any(info.CRC for info in infos) else None, root, parts


class Form:
    """What a pickle does with a name: the call, the state, the items; and the value made of it."""

    __slots__ = ('args', 'given', 'made')
    given: dict[str, Any]
    dtype = torch.uint8  # by which PyTorch reads a storage whose type is no other

    def __new__(cls, *args: Any) -> Any:
        self: Any = object.__new__(cls)
        self.args, self.given = args, {}
        return self

    def __setstate__(self, state: Any) -> None:
        if state is not self:  # addict's dicts are their own state
            self.given['state'] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.given.setdefault('items', []).append((key, value))


def _enumeration(module: str, name: str) -> Any:
    """Finds the members of an enumeration that this process has: nothing is imported for it."""
    found: Any = sys.modules.get(module)
    for part in name.split('.'):
        found = getattr(found, '__dict__', {}).get(part)
    if isinstance(found, type) and issubclass(found, enum.Enum):
        return lambda value: next((each for each in found if each.value == value), value)
    what = f'names {module:.100}.{name:.100}, which is neither a dense tensor nor a plain container'
    raise CheckpointError(f'{what}: what else a file names could run code. {WAY_OUT}')


class _PickleModule:
    """What ``torch.load`` takes for the module pickle, and makes values of what it gives."""

    def __init__(self) -> None:
        self.__name__ = 'pickle'
        self.parts: dict[str, int] | None = None  # the sizes of a zip archive's, by name
        self.claims: dict[str, tuple] = {}
        self.names: set[str] = set()
        self.left = ROOM

        def set_attribute(unpickler: Any, name: str, value: Any) -> None:
            own = partial(self.load_storage, value) if name == 'persistent_load' else value
            pickle.Unpickler.__setattr__(unpickler, name, own)  # PyTorch sets it

        methods = {'find_class': self.find_class, '__setattr__': set_attribute}
        self.Unpickler = type('Unpickler', (pickle.Unpickler,), methods)

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for: what :data:`_AS_IS` has, or a :class:`Form`."""
        module, name = NAME_MAPPING.get((module, name), (module, name))  # as of Python 2
        module = IMPORT_MAPPING.get(module, module)
        label = f'{module}.{name}'
        self.names.add(name)
        if label in _AS_IS:
            return _AS_IS[label]
        make = _FORMS.get(label) or _FORMS.get(name) or _enumeration(module, name)
        return type(name, (Form,), {'label': label, 'make': staticmethod(make), '__slots__': ()})

    def load(self, file: BinaryIO, **options: Any) -> Any:
        """Reads one pickle."""
        self.last = self.Unpickler(file, **options).load()
        return self.last

    def load_storage(self, load: Any, pid: Any) -> Any:
        """Reads a storage that the file has, by PyTorch's own function."""
        what, kind, key, location, numel, *_ = pid
        need(what == 'storage' and location != 'meta', f'a storage without numbers ({show(pid)})')
        same = self.claims.setdefault(key, (kind.dtype, numel)) == (kind.dtype, numel)
        need(same, f'tensors of two types or sizes in the storage {show(key)}')
        if self.parts is not None:
            held = self.parts.get(f'data/{key}', 'no')
            what = f'a storage {show(key)} that claims {show(numel)} elements of {kind.dtype}'
            fits = held == numel * kind.dtype.itemsize
            need(fits, f'{what}, of which the file has {held} bytes. {AGAIN}')
        return load(pid)

    def value(self, obj: Any) -> Any:
        """The value of what was unpickled, inner ones first, containers in place.

        What several containers hold is visited in each: a file that expands without end runs into
        the time limit.
        """
        kind = type(obj)
        if kind in (dict, OrderedDict, defaultdict, Counter):
            shadows = kind is OrderedDict and [k for k in self.value(vars(obj)) if hasattr(kind, k)]
            need(not shadows, 'an OrderedDict whose attributes are not its own')
            if isinstance(obj.get('anneal_func'), (Form, type)):
                del obj['anneal_func']  # a method of MMEngine's OneCycleLR, which has it itself
            items = {self.value(key): self.value(value) for key, value in obj.items()}
            obj.clear()
            obj.update(items)
        elif kind in (list, deque):
            for i, value in enumerate(obj):
                obj[i] = self.value(value)
        elif kind in (tuple, set, frozenset):
            values = [self.value(value) for value in obj]
            if any(value is not old for value, old in zip(values, obj, strict=True)):
                return kind(values)
        elif isinstance(obj, (type, TypedStorage)):
            what = f'a piece of a HistoryBuffer or of numpy data outside of one ({show(obj)})'
            need(kind is type and obj in _TYPES, what)
        elif issubclass(kind, Form):
            args = [a if isinstance(a, (type, TypedStorage)) else self.value(a) for a in obj.args]
            given = self.value(obj.given)
            if not hasattr(obj, 'made'):
                obj.made = self.made(obj, args, given)
            return obj.made
        return obj

    def made(self, form: Any, args: list, given: dict[str, Any]) -> Any:
        """The value of a form, by the closed table."""
        try:
            value = form.make(*args, **given)
        except (TypeError, LookupError, AttributeError) as error:
            what = f'{form.label}{show(tuple(args))}, which gives no value ({error!s:.100})'
            raise CheckpointError(f'calls {what}. {WAY_OUT}') from None
        if isinstance(value, Tensor):  # an expanded one is more than it is made of
            self.left -= max(0, value.numel() * value.itemsize - value.untyped_storage().nbytes())
            if self.left < 0:
                raise CheckpointError(TOO_LARGE)
        return value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False,
            hooks: Any = None, *more: Any) -> Tensor:  # fmt: skip
    """A tensor that lies within its storage; ``more`` may begin with a dtype of its own."""
    need(isinstance(storage, TypedStorage) and not hooks, 'a tensor without storage or with hooks')
    own = more[0] if more and isinstance(more[0], torch.dtype) else None
    held = storage._untyped_storage.nbytes() // (own or storage.dtype).itemsize
    plain = all(type(n) is int and 0 <= n < 2**40 for n in (offset, *shape, *stride))
    where = f'a tensor of shape {show(shape)}, stride {show(stride)} and offset {show(offset)}'
    need(plain and len(shape) == len(stride) <= 64, where)
    reach = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    need(0 in shape or reach < held, f'{where}, which lies beyond its storage of {held} elements')
    rebuild = torch._utils._rebuild_tensor_v3 if own else torch._utils._rebuild_tensor_v2
    tensor = rebuild(storage, offset, shape, stride, requires_grad, OrderedDict(), *more)
    whole = tensor.dtype != torch.bool or bool((tensor.detach().view(torch.uint8) < 2).all())
    need(whole, 'booleans that are neither 0 nor 1')
    return tensor


def _numpy_dtype(code: Any, *flags: Any, state: Any = (3, '=')) -> np.dtype:
    """A dtype by its code: a crafted state of numpy's own can crash the process."""
    # (version, byte order, subarray, names, fields, item size, alignment, flags, unit of time)
    order, unit = state[1], state[8:] and state[8][-1]
    plain = type(code) is str and re.fullmatch(r'[<>|=][biufcmMSUO]\d{0,9}', f'{order}{code}')
    need(plain, f'numpy data of type {show(code)}, which is not plain')
    timed = unit and unit[0] != b'generic'
    return np.dtype(f'{order}{code}[{unit[1]:d}{unit[0].decode()}]' if timed else order + code)


def _array(shape: Any, dtype: Any, fortran: Any, raw: Any) -> np.ndarray:
    """An array of bytes, or of a list of values."""
    raw = raw.encode(**PYTHON_2) if type(raw) is str else raw
    kind, each = (list, 1) if dtype.hasobject else (bytes, dtype.itemsize)
    fits = type(raw) is kind and math.prod(shape) * each == len(raw)
    need(fits, f'a numpy array of {len(raw)} bytes that claims the shape {show(shape)}')
    if kind is list:
        return np.fromiter(raw, dtype).reshape(shape, order='F' if fortran else 'C')
    return np.ndarray(shape, dtype, bytearray(raw), order='F' if fortran else 'C')


def history_buffer(logs: Any, counts: Any, max_length: Any) -> HistoryBuffer:
    """A HistoryBuffer of these arrays, if it can be one."""
    shapes = [getattr(array, 'shape', None) for array in (logs, counts)]
    plain = type(logs) is type(counts) is np.ndarray and shapes == [(len(logs),)] * 2
    fits = plain and type(max_length) is int and len(logs) <= max_length
    what = f'a HistoryBuffer with logs of shape {shapes[0]}, counts of shape {shapes[1]}'
    need(fits, f'{what} and max_length {show(max_length)}')
    return HistoryBuffer(logs, counts, max_length)


def _dict(*args: Any, state: Any = (), items: Any = ()) -> dict:
    """A dict of a dict or pairs; its state may hold the items once more."""
    attributes = {key: state[key] for key in state if not str(key).startswith('_')}
    return {**attributes, **dict(*args[-1:]), **dict(items)}


_TYPES = (bool, int, float, complex, str, bytes, list, dict, tuple, set, frozenset, object)
_DICTS = ('AttrDict', 'AttributeDict', 'Box', 'CfgNode', 'ConfigDict', 'Dict', 'EasyDict', 'Munch')
"""Whatever package they are from: addict, MMEngine, yacs, Lightning, or a copy of its own."""
_LOG = 'mmengine.logging.history_buffer.HistoryBuffer'
_CYCLE = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'
_AS_IS: dict[str, Any] = {
    **{f'{kind.__module__}.{kind.__name__}': kind
       for kind in (*_TYPES, OrderedDict, defaultdict, deque, range, torch.device, torch.Size)},
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    **{f'{_LOG}.{name}': name for name in ('min', 'max', 'current', 'mean')},
}  # fmt: skip
"""What nobody can change, and whose calls only make a value."""
_FORMS: dict[str, Any] = {
    '_codecs.encode': lambda text, encoding='latin1': bytes(text, encoding),
    'argparse.Namespace': lambda state=(): argparse.Namespace(**dict(state)),
    'builtins.bytearray': bytearray,
    'builtins.getattr': lambda owner, name: _AS_IS[f'{owner.label}.{name}'],
    'builtins.slice': slice,
    'collections.Counter': lambda *args: Counter(*args),
    # By which the protocols 0 and 1 make objects: of a class, its base, and that base's value.
    'copyreg._reconstructor': lambda kind, base, value, **given:
        kind.make(*(() if base is object else (value,)), **given),
    **{f'datetime.{name}': getattr(datetime, name)
       for name in ('date', 'datetime', 'time', 'timedelta', 'timezone')},
    # Its own __setstate__ writes the file's methods to the class.
    _LOG: lambda state: history_buffer(
        *map(state.get, ('_log_history', '_count_history', 'max_length'))),
    'numpy.dtype': _numpy_dtype,
    **{f'numpy.{core}.{name}': make for core in ('core', '_core') for name, make in {
        'multiarray._reconstruct': lambda kind, shape, code, state: _array(*state[1:]),
        'multiarray.scalar': lambda dtype, raw: _array((), dtype, False, raw)[()],
        'numeric._frombuffer':
            lambda raw, dtype, shape, order: _array(shape, dtype, order == 'F', bytes(raw)),
    }.items()},
    **{f'pathlib{local}.{pure}{system}Path': getattr(pathlib, f'Pure{system}Path')
       for local in ('', '._local') for pure in ('', 'Pure') for system in ('Posix', 'Windows')},
    'torch._utils._rebuild_parameter': lambda data, grad=True, hooks=None: nn.Parameter(data, grad),
    **dict.fromkeys((f'torch._utils._rebuild_tensor{v}' for v in ('', '_v2', '_v3')), _tensor),
    'torch.serialization._get_layout': torch.serialization._get_layout,
    'torch.torch_version.TorchVersion': str,
    'types.SimpleNamespace': lambda state=(): argparse.Namespace(**dict(state)),
    **dict.fromkeys(_DICTS, _dict),
    # Only named: as what is made, as a storage's type, as what has a method, as that method.
    **dict.fromkeys(('numpy.ndarray', 'torch.UntypedStorage', 'torch.storage.UntypedStorage',
                     _CYCLE, f'{_CYCLE}._annealing_cos', f'{_CYCLE}._annealing_linear'), ...),
}  # fmt: skip
"""What makes a value of a call's arguments, and of a state and items where it takes them."""
