"""Checkpoints that want something: files of every kind that a reader has to refuse.

Each leaves its mark, were it run, by making the file ``marker``; nothing else is done by any.
"""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from mmkd.io.checkpoint import CheckpointError, read_checkpoint

TAG = '__mmkd__'


@dataclass(frozen=True)
class Hostile:
    """One file.

    Attributes:
        kind: of attack: code, container, text, bomb, memory, integrity.
        reason: what the refusal has to say, a regular expression.
        make: the file's bytes, for the path of a marker.
        file: its name.
    """

    kind: str
    reason: str
    make: Callable[[str], bytes]
    file: str = 'x.pth'


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


# --- tools ----------------------------------------------------------------------------------------


def saved(value, **kwargs) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file, **kwargs)
    return file.getvalue()


def parts_of(data: bytes) -> dict[str, bytes]:
    """A checkpoint's parts by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts, method=zipfile.ZIP_STORED, comment=b'') -> bytes:
    """A zip archive of parts, in pairs or by name."""
    file = io.BytesIO()
    pairs = parts.items() if isinstance(parts, dict) else parts
    with zipfile.ZipFile(file, 'w', method) as archive:
        archive.comment = comment
        for name, content in pairs:
            archive.writestr(name, content)
    return file.getvalue()


def checkpoint(program: bytes, **records: bytes) -> bytes:
    """A checkpoint of a raw pickle and storages."""
    parts = {'archive/data.pkl': b'\x80\x02' + program + b'.', 'archive/byteorder': b'little'}
    parts['archive/version'] = b'3'
    parts |= {f'archive/data/{key.removeprefix("s")}': value for key, value in records.items()}
    return zipped(parts)


def name(dotted: str) -> bytes:
    """The instruction that names something."""
    module, _, attribute = dotted.rpartition('.')
    return f'c{module}\n{attribute}\n'.encode()


def text(value: str) -> bytes:
    """The instruction for a string."""
    raw = value.encode()
    return b'X' + struct.pack('<I', len(raw)) + raw


def number(value: int) -> bytes:
    """The instruction for an integer."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8a' + bytes([len(raw)]) + raw


def call(dotted: str, *arguments: bytes) -> bytes:
    """The instructions of a call."""
    return name(dotted) + b'(' + b''.join(arguments) + b'tR'


def item(key: bytes, value: bytes) -> bytes:
    """A dict of one item."""
    return b'}' + key + value + b's'


def x(value: bytes) -> bytes:
    """``{'x': value}``."""
    return item(text('x'), value)


def storage(key: str = '0', numel: int = 4, kind: str = 'Float', location: str = 'cpu') -> bytes:
    """The instructions that refer to a storage."""
    kind_ = name(f'torch.{kind}Storage')
    return b'(' + text('storage') + kind_ + text(key) + text(location) + number(numel) + b'tQ'


def numbers(*values: int) -> bytes:
    """A tuple of integers."""
    return b'(' + b''.join(map(number, values)) + b't'


def tensor(offset=0, shape=(4,), stride=(1,), of=None, hooks=b'ccollections\nOrderedDict\n)R'):
    """The instructions of a tensor."""
    of = storage() if of is None else of
    shape, stride = (v if isinstance(v, bytes) else numbers(*v) for v in (shape, stride))
    return call(
        'torch._utils._rebuild_tensor_v2', of, number(offset), shape, stride, b'\x89', hooks
    )


FOUR = b'\0' * 16


def laughs(levels: int = 60) -> bytes:
    """A tuple of two of the same tuple, 60 times: 2 to the 60 when written out."""
    program = b')q\0'
    for _ in range(levels):
        program += b'h\0h\0\x86q\0'
    return b'(' + program + b't'


def legacy(value, system=None, keys=None) -> bytes:
    """PyTorch's format before 1.6, of anything."""
    values = [0x1950A86A20F9469CFC6C, 1001, system or {'little_endian': True}, value, keys or []]
    return b''.join(pickle.dumps(v, 2) for v in values)


