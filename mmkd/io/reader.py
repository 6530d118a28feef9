"""Reads checkpoints by PyTorch's own reader, with an unpickler that looks no name up.

- **Nothing in a file is run.** The :class:`Unpickler` is Python's own, so it knows every protocol,
  but all names come from a closed table: types that nobody can change, and for the rest a
  :class:`Form`, which notes what it is called with. Functions that check make values of the forms.
- **Nothing in a file does harm.** A forked process reads it first, within limits of memory and
  time that the system enforces, and checks the CRCs. What it survives is read once more here, by
  the same code: handing the tensors over would copy them, which takes longer.

The forked process has one thread, never calls CUDA, and ends with its parent. Linux only.
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
import struct
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
from torch.storage import TypedStorage

from ..literals import show

WAY_OUT = (
    'Ask its author for a file with tensors only, or re-save it where it was trained: '
    'torch.save(model.state_dict(), path)'
)
AGAIN = 'Download or copy it again'
ROOM = 160 * 2**20
"""Bytes that reading may take beyond the file's tensors and twice its pickle."""
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
    forced = os.environ.pop(FORCED, None)
    try:
        with open(receiver, 'rb', buffering=0) as pipe:
            said = pipe.read(1)
            if said == b'+':  # the child checks the CRCs meanwhile
                result, said = _load(path, size, map_location)[0], b''
            said += pipe.read()
    except BaseException as error:
        os.kill(child, signal.SIGKILL)
        if isinstance(error, (RuntimeError, AssertionError)):  # the child can, on the CPU
            what = f"cannot be put on its device ({error!s:.200}): read it with map_location='cpu'"
            raise CheckpointError(what) from None
        raise
    finally:
        os.environ.update({FORCED: forced} if forced else {})
        with suppress(ChildProcessError):  # where the program ignores SIGCHLD
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said != b'.':
        name = signal.Signals(-status).name if status < 0 else 'nobody knows how'
        crash = f'is damaged or forged: the process that reads it crashed ({name}). {AGAIN}'
        why = ENDED.get(status, crash)
        raise CheckpointError(said.decode('utf-8', 'replace') or why)
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError('was written to while it was read: read it when it is complete')
    return result


def _rehearse(path: str, size: int, sender: int, parent: int) -> NoReturn:
    """The forked process: reads a file within limits.

    Sends '+' when only the CRCs of its tensors are left to check, and '.' or why it is refused.
    """
    said = 'is read by nobody'
    try:
        os.environ.pop(FORCED, None)
        gc.disable()  # what the parent has is the parent's to end
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        torch.set_num_threads(1)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, 3 + size // 2**25)
        _limit_memory(0)
        signal.alarm(120 + size // 2**20)  # by the clock, for a disk that never answers
        if os.getppid() == parent:
            archive = _load(path, size, 'cpu', True)[1]
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
    except BaseException as error:  # a damaged file can be wrong in any way
        said = f'tensors and plain containers ({type(error).__name__}: {error!s:.200})'
        said = f'cannot be read as {said}: it is damaged, cut off or not a checkpoint'
        said = f'{said}. {AGAIN}. {WAY_OUT}'
    finally:
        try:
            os.write(sender, said.encode('utf-8', 'backslashreplace')[:4000])
        finally:
            os._exit(0)


def _limit(kind: int, most: int) -> None:
    with suppress(ValueError):  # the system's own limit is lower
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def _limit_memory(nbytes: int) -> None:
    """Limits the memory of this process to what it has now, :data:`ROOM` and so many bytes."""
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + ROOM + nbytes)


# --- Formats --------------------------------------------------------------------------------------


