"""Unpickles the checkpoint on stdin in a process of its own, and writes what it holds to stdout.

No name in the file is looked up: Python's own unpickler, which knows every protocol, gets a
:class:`Form` for each, which notes what it is called with; :mod:`.safe_reader` makes values of the
forms by its closed table. What a pickle can do besides (fill the memory, never end, overflow the
stack) ends this process. It needs the standard library alone, so it starts within 50 ms, where one
that imports torch takes 2 s; and unlike a fork it is safe beside threads and CUDA. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import resource
import signal
import struct
import sys
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

WAY_OUT = (
    'Ask its author for a file with tensors only, or re-save it where it was trained: '
    'torch.save(model.state_dict(), path)'
)
AGAIN = 'Download or copy it again'
ROOM = 160 * 2**20
"""Bytes that the values in a file may take beyond twice its pickle (tensors are not among them)."""
MAX_DEPTH, MAX_VALUES = 200, 10_000_000
REFUSED, MAGIC = 3, 0x1950A86A20F9469CFC6C  # the exit status; the beginning of torch's old format
MANY = 'lists in lists that are more than'
TOO_LARGE = 'would take far more memory than a checkpoint of its size does, so it is refused'


class CheckpointError(ValueError):
    """A checkpoint is refused, damaged or not to be had: the message says which, and what to do."""


def need(condition: Any, what: str) -> None:
    """Refuses a file for what it holds."""
    if not condition:
        raise CheckpointError(f'holds {what}')


def damaged(what: str) -> NoReturn:
    """Refuses a file that cannot be whole."""
    raise CheckpointError(f'is damaged or forged: {what}. {AGAIN}')


PIECES: list[str] = []
"""What lies outside of the form that it belongs to."""


class Form:
    """A name in the file with what would be done to it: the call, the state, the items."""

    __slots__ = ('args', 'items', 'state')
    label = ''
    args: Any
    items: list

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
    """Python's own; every name is a subclass of :class:`Form`, every storage is one."""

    names: dict[str, type] = {}
    storages: dict[str, tuple] = {}
    storage = type('Form', (Form,), {'label': 'storage', '__slots__': ()})

    def find_class(self, module: str, name: str) -> Any:
        # Python 2's names, which the protocols 0 to 2 write.
        module, name = NAME_MAPPING.get((module, name), (module, name))
        label = f'{IMPORT_MAPPING.get(module, module)}.{name}'
        if label not in self.names:
            self.names[label] = type('Form', (Form,), {'label': label, '__slots__': ()})
        return self.names[label]

    def persistent_load(self, pid: Any) -> Any:
        plain = type(pid) is tuple and len(pid) in (5, 6) and pid[0] == 'storage'
        need(plain and type(pid[2]) is str, 'a reference to what is no storage')
        need(pid[5:] in ((), (None,)), f'a view of a storage, as old PyTorch wrote. {WAY_OUT}')
        _, kind, key, location, numel = pid[:5]
        numel = numel if type(numel) is int else -1
        held = getattr(kind, 'label', None), location, numel
        if self.storages.setdefault(key, held) != held:
            raise CheckpointError(f'holds tensors of two types or sizes in the storage {key:.60}')
        return self.storage(key)