def safetensors(header: dict | bytes, data: bytes = b'', length: int | None = None) -> bytes:
    """A safetensors file."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(raw) if length is None else length) + raw + data


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    """With one bit the other way round."""
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def weights() -> dict:
    """A small state dict."""
    generator = torch.Generator().manual_seed(0)
    return {'state_dict': OrderedDict(w=torch.randn(4, 3, generator=generator), b=torch.zeros(4))}


def _code(value: Callable, reason: str, **kwargs) -> Hostile:
    return Hostile('code', reason, lambda m: saved({'state_dict': {}, 'x': value(m)}, **kwargs))


def _touch(marker: str) -> str:
    return f'open({marker!r}, "w")'


def _raw(kind: str, reason: str, program, **records: bytes) -> Hostile:
    program = program if callable(program) else partial(lambda value, m: value, program)
    return Hostile(kind, reason, lambda m: checkpoint(program(m), **records))


def _file(kind: str, reason: str, make, file: str = 'x.pth') -> Hostile:
    return Hostile(kind, reason, make if callable(make) else lambda m: make, file)


# --- code -----------------------------------------------------------------------------------------

_NAMES_CODE = r'names \S+, which is neither'
CODE = {
    'what a terminal obeys': Hostile(
        'code', r'names \\x1b\]0;loaded\\x07\.fine,',
        lambda m: checkpoint(x(b'c\x1b]0;loaded\x07\nfine\n)R')),
    ),
    'os.system': _code(lambda m: Calls(os.system, f'touch {m}'), r'names \w+\.system,'),
    'os.system, old format': _code(
        lambda m: Calls(os.system, f'touch {m}'),
        r'names \w+\.system,',
        _use_new_zipfile_serialization=False,
    ),
    'eval': _code(lambda m: Calls(eval, _touch(m)), r'names builtins\.eval,'),
    'exec': _code(lambda m: Calls(exec, _touch(m)), r'names builtins\.exec,'),
    'Popen': _code(lambda m: Calls(subprocess.Popen, ['touch', m]), r'names \w+\.Popen,'),
    'partial': _code(lambda m: Calls(partial, eval, _touch(m)), r'names functools\.partial,'),
    'getattr of a class': _code(
        lambda m: Calls(getattr, HistoryBuffer, '__init__'), r"getattr\(HistoryBuffer, '__init__'\)"
    ),
    'getattr to globals': _code(
        lambda m: Calls(getattr, Calls(getattr, HistoryBuffer, 'mean'), '__globals__'),
        r"getattr\('mean', '__globals__'\)",
    ),
    'getattr of text': _code(lambda m: Calls(getattr, 'x', 'format'), r"getattr\('x', 'format'\)"),
    'methods of the log': _code(
        lambda m: Calls(HistoryBuffer, state={'statistics_methods': {'mean': getattr}}),
        r'a piece of a HistoryBuffer',
    ),
    'array of objects': _code(
        lambda m: np.array([Calls(eval, _touch(m))], dtype=object), _NAMES_CODE
    ),
    'structured dtype': _code(lambda m: np.dtype([('a', 'f8')]), r"numpy data of type 'V8'"),
    'pickle in bytes': _raw(
        'code', r'names torch\.storage\._load_from_bytes', x(call('torch.storage._load_from_bytes'))
    ),
    'import': _raw('code', _NAMES_CODE, lambda m: x(call('builtins.__import__', text('os')))),
    'torch.load': _raw('code', _NAMES_CODE, lambda m: x(call('torch.serialization.load', text(m)))),
    'torch.jit.load': _raw('code', _NAMES_CODE, lambda m: x(call('torch.jit.load', text(m)))),
    'torch.hub': _raw('code', _NAMES_CODE, lambda m: x(call('torch.hub.load', text(m)))),
    'numpy.load': _raw('code', _NAMES_CODE, lambda m: x(call('numpy.load', text(m)))),
    'runpy': _raw('code', _NAMES_CODE, lambda m: x(call('runpy.run_path', text(m)))),
    'marshal': _raw('code', _NAMES_CODE, lambda m: x(call('marshal.loads', text(m)))),
    'attrgetter': _raw('code', _NAMES_CODE, x(call('operator.attrgetter', text('system')))),
    'a config': _raw(
        'code', _NAMES_CODE, lambda m: x(call('mmengine.config.Config.fromstring', text(_touch(m))))
    ),
    'a registry': _raw('code', _NAMES_CODE, x(call('mmengine.registry.MODELS.build', b'}'))),
    'dotted name': _raw('code', _NAMES_CODE, x(b'ccollections\nOrderedDict.fromkeys\n)R')),
    'name with spaces': _raw('code', r'names os \.system,', x(b'cos \nsystem\n)R')),
    'reconstructor': _raw('code', r'missing 2 required', x(call('copyreg._reconstructor', b'}'))),
    'instance': _raw('code', _NAMES_CODE, lambda m: b'(' + text(m) + b'ios\nsystem\n'),
    'object': _raw('code', _NAMES_CODE, lambda m: b'(' + name('os.system') + text(m) + b'o'),
    'new with keywords': _raw('code', r'one Size', name('torch.Size') + b')}\x92'),
    'name from the stack': _raw('code', _NAMES_CODE, text('os') + text('system') + b'\x93'),
    'extension registry': _raw('code', r'unregistered extension', b'\x82\x01'),
    'call of what a call gave': _raw(
        'code', r'is not callable', b'ccollections\nOrderedDict\n)R)R'
    ),
    'call of a tensor': _raw('code', r'is not callable', tensor() + b')R', s0=FOUR),
    'call of text': _raw('code', r'is not callable', text('system') + b')R'),
    'new of a class': _raw(
        'code', _NAMES_CODE, name('subprocess.Popen') + b')\x81'
    ),
    'state of a tensor': _raw(
        'code', r"rebuild_tensor_v2\(.* unexpected .* 'state'", tensor() + b'}b', s0=FOUR
    ),
    'attributes of a dict': _raw(
        'code',
        r'OrderedDict whose attributes are not its own',
        b'ccollections\nOrderedDict\n)R' + item(text('items'), b'N') + b'b',
    ),
    'hooks of a tensor': _raw(
        'code', r'with hooks', x(tensor(hooks=item(b'K\1', text('eval')))), s0=FOUR
    ),
    'loose class': _code(lambda m: HistoryBuffer, r'a piece of a HistoryBuffer'),
    'loose function': _raw('code', r'a piece of', x(name('torch._utils._rebuild_tensor_v2'))),
    'codec': _raw('code', r'codecs\.encode\(', x(call('_codecs.encode', text('x'), text('rot13')))),
    'in the system record': Hostile(
        'code', r'names \w+\.system,', lambda m: legacy({}, {'x': Calls(os.system, f'touch {m}')})
    ),
    'in the list of storages': Hostile(
        'code', r'names \w+\.system,', lambda m: legacy({}, None, [Calls(os.system, f'touch {m}')])
    ),
    'whole model': _code(lambda m: torch.nn.Linear(1, 1), r'names torch\.nn\.modules\.linear'),
}  # fmt: skip


# --- containers -----------------------------------------------------------------------------------


def _tar(marker: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        for part in ('storages', 'tensors', 'pickle'):
            data = pickle.dumps(Calls(os.system, f'touch {marker}'), 2)
            info = tarfile.TarInfo(part)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _tar_and_pickle(marker: str) -> bytes:
    """A tar archive that begins as the pickles of the older format do."""
    file = io.BytesIO()
    with tarfile.open(None, 'w', file, format=tarfile.GNU_FORMAT, encoding='latin1') as archive:
        archive.addfile(tarfile.TarInfo(pickle.dumps(0x1950A86A20F9469CFC6C, 2).decode('latin1')))
        link = tarfile.TarInfo('storages')
        link.type, link.linkname = tarfile.SYMTYPE, '/dev/zero'
        archive.addfile(link)
    return file.getvalue()


def _npy(marker: str) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Calls(os.system, f'touch {marker}')], dtype=object), allow_pickle=True)
    return file.getvalue()


def _torchscript(marker: str) -> bytes:
    parts = parts_of(saved(weights()))
    return zipped({**parts, 'archive/constants.pkl': b'\x80\x02).', 'archive/code/x.py': b'pass'})


CONTAINERS = {
    'tar': Hostile('container', r'is no PyTorch checkpoint', _tar),
    'tar and pickle': Hostile('container', r'a tar archive', _tar_and_pickle),
    'npy': Hostile('container', r'is no PyTorch checkpoint', _npy),
    'gzip': Hostile(
        'container',
        r'is no PyTorch checkpoint',
        lambda m: gzip.compress(pickle.dumps(Calls(os.system, f'touch {m}'))),
    ),
    'TorchScript': Hostile('container', r'is a TorchScript archive', _torchscript),
    'zip of something': _file('container', r'none that torch\.save', zipped({'a/b': b'c'})),
    'bare pickle': Hostile(
        'container', r'names \w+\.system,',
        lambda m: pickle.dumps(Calls(os.system, f'touch {m}'), 2),
    ),
    'bare pickle of a dict': _file(
        'container', r'none that torch\.save', pickle.dumps({'x': 1}, 2)
    ),
    'text pickle': Hostile(
        'container',
        r'is no PyTorch checkpoint',
        lambda m: pickle.dumps(Calls(os.system, f'touch {m}'), 0),
    ),
    'protocol 4': Hostile(
        'container', _NAMES_CODE, lambda m: saved({'x': Calls(eval, _touch(m))}, pickle_protocol=4)
    ),
    'protocol 5': Hostile(
        'container', _NAMES_CODE, lambda m: saved({'x': Calls(eval, _touch(m))}, pickle_protocol=5)
    ),
    'Python text': Hostile('container', r'is no PyTorch checkpoint', lambda m: _touch(m).encode()),
    'HTML': _file('container', r'is a web page', b'<!DOCTYPE html><html>404</html>'),
    'LFS pointer': _file('container', r'LFS pointer', b'version https://git-lfs.github.com/spec/v1\n'),
    'nothing': _file('container', r'is empty', b''),
}  # fmt: skip


# --- texts that are run later ---------------------------------------------------------------------


def _later(where: str, tagged: bool) -> Callable[[str], bytes]:
    def make(marker: str) -> bytes:
        key = 'config' if where == 'meta' else 'cfg'
        held = {key: _touch(marker), 'epoch': 1, 'iter': 1}
        held = {TAG: 'dict', 'items': list(held.items())} if tagged else held
        other = {'epoch': 1, 'iter': 1}
        parts = {
            'meta': dict(meta=held, message_hub={'runtime_info': other}),
            'runtime_info': dict(meta=other, message_hub={'runtime_info': held}),
            'message_hub': dict(meta=other, message_hub=held),
        }
        return saved({'state_dict': {}, 'optimizer': {}, **parts[where]})

    return make


TEXTS = {
    f'hidden in {where}': Hostile('text', rf'hides its {where}', _later(where, True))
    for where in ('meta', 'message_hub', 'runtime_info')
}
DISARMED = {where: _later(where, False) for where in ('meta', 'runtime_info')}
"""Files that are read, without the text that MMEngine would run."""


# --- bombs ----------------------------------------------------------------------------------------


def _many_parts(marker: str) -> bytes:
    # A list of a million names, each 47 bytes long, of one part.
    local = struct.pack('<4s5H3I2H', b'PK\3\4', 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b'a'
    one = struct.pack('<4s6H3I5H2I', b'PK\1\2', 20, 20, *[0] * 4, 0, 0, 0, 1, *[0] * 6)
    names = (one + b'a') * 1_000_000
    end64 = struct.pack(
        '<4sQHH2I4Q', b'PK\6\6', 44, 20, 20, 0, 0, 10**6, 10**6, len(names), len(local)
    )
    locator = struct.pack('<4sIQI', b'PK\6\7', 0, len(local) + len(names), 1)
    end = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, 65535, 65535, len(names), len(local), 0)
    return local + names + end64 + locator + end


def _overlapping(marker: str) -> bytes:
    """A thousand names for one part."""
    data = zipped({'archive/data.pkl': b'\x80\x02}.', 'archive/data/0': bytes(2**20)})
    end = data.rfind(b'PK\5\6')
    (start,) = struct.unpack('<I', data[end + 16 : end + 20])
    last = data.rfind(b'PK\1\2')
    entries = data[start:end] + data[last:end] * 999
    tail = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, 1001, 1001, len(entries), start, 0)
    return data[:start] + entries + tail


def _copies(program: bytes, each: bytes, count: int = 20000) -> bytes:
    return b'(' + program + each * count + b't'


def _array(length: int) -> bytes:
    dtype = call('numpy.dtype', text('u1'), b'\x89', b'\x88')
    state = b'(K\1' + numbers(length) + dtype + b'\x89h\0t'
    empty = call(
        'numpy._core.multiarray._reconstruct', name('numpy.ndarray'), b'K\0\x85', text('b')
    )
    return empty + state + b'b'


def _history(marker: str) -> bytes:
    raw = call('_codecs.encode', text('a' * 2**20), text('latin1')) + b'q\0'
    state = b'}' + text('_log_history') + b'h\1s' + text('_count_history') + b'h\1s'
    state += text('max_length') + number(2**20) + b's'
    program = raw + _array(2**20) + b'q\1' + state + b'q\2'
    each = name('mmengine.logging.history_buffer.HistoryBuffer') + b')Rh\2b'
    return _copies(program, each, 2000)


def _of_one_hash(count: int) -> list[bytes]:
    """Pairs of numbers whose tuples have one hash: CPython's sum for a tuple, solved for it."""
    high, (first, second, start) = 2**64, (
        11400714785074694791, 14029467366897019727, 2870177450012600261,
    )  # fmt: skip
    pairs: list[tuple[int, int]] = []
    a = 0
    while len(pairs) < count:
        a += 1
        lane = (start + a * second) % high
        lane = ((lane << 31 | lane >> 33) % high) * first % high
        b = (123456789 - lane) * pow(second, -1, high) % high
        b -= high * (b >= 2**63)
        if abs(b) < 2**60 and b != -1:
            pairs.append((a, b))
    assert len({hash(pair) for pair in pairs}) == 1
    return [number(a) + number(b) + b'\x86' for a, b in pairs]