def _load(path: str, size: int, map_location: Any, forked: bool = False) -> tuple[Any, Any]:
    """What a zip archive or pickles hold; the archive, if it has CRCs.

    The forked process limits its memory here, and maps the tensors of an archive.
    """
    module, options = _PickleModule(), dict(weights_only=False, **PYTHON_2)
    with open(path, 'rb') as file:
        if file.read(2) == b'PK':
            archive, root = _archive(file, size)
            module.parts = {i.filename[len(root) :]: i.file_size for i in archive.infolist()}
            with_crcs = any(info.CRC for info in archive.infolist())
            if forked:
                _limit_memory(size + 2 * module.parts['data.pkl'])
            if forked and with_crcs:
                archive.read(f'{root}data.pkl')  # checks its CRC
            result = module.value(torch.load(path, map_location, module, mmap=forked, **options))
            return result, archive if with_crcs else None
        if forked:
            _limit_memory(2 * size)
        file.seek(0)
        first = module.load(file, **PYTHON_2)
        if type(first) is int and first == torch.serialization.MAGIC_NUMBER:
            need(not tarfile.is_tarfile(path), f"PyTorch's first format, a tar archive. {WAY_OUT}")
            file.seek(0)
            result = module.value(torch.load(file, map_location, module, **options))
            need(sorted(module.last) == sorted(module.claims), 'other storages than it lists')
        else:
            result = module.value(first)
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
        from safetensors.torch import load_file

        tensors = load_file(path)
    except ImportError:
        what = 'is a safetensors file, and the library that reads them is not installed'
        raise CheckpointError(f'{what}: `pip install safetensors`') from None
    except Exception as error:
        raise CheckpointError(f'is no whole safetensors file ({error!s:.300}). {AGAIN}') from None
    restore = torch.serialization._get_restore_location(map_location)
    for name, mapped in tensors.items():
        storage: Any = restore(mapped.clone().untyped_storage(), 'cpu')  # the file may change
        storage = TypedStorage(wrap_storage=storage, dtype=mapped.dtype, _internal=True)
        tensors[name] = _tensor(storage, 0, mapped.shape, mapped.stride())
    return tensors


def _archive(file: BinaryIO, size: int) -> tuple[zipfile.ZipFile, str]:
    """A zip archive of which any reader sees the same parts, and the folder that they lie in."""
    archive = zipfile.ZipFile(file.name)
    infos, names = archive.infolist(), archive.namelist()
    roots = [name[:-8] for name in names if name.endswith('/data.pkl')] or ['']
    # Where its list begins, for files of 4 GiB; where that is said; and for smaller files.
    end = os.pread(file.fileno(), 98, max(0, size - 98)).rjust(98)
    start, is_long, where, is_end, short = struct.unpack('<48xQ4s4xQ4x4s12xI2x', end)
    start, where = (start, where) if is_long == b'PK\6\7' else (short, size - 98)
    for fault, is_so in {
        'parts that are compressed or encrypted, of which a small file could fill the memory':
            any(info.flag_bits & 1 or info.compress_type for info in infos),
        'something before its beginning or behind its end':
            is_end != b'PK\5\6' or archive.comment or min(info.header_offset for info in infos)
            or (start, where) != (archive.start_dir, size - 98),
        'two accounts of a part': len({name.lower() for name in names}) < len(names)
            or names != [i.orig_filename for i in infos] or sum(i.file_size for i in infos) > size,
        'not one data.pkl, in the folder of all the rest':
            len(roots) > 1 or not roots[0] or not all(n.startswith(roots[0]) for n in names),
        'a program: it is a TorchScript archive': f'{roots[0]}constants.pkl' in names,
    }.items():  # fmt: skip
        if is_so:
            what = 'is a zip archive, but none that torch.save has written'
            raise CheckpointError(f'{what}: it has {fault}. {WAY_OUT}')
    return archive, roots[0]


# --- Pickles --------------------------------------------------------------------------------------


class Form:
    """What a pickle does with a name: the call, the state, the items; and the value made of it."""

    __slots__ = ('args', 'items', 'made', 'state')
    items: list[tuple[Any, Any]]

    def __new__(cls, *args: Any) -> Any:
        self: Any = object.__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = None if state is self else state  # addict's dicts are their own state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))


class Reconstructor(Form):
    """By which the protocols 0 and 1 make objects: of a class, its base, and that base's value."""

    def __new__(cls, kind: Any, base: Any, value: Any) -> Any:
        return kind(*(() if base is object else (value,)))


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
        known = _dict if name in _DICTS else None
        make = _FORMS[label] if label in _FORMS else known or _enumeration(module, name)
        return type(name, (Form,), {'label': label, 'make': staticmethod(make), '__slots__': ()})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'persistent_load':  # which PyTorch sets
            load, value = value, lambda pid: self.module.load_storage(pid, load)
        super().__setattr__(name, value)