class Pickler(pickle.Pickler):
    """Writes forms as calls of :func:`make`."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Form):
            return make, (obj.label, obj.args, obj.state, obj.items)
        return (make, (obj.label,)) if hasattr(obj, 'label') else NotImplemented


def make(*form: Any) -> NoReturn:
    """Stands for a method of ``safe_reader`` in what this process writes."""
    raise NotImplementedError


def _children(obj: Any) -> Iterator[Any]:
    if isinstance(obj, Form):
        yield from (obj.args, obj.state, obj.items)
    else:
        yield from obj.values() if type(obj) is dict else obj
        yield from (key for key in obj if type(key) is tuple) if type(obj) is dict else ()


def check_form(obj: Any, counts: dict[int, int | None], depth: int = 0, part: bool = False) -> int:
    """How many values an object holds where each shared container counts as often as it appears.

    Args:
        obj: what was unpickled.
        counts: of the containers seen so far, by their id; None: one that is not done with.
        depth: how many containers it lies in.
        part: whether it lies in a form.
    """
    label = getattr(obj, 'label', '')
    piece = isinstance(obj, type) and not re.fullmatch(r'(torch|builtins)\.\w+', label)
    if not part and (piece or label in ('storage', 'builtins.getattr', 'numpy.dtype')):
        PIECES.append(label)
    if not isinstance(obj, (dict, list, tuple, set, frozenset, Form)):
        return 1
    if id(obj) in counts:
        count = counts[id(obj)]
        need(count, 'a container that contains itself')
        return count or 0
    need(depth <= MAX_DEPTH, f'containers that are nested deeper than {MAX_DEPTH}')
    if isinstance(obj, dict | set | frozenset):
        few = len(obj) > 500 and 2 * len({hash(key) for key in obj}) < len(obj)
        need(not few, 'a dict or set whose keys have one hash, which would take for ever')
    if type(obj) is dict and isinstance(obj.get('anneal_func'), Form):
        del obj['anneal_func']  # a method of MMEngine's OneCycleLR, which has it itself
    counts[id(obj)], count = None, 1
    for value in _children(obj):
        count += check_form(value, counts, depth + 1, part or isinstance(obj, Form))
        need(count <= MAX_VALUES, f'{MANY} {MAX_VALUES} values when written out')
    counts[id(obj)] = count
    return count


# --- What holds the pickle ------------------------------------------------------------------------


def _check_crc(file: BinaryIO, name: str, begin: int, size: int, wanted: int) -> None:
    file.seek(begin)
    crc, buffer = 0, memoryview(bytearray(2**20))
    while size and (count := file.readinto(buffer[: min(size, 2**20)])):  # type: ignore[attr-defined]
        crc, size = zlib.crc32(buffer[:count], crc), size - count
    if crc != wanted:
        damaged(f'the CRC of {name[:80]} does not fit')


def _zip_parts(file: BinaryIO, size: int) -> dict[str, tuple[int, int, int]]:
    """Where each part of an archive begins, its size and CRC; other readers see the same parts."""
    archive = zipfile.ZipFile(file)
    file.seek(size - 22)
    if file.read(4) != b'PK\5\6' or archive.comment:
        damaged('a zip archive with something behind its end')
    parts: dict[str, tuple[int, int, int]] = {}
    reached = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name, start = info.orig_filename, info.header_offset
        if info.flag_bits & 1 or info.compress_type or info.compress_size != info.file_size:
            raise CheckpointError(
                f'is a zip archive whose part {name[:80]!a} is compressed or encrypted, which '
                f'torch.save never does: a small file could fill the memory. {WAY_OUT}'
            )
        file.seek(start)
        mark, length, extra = struct.unpack('<4s22xHH', file.read(30))
        coding = 'utf-8' if info.flag_bits & 0x800 else 'cp437'
        if mark != b'PK\3\4' or file.read(length) != name.encode(coding) or name in parts:
            damaged(f'a zip archive with two accounts of {name[:80]!a}')
        begin = start + 30 + length + extra
        if start < reached or start and not parts or begin + info.file_size > archive.start_dir:
            damaged(f'a zip archive with parts that are elsewhere or overlap ({name[:80]!a})')
        reached = begin + info.file_size
        parts[name] = begin, info.file_size, info.CRC
    return parts


def _read_zip(file: BinaryIO, size: int, send: Callable) -> None:
    parts = _zip_parts(file, size)
    roots = [name.removesuffix('data.pkl') for name in parts if name.endswith('/data.pkl')]
    if len(roots) != 1 or not all(name.startswith(roots[0]) for name in parts):
        raise CheckpointError(
            'is a zip archive, but none that torch.save has written: it has not one data.pkl, in '
            f'the folder of all the rest. {WAY_OUT}'
        )
    root = roots[0]
    if f'{root}constants.pkl' in parts:
        raise CheckpointError(f'is a TorchScript archive, which is a program. {WAY_OUT}')
    begin, length, _ = parts.get(f'{root}byteorder', (0, 0, 0))
    file.seek(begin)
    if length and file.read(min(length, 7)) != b'little':
        raise CheckpointError(f'was written on a big-endian machine. {WAY_OUT}')
    checked = any(crc for *_, crc in parts.values())  # torch can write without
    begin, length, crc = parts[f'{root}data.pkl']
    if checked:
        _check_crc(file, f'{root}data.pkl', begin, length, crc)
    limit_memory(length)
    file.seek(begin)
    result = Unpickler(file).load()
    if file.tell() > begin + length:
        damaged('its pickle has no end')
    used = {key: parts.pop(f'{root}data/{key}', None) for key in Unpickler.storages}
    for name, (begin, length, crc) in parts.items() if checked else ():
        _check_crc(file, name, begin, length, crc)
    send(
        result, {k: part and (*part[:2], part[2] if checked else None) for k, part in used.items()}
    )


def _read_pickles(file: BinaryIO, size: int, send: Callable) -> None:
    """PyTorch's format before 1.6 (pickles, then the storages), or the one pickle of another's."""
    limit_memory(size)
    first = Unpickler(file, encoding='latin1').load()
    if type(first) is not int or first != MAGIC:
        arrays = any(name.endswith(('_reconstruct', '_frombuffer')) for name in Unpickler.names)
        if file.tell() != size or not arrays:
            raise CheckpointError(
                'cannot be read as tensors: it is a pickle, but none that torch.save has written, '
                f'and without arrays. {WAY_OUT}'
            )
        return send(first, {})
    version, system, result, keys = (Unpickler(file).load() for _ in range(4))
    if version != 1001 or type(system) is not dict or system.get('little_endian') is not True:
        raise CheckpointError(f'is of an unknown version or a big-endian machine. {WAY_OUT}')
    if type(keys) is not list or sorted(keys) != sorted(Unpickler.storages):
        damaged('its list of storages is another one')
    return send(result, [file.tell(), keys])


# --- This process ---------------------------------------------------------------------------------


def limit_memory(pickled: int, own: int = 0) -> None:
    """The address space: what the interpreter takes itself, ROOM, and twice the pickle."""
    limit_memory.own = own = own or limit_memory.own  # type: ignore[attr-defined]
    limit = own + ROOM + 2 * pickled
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main(parent: int) -> None:
    """Reads the file that is open as stdin; refuses it by a sentence on stderr."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    file = open('/proc/self/fd/0', 'rb')  # noqa: SIM115 (a position of its own)
    size = os.fstat(0).st_size
    seconds = 5 + size // 2**25
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    signal.alarm(120 + size // 2**20)  # by the clock, for a disk that never answers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open('/proc/self/statm') as memory:
        limit_memory(0, int(memory.read().split()[0]) * resource.getpagesize())

    def send(result: Any, places: Any = None) -> None:
        check_form(result, {})
        with open(1, 'wb', closefd=False) as out:
            Pickler(out, 5).dump((list(Unpickler.names), Unpickler.storages, places, PIECES[:1]))
            Pickler(out, 5).dump(result)

    try:
        read = _read_zip if file.read(2) == b'PK' else _read_pickles
        file.seek(0)
        if os.getppid() == parent:
            return read(file, size, send)
        said = 'is read by nobody'
    except MemoryError:
        said = TOO_LARGE
    except Exception as error:  # a damaged file can be wrong in any way
        PIECES.clear()
        send(None)  # the names in the file may say more
        said = str(error)
        if not isinstance(error, CheckpointError):
            said = f'cannot be read as tensors ({type(error).__name__}: {error!s:.200}): '
            said += f'it is damaged, cut off or not a checkpoint. {WAY_OUT}'
    os.write(2, said.encode('utf-8', 'backslashreplace')[:4000])
    os._exit(REFUSED)


if __name__ == '__main__':
    main(int(sys.argv[1]))