def _set_again(marker: str) -> bytes:
    """A thousand tuples of one hash, made a set over and over."""
    program = b'](' + b''.join(_of_one_hash(1000)) + b'eq\0'
    return checkpoint(x(b'(' + program + (name('builtins.set') + b'h\0\x85R') * 1000 + b't'))


def _additions(marker: str) -> bytes:
    """A zip archive whose parts claim to be beyond 4 GiB, in additions of 16,000 empty ones."""
    local = struct.pack('<4s5H3I2H', b'PK\3\4', 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b'a'
    fields = (20, 20, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, 1, 65532, 0, 0, 0, 0, 0)
    each = struct.pack('<4s6H3I5H2I', b'PK\1\2', *fields) + b'a' + bytes(65532)
    end = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, 600, 600, 600 * len(each), len(local), 0)
    return local + 600 * each + end


BOMBS = {
    'laughs in an OrderedDict as a dtype': _raw(
        'bomb', r'takes longer to read',
        x(call('numpy.dtype', b'ccollections\nOrderedDict\n)R' + text('x') + laughs() + b's')),
    ),
    'a dtype of 60 MB': _raw(
        'bomb', r'numpy data of type b',
        lambda m: x(call('numpy.dtype', call('_codecs.encode', text('a' * 60_000_000)))),
    ),
    'tuples of one hash': _raw(
        'bomb', r'takes longer to read',
        lambda m: b'}(' + b''.join(each + b'N' for each in _of_one_hash(30000)) + b'u',
    ),
    'a set of tuples of one hash': Hostile('bomb', r'takes longer', _set_again),
    'additions to names': Hostile('bomb', r'takes longer to read', _additions),
    'deflated': Hostile(
        'bomb',
        r'parts that are compressed',
        lambda m: zipped(
            {'archive/data.pkl': b'\x80\x02}.', 'archive/data/0': bytes(2**26)},
            zipfile.ZIP_DEFLATED,
        ),
    ),
    'a million parts': Hostile('bomb', r'far more memory', _many_parts),
    'a thousand names of one part': Hostile('bomb', r'two accounts', _overlapping),
    'storage of 64 GiB': _raw(
        'bomb', r'claims 17179869184 elements', x(tensor(of=storage(numel=2**34))), s0=FOUR
    ),
    'storage of more than is there': _raw(
        'bomb', r'of which the file has 16', x(tensor(of=storage(numel=64))), s0=FOUR
    ),
    'expanded tensor': _raw(
        'bomb', r'far more memory', x(tensor(0, (2**20, 2**20), (0, 0))), s0=FOUR
    ),
    'memo': _raw('bomb', r'far more memory', b'}r\xff\xff\xff\xff'),
    'long number': _raw('bomb', r'far more memory|truncated', b'\x8b\xff\xff\xff\x7f'),
    'long text': _raw('bomb', r'far more memory|cut off', b'X\xff\xff\xff\xff'),
    'bytearray': _raw('bomb', r'far more memory|truncated', b'\x96' + b'\xff' * 7 + b'\x7f'),
    'frame': _raw('bomb', r'overflow|truncated', b'\x95' + b'\xff' * 7 + b'\x7f'),
    'lists in lists': _raw('bomb', r'nested too deep', x(b']' * 100000 + b'a' * 99999)),
    'tuples in tuples': _raw('bomb', r'nested too deep', x(b')' + b'\x85' * 100000)),
    'marks': _raw('bomb', r'far more memory|MARK', b'(' * 4_000_000),
    'dicts': _raw('bomb', r'far more memory', b'(' + b'}' * 30_000_000 + b't'),
    'tensors': _raw(
        'bomb', r'far more memory|takes longer',
        _copies(tensor(), tensor(), 200_000), s0=FOUR,
    ),
    'laughs': _raw('bomb', r'takes longer to read', x(laughs())),
    'laughs as a key': _raw('bomb', r'takes longer to read', b'}' + laughs() + b'Ns'),
    'a stack that overflows': _raw(
        'bomb', r'the process that reads it crashed \(SIG', b'})' + b'\x85' * 1_000_000 + b'Ns'
    ),
    'laughs in a set': _raw(
        'bomb', r'takes longer to read', call('builtins.set', b']' + laughs() + b'a')
    ),
    'laughs as a shape': _raw(
        'bomb', r'takes longer|a tensor of shape <tuple>',
        x(tensor(shape=laughs(20), stride=(1,))), s0=FOUR,
    ),
    'laughs as a dtype': _raw('bomb', r'takes longer', x(call('numpy.dtype', laughs()))),
    'list in itself': _raw('bomb', r'contain themselves', x(b']q\0h\0a')),
    'dict in itself': _raw('bomb', r'contain themselves', b'}q\0' + text('x') + b'h\0s'),
    'dict in its attributes': _raw(
        'bomb', r'contain themselves',
        b'ccollections\nOrderedDict\n)Rq\0' + item(text('_metadata'), b'h\0') + b'b',
    ),
    'keys of one hash': _raw(
        'bomb', r'takes longer to read',
        b'}(' + b''.join(number(i * (2**61 - 1)) + b'N' for i in range(1, 30000)) + b'u',
    ),
    'one wide letter': _raw('bomb', r'far more memory', x(text('a' * 60_000_000 + '\U0001f600'))),
    'copies of a dict': _raw(
        'bomb', r'far more memory|takes longer',
        _copies(
            b'}(' + b''.join(text(str(i)) + b'N' for i in range(20000)) + b'uq\0',
            name('collections.Counter') + b'h\0\x85R',
        ),
    ),
    'copies of bytes': _raw(
        'bomb', r'far more memory',
        _copies(
            call('_codecs.encode', text('a' * 10**6)) + b'q\0',
            name('builtins.bytearray') + b'h\0\x85R', 2000,
        ),
    ),
    'texts': _raw(
        'bomb', r'far more memory|holds one tuple',
        _copies(text('\u4e2d' * 10000), text('\u4e2d' * 10000), 2000),
    ),
    'arrays of one text': _raw(
        'bomb', r'far more memory',
        _copies(call('_codecs.encode', text('a' * 10**6)) + b'q\0', _array(10**6), 2000),
    ),
    'logs of one array': Hostile(
        'bomb', r'far more memory', lambda m: checkpoint(_history(m))
    ),
    'header of 50 MB': Hostile(
        'bomb', r'is no PyTorch checkpoint', lambda m: safetensors(b'[' + b'[],' * 2**24 + b'0]'),
        'x.safetensors',
    ),
    'header of 2**63 bytes': _file(
        'bomb', r'is no PyTorch checkpoint', safetensors({}, b'', 2**63), 'x.safetensors'
    ),
    'nested header': _file(
        'bomb', r'no whole safetensors file', safetensors(b'{"a":' + b'[' * 10**6), 'x.safetensors'
    ),
}  # fmt: skip