def _enumeration(module: str, name: str) -> Callable[[Any], Any]:
    """Finds the members of an enumeration that this process has: nothing is imported for it."""
    found: Any = sys.modules.get(module)
    for part in name.split('.'):
        found = getattr(found, '__dict__', {}).get(part)
    if isinstance(found, type) and issubclass(found, enum.Enum):
        members = list(found)
        return lambda value: next((each for each in members if each.value == value), value)
    what = f'names {module:.100}.{name:.100}, which is neither a dense tensor nor a plain container'
    raise CheckpointError(f'{what}: what else a file names could run code. {WAY_OUT}')


class _PickleModule:
    """What ``torch.load`` takes for the module pickle, and makes values of what it gives."""

    __name__ = 'pickle'

    def __init__(self) -> None:
        self.parts: dict[str, int] | None = None  # the sizes of a zip archive's, by name
        self.claims: dict[str, tuple] = {}
        self.names: set[str] = set()
        self.last: Any = None
        self.left = ROOM
        self.Unpickler = type('Checked', (Unpickler,), {'module': self})

    def load(self, file: BinaryIO, **options: Any) -> Any:
        """Reads one pickle."""
        self.last = self.Unpickler(file, **options).load()
        return self.last

    def load_storage(self, pid: Any, load: Callable[[Any], Any]) -> Any:
        """Reads a storage that the file has, by PyTorch's own function."""
        what, kind, key, location, numel, *view = pid
        need(what == 'storage' and location != 'meta', f'a storage without numbers ({show(pid)})')
        kind = torch.UntypedStorage if isinstance(kind, type) else kind
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        same = self.claims.setdefault(key, (dtype, numel)) == (dtype, numel)
        need(same, f'tensors of two types or sizes in the storage {show(key)}')
        if self.parts is not None and self.parts.get(f'data/{key}') != numel * dtype.itemsize:
            what = f'claims {show(numel)} elements of {dtype} for the storage {show(key)}, of which'
            held = self.parts.get(f'data/{key}', 'no')
            raise CheckpointError(f'{what} the file has {held} bytes. {AGAIN}')
        return load(('storage', kind, key, location, numel, *view))

    def value(self, obj: Any) -> Any:
        """The value of what was unpickled, inner ones first, containers in place.

        What is in several containers is seen in each: one that unfolds without end takes too long.
        """
        kind = type(obj)
        if kind in (dict, OrderedDict, defaultdict, Counter):
            own = self.value(vars(obj)) if kind is OrderedDict else {}
            shadows = any(hasattr(OrderedDict, str(key)) for key in own)
            need(not shadows, 'an OrderedDict whose attributes are not its own')
            if isinstance(obj.get('anneal_func'), Form):
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
        elif kind is argparse.Namespace:
            self.value(vars(obj))
        elif isinstance(obj, (type, TypedStorage)):
            what = f'a piece of a HistoryBuffer or of numpy data outside of one ({show(obj)})'
            need(kind is type and obj in _TYPES, what)
        elif issubclass(kind, Form):
            args = [a if isinstance(a, (type, TypedStorage)) else self.value(a) for a in obj.args]
            state, items = self.value(obj.state), self.value(obj.items)
            if not hasattr(obj, 'made'):
                obj.made = self.made(obj, args, state, items)
            return obj.made
        return obj

    def made(self, form: Any, args: list, state: Any, items: list) -> Any:
        """The value of a form, by the closed table."""
        given = ({} if state is None else {'state': state}) | ({'items': items} if items else {})
        try:
            value = form.make(*args, **given)
        except (TypeError, KeyError, AttributeError) as error:
            what = f'{form.label}{show(tuple(args))}, which gives no value ({error!s:.100})'
            raise CheckpointError(f'calls {what}. {WAY_OUT}') from None
        if isinstance(value, Tensor):  # an expanded one is more than it is made of
            self.left -= max(0, value.numel() * value.itemsize - value.untyped_storage().nbytes())
            if self.left < 0:
                raise CheckpointError(TOO_LARGE)
        return value


# --- What the names in a file stand for -----------------------------------------------------------


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


def _encode(text: Any = b'', encoding: Any = 'latin1') -> bytes:
    """By which the protocols 0 to 2 write bytes."""
    encoding = {'latin1': 'latin1', 'latin-1': 'latin1'}[encoding]
    return text.encode(encoding) if type(text) is str else bytes(text)


