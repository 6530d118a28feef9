"""What torch reads, mmkd reads, equal to the bit; and what people's files hold besides."""

import argparse
import datetime
import enum
import os
import pathlib
import pickle
import sys
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from hostile import parts_of, saved, zipped
from mmengine.config import ConfigDict
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mmkd.io.checkpoint import CheckpointError, read_checkpoint

DTYPES = sorted({str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}.items())
PROTOCOLS = range(1, pickle.HIGHEST_PROTOCOL + 1)
"""torch.save cannot write protocol 0: what stands for a storage is no text."""


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    """(2, 3) of any type, by its bytes."""
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    tensor = torch.empty(0, dtype=dtype)
    return tensor.set_(raw.untyped_storage(), 0, (2, 3), (3, 1))


def same(ours, theirs) -> bool:
    """Equal to the bit: type, shape, stride, flags, and the bytes in memory."""
    if not isinstance(theirs, torch.Tensor):
        return type(ours) is type(theirs) and ours == theirs
    return (
        type(ours) is type(theirs)
        and (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        and ours.storage_offset() == theirs.storage_offset()
        and (ours.is_conj(), ours.is_neg()) == (theirs.is_conj(), theirs.is_neg())
        and ours.requires_grad == theirs.requires_grad
        and bytes(ours.untyped_storage()) == bytes(theirs.untyped_storage())
    )


def both(path, value, **options) -> tuple[dict, dict] | None:
    """What mmkd and torch read of it; None where torch cannot write it, or not read it back."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            torch.save(value, path, **options)
            # Other protocols than 2 torch reads only where it runs what is in the file.
            plain = options.get('pickle_protocol', 2) == 2
            theirs = torch.load(path, weights_only=plain)
        except Exception:
            return None
    return read_checkpoint(path), theirs


@pytest.mark.parametrize('zipped', [True, False])
def test_every_type_that_torch_has(tmp_path, zipped):
    read = refused = 0
    for name, dtype in DTYPES:
        try:
            value = {'x': tensor_of(dtype)}
        except Exception:
            continue  # torch cannot make one
        found = both(tmp_path / 'x.pth', value, _use_new_zipfile_serialization=zipped)
        refused += found is None
        if found is not None:
            assert same(found[0]['x'], found[1]['x']), name
            read += 1
    assert read >= (15 if zipped else 12)


def views() -> dict:
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    number = torch.randn(3, dtype=torch.complex64)
    return {
        'whole': whole, 'rows': whole[2:4], 'column': whole[:, 3], 'transposed': whole.T,
        'strided': whole[::2, ::3], 'expanded': torch.ones(1).expand(5), 'scalar': whole[0, 0],
        'empty': whole[:0], 'conjugate': number.conj(), 'negative': torch._neg_view(whole),
        'last': torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        'parameter': torch.nn.Parameter(whole[0]), 'frozen': torch.nn.Parameter(whole[1], False),
        'learnt': torch.randn(2, requires_grad=True),
    }  # fmt: skip


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_views_and_shared_memory_in_every_protocol(tmp_path, protocol, zipped):
    options = dict(pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    ours, theirs = both(tmp_path / 'x.pth', {'state_dict': views()}, **options)
    ours, theirs = ours['state_dict'], theirs['state_dict']
    for key in theirs:
        assert same(ours[key], theirs[key]), key
    ours['whole'][2, 3] = 77
    assert ours['rows'][0, 3] == ours['column'][2] == 77


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_in_every_protocol(tmp_path, protocol):
    value = {
        'all': [None, True, 2**70, -1, 1.5, 1 + 2j, 'ä\U0001f600', b'\xff', bytearray(b'x')],
        'held': [(), (1,), [2], {3}, {'k': {4: 5}}, OrderedDict(a=1), Counter('aab')],
        'torch': [torch.Size([1, 2]), torch.device('cpu'), torch.float16, torch.strided],
    }
    ours, theirs = both(tmp_path / 'x.pth', value, pickle_protocol=protocol)
    assert all(same(*pair) for key in theirs for pair in zip(ours[key], theirs[key], strict=True))


def test_a_big_endian_machines_file(tmp_path):
    parts = parts_of(saved({'w': torch.arange(6.0).reshape(2, 3)}))
    order = next(name for name in parts if name.endswith('/byteorder'))
    (tmp_path / 'x.pth').write_bytes(zipped({**parts, order: b'big'}))
    theirs = torch.load(tmp_path / 'x.pth', weights_only=True)['w']
    assert theirs[0, 1] != 1 and same(read_checkpoint(tmp_path / 'x.pth')['w'], theirs)


def test_where_the_environment_forces_weights_only(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    (tmp_path / 'x.pth').write_bytes(saved({'w': torch.ones(2)}, pickle_protocol=4))
    assert read_checkpoint(tmp_path / 'x.pth')['w'].tolist() == [1, 1]
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'


REFUSED = {
    '_rebuild_sparse_tensor': lambda: torch.eye(3).to_sparse(),
    '_rebuild_qtensor': lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    '_rebuild_meta_tensor': lambda: torch.empty(3, device='meta'),
    '_rebuild_from_type': lambda: _with_attribute(torch.ones(3)),
    '_rebuild_parameter_with_state': lambda: _with_attribute(torch.nn.Parameter(torch.ones(3))),
    'a piece of': lambda: torch.ones(3).untyped_storage(),
}
"""The kinds that torch reads and mmkd does not: no detector's weights are such."""


def _with_attribute(tensor):
    tensor.owner = 'me'
    return tensor


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('kind', REFUSED)
def test_what_torch_reads_and_mmkd_refuses_by_name(tmp_path, kind):
    torch.save({'x': REFUSED[kind]()}, tmp_path / 'x.pth')
    torch.load(tmp_path / 'x.pth', weights_only=True)
    with pytest.raises(CheckpointError, match=kind):
        read_checkpoint(tmp_path / 'x.pth')


# --- what people's files hold ---------------------------------------------------------------------


class Level(enum.Enum):
    LOW = 1


class Color(enum.IntEnum):
    RED = 3


class Attributes(dict):
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return self[name]


class Dict(Attributes):
    """As addict has it."""

    def __getstate__(self):
        return self

    def __setstate__(self, state):
        self.update(state)


class EasyDict(dict):
    """As easydict has it: items are attributes too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__.update(self)


class AttributeDict(Attributes):
    """As Lightning has it."""


class CfgNode(Attributes):
    """As a project has it that copied yacs."""


@pytest.fixture
def packages(monkeypatch):
    """Classes as if they were of other packages, whose files name them so."""
    for name, kind in (
        ('addict.addict', Dict), ('easydict', EasyDict),
        ('lightning.fabric.utilities.data', AttributeDict), ('lib.config', CfgNode),
    ):  # fmt: skip
        monkeypatch.setattr(kind, '__module__', name)
        parts = name.split('.')
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, '.'.join(parts[:i]), types.ModuleType(name))
        setattr(sys.modules[name], kind.__name__, kind)


def beyond() -> dict:
    """(what is saved, what is read) by kind."""
    zone = datetime.timezone(datetime.timedelta(hours=2))
    now, nested = datetime.datetime(2024, 1, 2, 3, 4, 5, 6, zone), {'a': {'b': [1, 2]}}
    kinds = {
        'Namespace': argparse.Namespace(lr=0.1, sizes=[1, 2], path=pathlib.PosixPath('/x')),
        'datetime': [now, now.date(), now.time(), datetime.timedelta(1, 2), zone],
        'pathlib': [pathlib.PurePosixPath('/a/b'), pathlib.PureWindowsPath('c:/x')],
        'enum': [Level.LOW, Color.RED],
        'sets': [set(), {1, 'a'}, frozenset({(1, 2)})],
        'defaultdict': defaultdict(list, a=[1]),
        'deque': deque([1, 2], 5),
        'Counter': Counter(a=2),
        'slice': slice(1, None, 2),
        'range': range(3),
        'numpy text': [np.str_('ä'), np.str_(''), np.bytes_(b'x'), np.datetime64('2020-01-01')],
        'numpy numbers': [np.float64(0.1), np.int8(3), np.bool_(True), np.complex64(1j)],
        'version': str(torch.__version__),
    }  # fmt: skip
    read = {kind: (value, value) for kind, value in kinds.items()}
    read['version'] = torch.__version__, str(torch.__version__)
    read['SimpleNamespace'] = types.SimpleNamespace(a=1), argparse.Namespace(a=1)
    for kind in (ConfigDict, Dict, EasyDict, AttributeDict, CfgNode):
        read[kind.__name__] = kind({'a': kind({'b': [1, 2]})}), nested
    return read


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize('kind', beyond())
def test_what_other_projects_files_hold(tmp_path, packages, kind, protocol):
    value, expected = beyond()[kind]
    torch.save({'x': value, 'again': value}, tmp_path / 'x.pth', pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / 'x.pth')
    assert read['x'] == expected and type(read['x']) is type(expected)
    assert repr(read['x']).replace('Pure', '') == repr(expected).replace('Pure', '')
    assert kind in ('slice', 'range', 'version') or read['again'] is read['x']


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_plain_values(tmp_path, protocol):
    arrays = [
        np.arange(6.0).reshape(2, 3).T, np.array(['a', 'bcd']), np.array([b'x']),
        np.array(['2020-01-01'], 'M8[ns]'), np.array(['NaT'], 'M8'),
        np.arange(3, dtype='>i4'), np.zeros((0, 2)),
        np.array(3), np.array([1, None, 'x'], dtype=object),
    ]  # fmt: skip
    torch.save({'x': arrays}, tmp_path / 'x.pth', pickle_protocol=protocol)
    for ours, theirs in zip(read_checkpoint(tmp_path / 'x.pth')['x'], arrays, strict=True):
        assert ours.dtype == theirs.dtype and ours.flags.f_contiguous == theirs.flags.f_contiguous
        np.testing.assert_array_equal(ours, theirs)


def test_an_enumeration_that_is_not_imported_is_refused_by_name(tmp_path, monkeypatch):
    torch.save({'x': Level.LOW}, tmp_path / 'x.pth')
    monkeypatch.delattr(sys.modules[__name__], 'Level')
    with pytest.raises(CheckpointError, match=rf'names {__name__}\.Level, which is neither'):
        read_checkpoint(tmp_path / 'x.pth')


def test_files_of_other_trainers(tmp_path, packages):
    weights = {'backbone.weight': torch.ones(2)}
    files = {
        'timm': {'arch': 'x', 'args': argparse.Namespace(lr=0.1), 'state_dict': weights},
        'Lightning': {'epoch': 1, 'hyper_parameters': AttributeDict(lr=1), 'state_dict': weights},
        'Detectron2': {'model': weights, 'iteration': np.int64(3), '__author__': 'x'},
    }
    for name, file in files.items():
        torch.save(file, tmp_path / f'{name}.pth')
        read = read_checkpoint(tmp_path / f'{name}.pth')
        held = read.get('state_dict', read.get('model'))
        assert torch.equal(held['backbone.weight'], torch.ones(2))


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_the_pickle_of_arrays_of_detectron2s_zoo(tmp_path, protocol):
    model = {'stem.conv1.weight': np.arange(6, dtype=np.float32).reshape(2, 3)}
    content = {'model': model, '__author__': 'Detectron2', 'matching_heuristics': True}
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(content, protocol))
    read = read_checkpoint(tmp_path / 'x.pkl')
    assert read['__author__'] == 'Detectron2'
    np.testing.assert_array_equal(read['model']['stem.conv1.weight'], model['stem.conv1.weight'])


def test_python_2s_pickle_of_arrays(tmp_path):
    """Its texts are bytes, among them those of an array."""
    raw = np.arange(3, dtype=np.float32).tobytes()
    text = b'U' + bytes([len(raw)]) + raw
    dtype = b'cnumpy\ndtype\n(U\x02f4K\0K\1tR(K\3U\1<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb'
    array = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\1btR'
    array += b'(K\1K\3\x85' + dtype + b'\x89' + text + b'tb'
    (tmp_path / 'x.pkl').write_bytes(b'\x80\2}U\1w' + array + b's.')
    np.testing.assert_array_equal(read_checkpoint(tmp_path / 'x.pkl')['w'], [0, 1, 2])


def test_each_format_under_the_others_name(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    weights = {'w': torch.randn(2, 3), 'h': torch.ones(2).bfloat16(), 'e': torch.zeros(0, 2)}
    safetensors.save_file(weights, tmp_path / 'x.pth')
    (tmp_path / 'x.safetensors').write_bytes(saved(weights))
    for name in ('x.pth', 'x.safetensors'):
        read = read_checkpoint(tmp_path / name)
        assert all(same(read[key], weights[key]) for key in weights)


def test_a_distributed_checkpoint_is_refused_with_the_way_out(tmp_path):
    folder = tmp_path / 'dcp'
    dcp.save({'w': torch.ones(2)}, checkpoint_id=folder)
    for path in (folder, *folder.glob('*.distcp')):
        with pytest.raises(CheckpointError, match='format_utils dcp_to_torch FOLDER'):
            read_checkpoint(path)
    dcp_to_torch_save(folder, tmp_path / 'x.pth')
    assert torch.equal(read_checkpoint(tmp_path / 'x.pth')['w'], torch.ones(2))