# --- memory ---------------------------------------------------------------------------------------

OLD = dict(_use_new_zipfile_serialization=False)
_BEYOND = r'lies beyond its storage of 4 elements'
MEMORY = {
    'shape beyond': _raw('memory', _BEYOND, x(tensor(shape=(5,))), s0=FOUR),
    'offset beyond': _raw('memory', _BEYOND, x(tensor(1)), s0=FOUR),
    'stride beyond': _raw('memory', _BEYOND, x(tensor(0, (2,), (4,))), s0=FOUR),
    'negative offset': _raw('memory', r'offset -1', x(tensor(-1)), s0=FOUR),
    'negative stride': _raw('memory', r'a tensor of shape', x(tensor(3, (4,), (-1,))), s0=FOUR),
    'negative shape': _raw('memory', r'a tensor of shape', x(tensor(0, (-4,), (1,))), s0=FOUR),
    'shape that overflows': _raw(
        'memory', r'a tensor of shape', x(tensor(0, (2**62, 4), (0, 1))), s0=FOUR
    ),
    'shape without stride': _raw('memory', r'of shape', x(tensor(0, (4,), ())), s0=FOUR),
    'wider type': _raw(
        'memory', r'of which the file has 16', x(tensor(of=storage(kind='Double'))), s0=FOUR
    ),
    'two types of one storage': _raw(
        'memory', r'two types or sizes',
        b'(' + tensor() + tensor(of=storage(kind='Double')) + b't', s0=FOUR,
    ),
    'bytes as booleans': _raw(
        'memory', r'two types or sizes in the storage',
        b'}' + text('x') + tensor(of=storage(kind='Byte')) + b's'
        + text('y') + tensor(of=storage(kind='Bool')) + b's', s0=b'\7\7\7\7',
    ),
    'untyped booleans': _raw(
        'memory', r'booleans that are neither',
        x(call('torch._utils._rebuild_tensor_v3', storage(kind='Untyped'), b'K\0', numbers(4),
               numbers(1), b'\x89', b'N', name('torch.bool'))), s0=b'\7\7\7\7',
    ),
    'no storage': _raw('memory', r'without storage', x(tensor(of=b'N'))),
    'old storage of 4 TiB': _file(
        'memory', r"can't allocate memory",
        saved(weights(), **OLD).replace(b'K\x0cN', number(2**40) + b'N'),
    ),
    'old storage that is not listed': _file(
        'memory', r'other storages than it lists',
        (old := saved(weights(), **OLD))[: old.rindex(b'\x80\2]')] + pickle.dumps([], 2),
    ),
    'storage that is not there': _raw(
        'memory', r'of which the file has no bytes', x(tensor()), s1=FOUR
    ),
    'storage elsewhere': _raw(
        'memory', r'of which the file has no bytes', x(tensor(of=storage('../../../etc/passwd')))
    ),
    'meta storage': _raw('memory', r'without numbers', x(tensor(of=storage(location='meta')))),
    'loose storage': _raw('memory', r'a piece of', x(storage()), s0=FOUR),
    'bool that is neither': _raw(
        'memory', r'booleans that are neither', x(tensor(of=storage(kind='Bool'))), s0=b'\1\0\7\0'
    ),
    'sparse': _file('memory', r'_rebuild_sparse_tensor', saved({'x': torch.eye(3).to_sparse()})),
    'meta': _file('memory', r'_rebuild_meta_tensor', saved({'x': torch.empty(3, device='meta')})),
    'nested': _raw('memory', r'_rebuild_nested', x(call('torch._utils._rebuild_nested_tensor'))),
    'quantized': _raw('memory', r'_rebuild_qtensor', x(call('torch._utils._rebuild_qtensor'))),
    'subclass': _raw(
        'memory', r'_rebuild_wrapper_subclass', x(call('torch._utils._rebuild_wrapper_subclass'))
    ),
    'array that lies': _raw(
        'memory', r'16 bytes that claims the shape',
        b'}' + text('x') + call('_codecs.encode', text('a' * 16)) + b'q\0s'
        + text('y') + _array(2**40) + b's',
    ),
    'scalar that lies': _code(
        lambda m: Calls(np.float64(1).__reduce__()[0], np.dtype('f8'), b'\0'),
        r'a numpy array of 1 bytes',
    ),
    'safetensors that overlap': _file(
        'memory', r'no whole safetensors file',
        safetensors({k: dict(dtype='F32', shape=[4], data_offsets=[0, 16]) for k in 'ab'}, FOUR),
        'x.safetensors',
    ),
    'safetensors beyond the end': _file(
        'memory', r'no whole safetensors file',
        safetensors({'a': dict(dtype='F32', shape=[8], data_offsets=[0, 32])}, FOUR),
        'x.safetensors',
    ),
    'safetensors of another size': _file(
        'memory', r'no whole safetensors file',
        safetensors({'a': dict(dtype='F64', shape=[4], data_offsets=[0, 16])}, FOUR),
        'x.safetensors',
    ),
    'safetensors of an unknown type': _file(
        'memory', r'no whole safetensors file',
        safetensors({'a': dict(dtype='OBJ', shape=[4], data_offsets=[0, 16])}, FOUR),
        'x.safetensors',
    ),
}  # fmt: skip