def _numpy_dtype(code: Any, *flags: Any, state: Any = (3, '=', None, None, None)) -> np.dtype:
    """A dtype by its code: a crafted state of numpy's own can crash the process."""
    # (version, byte order, subarray, names, fields, item size, alignment, flags, unit of time)
    order, nested, unit = state[1], state[2:5], state[8:] and state[8][-1]
    plain = type(code) is str and re.fullmatch(r'[biufcmMSUO]\d{0,9}', code)
    plain = plain and order in ('<', '>', '|', '=') and nested == (None, None, None)
    need(plain, f'numpy data of type {show(code)}, which is not plain')
    timed = unit and unit[0] != b'generic'
    return np.dtype(f'{order}{code}[{unit[1]:d}{unit[0].decode()}]' if timed else order + code)


def _array(shape: Any, dtype: Any, fortran: Any, raw: Any) -> np.ndarray:
    """An array of bytes, or of a list of values."""
    raw = raw.encode(**PYTHON_2) if type(raw) is str else raw
    kind, each = (list, 1) if dtype.hasobject else (bytes, dtype.itemsize)
    fits = type(raw) is kind and math.prod(shape) * each == len(raw)
    need(fits, f'a numpy array of {len(raw)} bytes that claims the shape {show(shape)}')
    order: Any = 'F' if fortran else 'C'
    if kind is list:
        return np.fromiter(raw, dtype).reshape(shape, order=order)
    return np.ndarray(shape, dtype, bytearray(raw), order=order)


def history_buffer(logs: Any, counts: Any, max_length: Any) -> HistoryBuffer:
    """A HistoryBuffer of these arrays, if it can be one."""
    shapes = [getattr(array, 'shape', None) for array in (logs, counts)]
    plain = type(logs) is type(counts) is np.ndarray and shapes == [(len(logs),)] * 2
    plain = plain and type(max_length) is int and len(logs) <= max_length
    what = f'a HistoryBuffer with logs of shape {shapes[0]}, counts of shape {shapes[1]}'
    need(plain, f'{what} and max_length {show(max_length)}')
    return HistoryBuffer(logs, counts, max_length)


def _dict(*args: Any, state: Any = (), items: Any = ()) -> dict:
    """A dict of a dict or pairs; its state may hold the items once more."""
    attributes = {key: state[key] for key in state if not str(key).startswith('_')}
    return {**attributes, **dict(*args[-1:]), **dict(items)}


_TYPES = (bool, int, float, complex, str, bytes, list, dict, tuple, set, frozenset, object)
_TORCH = (torch.device, torch.Size)
_DICTS = ('AttrDict', 'AttributeDict', 'Box', 'CfgNode', 'ConfigDict', 'Dict', 'EasyDict', 'Munch')
"""Whatever package they are from: addict, MMEngine, yacs, Lightning, or a copy of its own."""
_AS_IS: dict[str, Any] = {
    **{f'{kind.__module__}.{kind.__name__}': kind
       for kind in (*_TYPES, *_TORCH, OrderedDict, defaultdict, deque, range)},
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    'copyreg._reconstructor': Reconstructor,
    'torch.torch_version.TorchVersion': str,
}  # fmt: skip
"""Types that nobody can change and whose calls only make a value."""
_LOG = 'mmengine.logging.history_buffer.HistoryBuffer'
_METHODS = {(_LOG, name): name for name in ('min', 'max', 'current', 'mean')}
_FORMS: dict[str, Any] = {
    '_codecs.encode': _encode,
    'argparse.Namespace': lambda state=(): argparse.Namespace(**dict(state)),
    'builtins.bytearray': lambda *args: bytearray(_encode(*args)),
    'builtins.getattr': lambda owner, name: _METHODS[owner.label, name],
    'builtins.slice': slice,
    'collections.Counter': lambda *args: Counter(*args),
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
    'torch._utils._rebuild_parameter':
        lambda data, requires_grad=True, hooks=None: nn.Parameter(data, requires_grad),
    **dict.fromkeys((f'torch._utils._rebuild_tensor{v}' for v in ('', '_v2', '_v3')), _tensor),
    'torch.serialization._get_layout': torch.serialization._get_layout,
    'types.SimpleNamespace': lambda state=(): argparse.Namespace(**dict(state)),
    # Only named: as what is made, as what has a method, as a storage's type.
    **dict.fromkeys(('numpy.ndarray', 'torch.UntypedStorage', 'torch.storage.UntypedStorage',
                     'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler')),
}  # fmt: skip
"""What makes a value of a call's arguments, and of a state and items where it takes them."""