# --- integrity ------------------------------------------------------------------------------------


def _storage_at(data: bytes) -> int:
    tensor_ = weights()['state_dict']['w']
    return data.index(tensor_.numpy().tobytes())


def _two(first: str, second: str) -> bytes:
    """A checkpoint with two parts of one name: readers differ in which they take."""
    parts = list(parts_of(saved(weights())).items())
    chosen = next(content for part, content in parts if part.endswith(first))
    data = zipped([*parts, (f'archive/{second}', chosen)])
    return data.replace(f'archive/{second}'.encode(), f'archive/{first}'.encode())


def _with(part: str, value) -> bytes:
    return saved({**weights(), part: value})


INTEGRITY = {
    'flipped bit in a tensor': Hostile(
        'integrity', r'Bad CRC-32 or header of .archive/data/.*is damaged',
        lambda m: flipped(saved(weights()), _storage_at(saved(weights())) + 5),
    ),
    'flipped bit in the pickle': Hostile(
        'integrity', r'Bad CRC-32 for file .archive/data\.pkl.*is damaged',
        lambda m: flipped(saved(weights()), saved(weights()).index(b'state_dict')),
    ),
    'cut off': Hostile('integrity', r'is cut off', lambda m: saved(weights())[:-300]),
    'old format cut off': Hostile(
        'integrity', r'cut off',
        lambda m: saved(weights(), _use_new_zipfile_serialization=False)[:-3],
    ),
    'old format with more': Hostile(
        'integrity', r'behind its end',
        lambda m: saved(weights(), _use_new_zipfile_serialization=False) + b'\0',
    ),
    'safetensors cut off': _file(
        'integrity', r'no whole safetensors file',
        safetensors({'a': dict(dtype='F32', shape=[4], data_offsets=[0, 16])}, FOUR[:-1]),
        'x.safetensors',
    ),
    'safetensors with more': _file(
        'integrity', r'no whole safetensors file', safetensors({}, FOUR), 'x.safetensors'
    ),
    'safetensors with one name twice': _file(
        'integrity', r'no whole safetensors file', safetensors(b'{"a": 1, "a": 1}'), 'x.safetensors'
    ),
    'two pickles of one name': Hostile(
        'integrity', r'two accounts of', lambda m: _two('data.pkl', 'dat_.pkl')
    ),
    'two storages of one name': Hostile(
        'integrity', r'two accounts of', lambda m: _two('data/0', 'data/9')
    ),
    'two roots': Hostile(
        'integrity', r'not one data\.pkl',
        lambda m: zipped({**parts_of(saved(weights())), 'other/data.pkl': b'\x80\x02}.'}),
    ),
    'behind the end': Hostile(
        'integrity', r'or behind its end', lambda m: saved(weights()) + b'\0' * 22
    ),
    'before the beginning': Hostile(
        'integrity', r'something before its', lambda m: b'PK' + saved(weights())
    ),
    'comment': Hostile(
        'integrity', r'something before its beginning or behind its end',
        lambda m: zipped(parts_of(saved(weights())), comment=b'hello'),
    ),
    'encrypted': Hostile(
        'integrity', r'encrypted',
        lambda m: (d := saved(weights()))[: (at := d.index(b'PK\1\2')) + 8]
        + bytes([d[at + 8] | 1]) + d[at + 9 :],
    ),
    # PyTorch reads nothing of it, and gives what the memory held before.
    'marked as a folder': Hostile(
        'integrity', r'marked as folders',
        lambda m: flipped(d := saved(weights()), d.rindex(b'archive/data/0') - 8, 4),
    ),
    'compressed to nothing': Hostile(
        'integrity', r'invalid header or archive is corrupted',
        lambda m: (d := saved(weights()))[: (at := d.rindex(b'archive/data/0') - 26)]
        + bytes(4) + d[at + 4 :],
    ),
    'named as a folder': Hostile(
        'integrity', r'marked as folders',
        lambda m: zipped({
            name.replace('data/0', 'data/0/'): part.replace(b'X\1\0\0\x000', b'X\2\0\0\x000/')
            for name, part in parts_of(saved(weights())).items()
        }),
    ),
    'names that differ': Hostile(
        'integrity', r'header of .archive/byteorder',
        lambda m: saved(weights()).replace(b'archive/byteorder', b'archive/byteordex', 1),
    ),
    'weights without names': Hostile(
        'integrity', r'no dict of tensors by name',
        lambda m: _with('state_dict', {1: torch.ones(1)}),
    ),
    'weights in a list': Hostile(
        'integrity', r'no dict of tensors by name',
        lambda m: _with('state_dict', [torch.ones(1)]),
    ),
    'another hash': Hostile(
        'integrity', r'its SHA-256 is [0-9a-f]{64}, and 01234567 is in its name',
        lambda m: saved(weights()), 'x_20200130-01234567.pth',
    ),
    'bare tensor': Hostile('integrity', r'holds one Tensor', lambda m: saved(torch.ones(1))),
    'nothing in the pickle': _raw('integrity', r'damaged', b''),
    'memo that was never set': _raw('integrity', r'damaged', b'h\5'),
    'text that is no UTF-8': _raw('integrity', r'damaged', b'X\2\0\0\0\xff\xff'),
}  # fmt: skip

NOT_FINITE: dict[str, Callable[[], bytes]] = {
    'NaN': lambda: saved({'state_dict': {'weight': torch.tensor([[1.0, float('nan')]])}}),
    'infinite': lambda: saved({'weight': torch.full((1, 2), np.inf)}),
    'NaN, half': lambda: saved(
        {'state_dict': {'module.weight': torch.full((1, 2), np.nan).half()}}
    ),
}
"""Files that are read, and refused where the weights meet a network."""

HOSTILE: dict[str, Hostile] = {**CODE, **CONTAINERS, **TEXTS, **BOMBS, **MEMORY, **INTEGRITY}


def write(name_: str, folder: Path) -> tuple[Path, Path]:
    """Writes one of them.

    Returns:
        Its path and that of its marker.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hostile, marker = HOSTILE[name_], folder / 'marker'
    path = folder / hostile.file
    path.write_bytes(hostile.make(str(marker)))
    return path, marker


def peak() -> int:
    """The most bytes that this process has held since :func:`reset_peak` (Linux)."""
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) * 1024


def reset_peak() -> int:
    """Sets :func:`peak` back to what is held now, and returns that."""
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')
    return peak()


SECONDS, MEMORY = 12, 200e6
"""What one file may take: time, and bytes beyond 1.25 times its size."""


def attempt(name_: str, folder: Path) -> tuple[Path, str, bool, float, int, int]:
    """Writes one of them, reads it and removes it.

    Returns:
        Its path; what the reader said, 'READ' if it was taken; whether it ran; seconds; the bytes
        held at most beyond those before; its size.
    """
    path, marker = write(name_, folder)
    before, start = reset_peak(), time.perf_counter()
    try:
        read_checkpoint(path)
        message = 'READ'
    except CheckpointError as error:
        message = str(error)
    except BaseException as error:
        message = f'{type(error).__name__}: {error}'
    seconds, size = time.perf_counter() - start, path.stat().st_size
    held = peak() - before
    path.unlink()
    return path, message, marker.exists(), seconds, held, size
