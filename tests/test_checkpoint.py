"""Reading without running, writing in plain form, and files that are there as a whole or not."""

import hashlib
import http.server
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import NOT_FINITE
from mmengine.config import ConfigDict
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint, save_checkpoint

from mmkd.io.checkpoint import (
    TAG,
    CheckpointError,
    _digits,
    from_plain,
    install,
    is_here,
    load_from_http,
    read_checkpoint,
    to_plain,
)


@pytest.fixture(autouse=True)
def installed():
    install()


def same(a, b) -> bool:
    """Equal to the bit and in type, through all containers."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.numpy().tobytes() == (b.numpy().tobytes())
        )
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, HistoryBuffer):
        return a.max_length == b.max_length and all(map(same, a.data, b.data))
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(same(a[key], b[key]) for key in a)
            and same(getattr(a, '_metadata', None), getattr(b, '_metadata', None))
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def training_checkpoint() -> dict:
    """What a training run of MMEngine holds, and every kind of value that it can hold."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3)).pow(2).sum().backward()
    optimizer.step()
    scalars = OrderedDict(
        loss=HistoryBuffer([0.1, float('nan'), 1 / 3], [1, 2, 3], max_length=10),
        count=HistoryBuffer([1, 2], [1, 1]),
        empty=HistoryBuffer(),
    )
    info = OrderedDict(
        iter=7,
        eta=np.float64(1 / 3),
        best=np.float32(0.1),
        done=np.bool_(True),
        ids=[1, 2],
        matrix=np.arange(6, dtype=np.int16).reshape(2, 3),
        fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        scalar=np.array(2, dtype=np.uint8),
        nothing=np.zeros((0, 3), np.float16),
        raw=[b'', b'\xff\0'],
    )
    return {
        'meta': {'epoch': 1, 'iter': 7, 'dataset_meta': {'classes': ('a', 'b')}, 'none': None},
        'state_dict': model.state_dict(),
        'message_hub': {
            'log_scalars': scalars,
            'runtime_info': info,
            'resumed_keys': OrderedDict(iter=True),
        },
        'optimizer': optimizer.state_dict(),
        'param_schedulers': [{'milestones': Counter({8: 1}), '_last_value': [0.1]}],
    }


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize('protocol', [2, 4])
def test_what_stock_runs_save_beside_numbers(tmp_path, protocol):
    """A method of OneCycleLR, which it has itself; metainfo as MMEngine's dict; a long set."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    scheduler = OneCycleLR(optimizer, eta_max=0.1, total_steps=9).state_dict()
    assert callable(scheduler['anneal_func'])
    saved = {
        'state_dict': {'empty': torch.arange(6.0).reshape(2, 3)[2:, 1:]},
        'param_schedulers': [scheduler],
        'meta': {'dataset_meta': ConfigDict(info=dict(year=[dict(a=1)])), 'ids': set(range(1500))},
    }
    torch.save(saved, tmp_path / 'x.pth', pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / 'x.pth')
    assert read['state_dict']['empty'].shape == (0, 2)
    del scheduler['anneal_func']
    assert read['param_schedulers'] == [scheduler]
    assert read['meta'] == {
        'dataset_meta': {'info': {'year': [{'a': 1}]}}, 'ids': set(range(1500)),
    }  # fmt: skip
    assert type(read['meta']['dataset_meta']['info']) is dict


@pytest.mark.parametrize('kind', NOT_FINITE)
def test_parameters_that_are_not_finite_are_refused_where_they_meet_a_network(tmp_path, kind):
    path = tmp_path / 'x.pth'
    path.write_bytes(NOT_FINITE[kind]())
    assert read_checkpoint(path)  # a file may hold what it likes
    network = torch.nn.Linear(2, 1)
    before = network.weight.clone()
    with pytest.raises(CheckpointError, match=rf'{path} holds weights .* in (module.)?weight'):
        load_checkpoint(network, str(path))
    assert torch.equal(network.weight, before)


def test_a_buffer_may_be_infinite_and_a_large_weight_is_finite(tmp_path):
    network = torch.nn.Linear(2, 1, dtype=torch.float16)
    network.register_buffer('mask', torch.full((2, 2), -torch.inf).triu(1))
    torch.nn.init.constant_(network.weight, 65000.0)  # whose sum float16 cannot hold
    other = {'unused.weight': torch.tensor(torch.nan), 'n': torch.full((2,), 3e38)}
    torch.save({**network.state_dict(), **other}, tmp_path / 'x.pth')
    load_checkpoint(network, str(tmp_path / 'x.pth'))
    assert network.mask[0, 1] == -torch.inf and network.weight[0, 0] == 65000


@pytest.mark.skipif(torch.cuda.is_available(), reason='wants a device that is not there')
def test_a_device_that_is_not_there_is_named(tmp_path):
    torch.save({'w': torch.zeros(2)}, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    old = (tmp_path / 'old.pth').read_bytes().replace(b'X\3\0\0\0cpu', b'X\6\0\0\0cuda:0')
    (tmp_path / 'old.pth').write_bytes(old)
    assert read_checkpoint(tmp_path / 'old.pth')['w'].tolist() == [0, 0]
    with pytest.raises(CheckpointError, match="put on its device .*CUDA.*map_location='cpu'"):
        read_checkpoint(tmp_path / 'old.pth', map_location=None)


@pytest.mark.parametrize('protocol', range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_a_training_checkpoint_comes_back_to_the_bit(tmp_path, protocol):
    path = tmp_path / 'epoch_1.pth'
    checkpoint = training_checkpoint()
    torch.save(checkpoint, path, pickle_protocol=protocol)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)  # or else this test tests nothing
    read = read_checkpoint(path)
    assert same(read, checkpoint)
    buffer = read['message_hub']['log_scalars']['count']
    buffer.update(6)
    assert (buffer.mean(), buffer.statistics('max'), buffer.current()) == (3.0, 6, 6)


def test_numpy_1_names_are_known(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save({'eta': np.float64(0.25), 'array': np.arange(3)}, path)
    new, old = b'numpy._core.multiarray', b'numpy.core.multiarray'
    assert new in _pickle_of(path)
    _save_pickle(path, _pickle_of(path).replace(new, old))
    assert same(read_checkpoint(path), {'eta': np.float64(0.25), 'array': np.arange(3)})


def test_legacy_format(tmp_path):
    path = tmp_path / 'legacy.pth'
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(path), state)


def every_tensor() -> dict:
    """Tensors of every type that weights have, shared, transposed, empty and expanded ones too."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-9, 9, (6,), generator=generator)
    kinds = [
        'float64',
        'float32',
        'float16',
        'bfloat16',
        'complex64',
        'int64',
        'int32',
        'int16',
        'int8',
        'uint8',
        'bool',
    ]
    tensors = {kind: values.to(getattr(torch, kind)).view(2, 3) for kind in kinds}
    tensors['transposed'] = tensors['part'] = torch.randn(4, 6, generator=generator).T[1:3]
    tensors['scalar'], tensors['empty'] = torch.tensor(3), torch.zeros(0, 4)
    tensors['expanded'] = torch.ones(1).expand(3)
    tensors['channels_last'] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    return {
        'tensors': tensors,
        'parameter': torch.nn.Parameter(torch.randn(2, 2), requires_grad=False),
        'learnt': torch.randn(3, requires_grad=True),
        'plain': [torch.Size([1, 2]), torch.device('cpu'), torch.float16, torch.strided, 2**80],
        'more': [{1, 'a'}, bytearray(b'x'), b'\xff', 1 + 2j, -1.5, (), None, True, 'ä\U0001f600'],
    }


@pytest.mark.parametrize('zipped', [True, False])
def test_whatever_tensors_there_are_come_back_as_torch_reads_them(tmp_path, zipped):
    path, values = tmp_path / 'x.pth', every_tensor()
    if zipped:  # torch itself cannot read it back from the old format
        values['tensors']['uint16'] = torch.arange(5).to(torch.uint16)
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    ours, theirs = read_checkpoint(path), torch.load(path)
    assert list(ours['tensors']) == list(theirs['tensors'])
    for key, tensor in theirs['tensors'].items():
        own = ours['tensors'][key]
        assert (own.dtype, own.shape, own.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert torch.equal(own, tensor)
    assert ours['tensors']['part'] is ours['tensors']['transposed']
    for key in ('parameter', 'learnt'):
        assert type(ours[key]) is type(theirs[key])
        assert ours[key].requires_grad is theirs[key].requires_grad
        assert torch.equal(ours[key], theirs[key])
    assert same(ours['plain'], theirs['plain']) and same(ours['more'], theirs['more'])


def test_shared_memory_stays_shared(tmp_path):
    whole = torch.arange(6.0)
    torch.save({'whole': whole, 'part': whole[2:4]}, tmp_path / 'x.pth')
    read = read_checkpoint(tmp_path / 'x.pth')
    read['whole'][2] = -1
    assert read['part'].tolist() == [-1, 3]


@pytest.mark.parametrize('zipped', [True, False])
def test_a_published_file_of_mmcv_1(tmp_path, zipped):
    """With all that OpenMMLab's files of MMDetection 2 hold."""
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
    meta = {
        'env_info': 'sys.platform: linux\nPython: 3.7.3', 'mmdet_version': '2.0.0rc0+c77ccbb',
        'config': 'model = dict()\n', 'config_dict': {'model': {'type': 'FasterRCNN'}},
        'CLASSES': ('person', 'bicycle'), 'PALETTE': [(220, 20, 60), (119, 11, 32)],
        'time': 'Mon', 'epoch': 12, 'iter': 87961, 'seed': None, 'exp_name': 'x.py',
        'hook_msgs': {'best_score': np.float64(0.37), 'best_ckpt': 'epoch_12.pth'},
    }  # fmt: skip
    torch.save({'meta': meta, 'state_dict': state}, tmp_path / 'x_1x_coco_20200130-d.pth',
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    read = read_checkpoint(tmp_path / 'x_1x_coco_20200130-d.pth')
    assert same(read['state_dict'], state)
    del meta['config']
    assert same(read['meta'], meta)


def test_a_training_checkpoint_with_an_average_and_adam(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(
        [{'params': [p], 'lr': 0.1, 'name': n} for n, p in model.named_parameters()]
    )
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {**training_checkpoint(), 'optimizer': optimizer.state_dict()}
    checkpoint['ema_state_dict'] = OrderedDict(
        steps=torch.tensor(3), **{f'module.{k}': v for k, v in model.state_dict().items()}
    )
    torch.save(checkpoint, tmp_path / 'x.pth')
    assert same(read_checkpoint(tmp_path / 'x.pth'), checkpoint)


def test_a_long_training_s_log_is_read(tmp_path):
    """A run of 700,000 iterations on a small model; its log is nearly all of the file."""
    log = np.random.default_rng(0).standard_normal(700_000)
    scalars = OrderedDict((f'loss_{i}', HistoryBuffer(log, log.astype(int))) for i in range(6))
    checkpoint = {'state_dict': {}, 'message_hub': {'log_scalars': scalars}, 'text': 'ä' * 70000}
    checkpoint['wide'], checkpoint['raw'] = '\u4e2d' * 30000, b'\xff' * 70000
    torch.save(checkpoint, tmp_path / 'x.pth')
    assert same(read_checkpoint(tmp_path / 'x.pth'), checkpoint)


def safetensors_of(tensors: dict[str, torch.Tensor]) -> bytes:
    """As the safetensors library writes it."""
    codes = {torch.float32: 'F32', torch.bfloat16: 'BF16', torch.int64: 'I64', torch.bool: 'BOOL'}
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        shape = list(tensor.shape)
        header[name] = {'dtype': codes[tensor.dtype], 'shape': shape, 'data_offsets': offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    return len(text).to_bytes(8, 'little') + text + data


def test_safetensors(tmp_path):
    tensors = {
        'a.weight': torch.randn(2, 3), 'half': torch.randn(3).bfloat16(),
        'empty': torch.zeros(0, 2), 'count': torch.tensor([7]), 'mask': torch.tensor([True, False]),
    }  # fmt: skip
    path = tmp_path / 'x.safetensors'
    path.write_bytes(safetensors_of(tensors))
    for read in (read_checkpoint(path), CheckpointLoader.load_checkpoint(str(path), 'cpu')):
        assert list(read) == list(tensors)
        for key, tensor in tensors.items():
            assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
            assert torch.equal(read[key], tensor)


def test_config_text_is_left_out(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    marker = tmp_path / 'marker'
    text = f'open({str(marker)!r}, "w")'
    torch.save(
        {
            'meta': {'epoch': 1, 'config': text, 'cfg': text},
            'message_hub': {'runtime_info': OrderedDict(cfg=text, epoch=1)},
        },
        path,
    )
    assert read_checkpoint(path) == {
        'meta': {'epoch': 1},
        'message_hub': {'runtime_info': OrderedDict(epoch=1)},
    }


def _pickle_of(path: Path) -> bytes:
    """The pickle in a checkpoint."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith('data.pkl'))
        return archive.read(name)


def _save_pickle(path: Path, data: bytes) -> None:
    """A checkpoint without tensors made of this pickle."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record('data.pkl', data, len(data))
    writer.write_record('byteorder', b'little', 6)
    writer.write_end_of_file()


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def _hostile(marker: Path) -> dict:
    touch = f'open({str(marker)!r}, "w")'
    history = HistoryBuffer([1.0], [1])
    history.__dict__['statistics_methods'] = {}
    smuggled = [
        Calls(getattr, HistoryBuffer, '__init__'),
        Calls(getattr, os, 'system'),
        Calls(getattr, Calls(getattr, HistoryBuffer, 'mean'), '__globals__'),
    ]
    return {
        'os.system': (Calls(os.system, f'touch {marker}'), r'names \w+\.system,'),
        'eval': (Calls(eval, touch), r'names builtins\.eval,'),
        'exec': (Calls(exec, touch), r'names builtins\.exec,'),
        'subprocess': (Calls(subprocess.Popen, ['touch', str(marker)]), r'names \w+\.Popen,'),
        'partial': (Calls(partial, eval, touch), r'names functools\.partial,'),
        'getattr of init': (smuggled[0], r"builtins\.getattr\(HistoryBuffer, '__init__'\)"),
        'getattr of a module': (
            Calls(getattr, int, 'real'),
            r"builtins\.getattr\(int, 'real'",
        ),
        'getattr of a method': (smuggled[2], r"getattr\('mean', '__globals__'\)"),
        'getattr of a string': (Calls(getattr, 'x', 'format'), r"getattr\('x', 'format'\)"),
        'methods': (
            Calls(HistoryBuffer, state={'statistics_methods': {'mean': smuggled[0]}}),
            r"builtins\.getattr\(HistoryBuffer, '__init__'\)",
        ),
        'method that is a name': (
            Calls(HistoryBuffer, state={'statistics_methods': {'mean': getattr}}),
            r'a piece of a HistoryBuffer',
        ),
        'method that evaluates': (
            Calls(HistoryBuffer, state={'statistics_methods': {'mean': Calls(eval, touch)}}),
            r'names builtins\.eval,',
        ),
        'loose class': (HistoryBuffer, r'a piece of a HistoryBuffer'),
        'history of text': (
            Calls(HistoryBuffer, state={'_log_history': 'x', '_count_history': 'x'}),
            r'a HistoryBuffer with logs of shape None',
        ),
        'object array': (np.array([Calls(eval, touch)], dtype=object), r'names builtins\.eval,'),
        'structured dtype': (np.dtype([('a', 'f8')]), r"type 'V8'"),
        'shape that lies': (
            Calls(
                np.zeros(1).__reduce__()[0],
                np.ndarray,
                (0,),
                b'b',
                state=(1, (2**40,), np.dtype('f8'), False, b'\0' * 8),
            ),
            r'8 bytes that claims the shape \(1099511627776,\)',
        ),
        'scalar that lies': (
            Calls(np.float64(1).__reduce__()[0], np.dtype('f8'), b'\0'),
            r'a numpy array of 1 bytes',
        ),
    }


@pytest.mark.parametrize('name', _hostile(Path('x')))
@pytest.mark.parametrize('zipped', [True, False])
def test_code_is_refused_by_name_and_does_not_run(tmp_path, name, zipped):
    path, marker = tmp_path / 'hostile.pth', tmp_path / 'marker'
    value, reason = _hostile(marker)[name]
    torch.save({'state_dict': {}, 'x': [value]}, path, _use_new_zipfile_serialization=zipped)
    methods = dict(HistoryBuffer._statistics_methods)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert 'weights_only' not in str(caught.value)
    assert 'safe_globals' not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert not marker.exists()
    assert HistoryBuffer._statistics_methods == methods


def test_what_others_allowlisted_is_not_allowed_here_and_stays_theirs(tmp_path):
    path = tmp_path / 'hostile.pth'
    torch.save({'x': Calls(getattr, 'x', 'format')}, path)
    with torch.serialization.safe_globals([getattr, partial]):
        assert callable(torch.load(path)['x'])  # the usual advice
        with pytest.raises(CheckpointError, match=r'builtins\.getattr'):
            read_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) >= {getattr, partial}
    assert getattr not in torch.serialization.get_safe_globals()


def test_safety_cannot_be_turned_off_from_outside(tmp_path, monkeypatch):
    path, marker = tmp_path / 'hostile.pth', tmp_path / 'marker'
    torch.save({'x': Calls(os.system, f'touch {marker}')}, path)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    for load in (read_checkpoint, CheckpointLoader.load_checkpoint):
        with pytest.raises(CheckpointError, match=r'\.system'):
            load(str(path))
    assert not marker.exists()


def test_a_whole_model_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(
        CheckpointError,
        match=r'names torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state',
    ):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', r'is empty \(0 bytes\)'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n', r'git-LFS pointer'),
        (b'\n<!DOCTYPE html><html><body>404</body></html>', r'is a web page'),
        (b'<?xml version="1.0"?><Error>NoSuchKey</Error>', r'is a web page'),
        (b'{"message": "Not Found"}', r'is no PyTorch checkpoint: it starts with'),
        (b'\x80\x02}q\x00', r'cannot be read as tensors'),
    ],
)
def test_files_that_are_no_checkpoints_are_named(tmp_path, content, reason):
    path = tmp_path / 'x.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_checkpoint(path)
    assert 'weights_only' not in str(caught.value)


@pytest.mark.parametrize('part', [0.02, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(tmp_path, part):
    path = tmp_path / 'x.pth'
    torch.save(training_checkpoint(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError, match=r'is cut off: a zip archive without its end'):
        read_checkpoint(path)


def test_missing_file_directory_and_bare_tensor(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth does not exist'):
        read_checkpoint(tmp_path / 'nowhere.pth')
    with pytest.raises(CheckpointError, match=r'is a directory'):
        read_checkpoint(tmp_path)
    torch.save(torch.zeros(1), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'holds one Tensor instead of a dict'):
        read_checkpoint(tmp_path / 'x.pth')


def test_a_container_in_itself_is_refused(tmp_path):
    loop: list = []
    loop.append(loop)
    torch.save({'x': loop}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'contain themselves'):
        read_checkpoint(tmp_path / 'x.pth')


def test_lists_in_lists_cost_no_more_than_they_take(tmp_path):
    bomb: list = []
    for _ in range(60):  # 2**60 when written out
        bomb = [bomb, bomb]
    assert from_plain(to_plain({'x': bomb}))['x'][0][1][0][0] is not None
    torch.save({'x': bomb}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='takes longer to read'):
        read_checkpoint(tmp_path / 'x.pth')


# --- writing --------------------------------------------------------------------------------------


def test_plain_form_is_read_without_mmkd_and_comes_back_to_the_bit(tmp_path):
    path, checkpoint = tmp_path / 'epoch_1.pth', training_checkpoint()
    plain = to_plain(checkpoint)
    assert plain['state_dict']['0.weight'] is checkpoint['state_dict']['0.weight']
    assert same(plain['state_dict'], checkpoint['state_dict'])
    assert same(checkpoint['message_hub']['runtime_info']['eta'], np.float64(1 / 3))
    torch.save(plain, path)

    script = (
        'import sys, torch\n'
        f'checkpoint = torch.load({str(path)!r}, weights_only=True)\n'
        'assert not {"mmkd", "mmengine"} & set(sys.modules)\n'
        'print(checkpoint["message_hub"]["log_scalars"]["count"]["log_history"].tolist())'
    )
    assert subprocess.check_output([sys.executable, '-c', script], text=True) == '[1, 2]\n'
    assert same(read_checkpoint(path), plain)
    assert same(from_plain(read_checkpoint(path)), checkpoint)


def test_what_derives_from_plain_types_becomes_plain():
    from enum import IntEnum

    class Level(IntEnum):
        LOW = 1

    value = {
        'cfg': ConfigDict(a=ConfigDict(b=1)),
        np.int64(3): np.str_('text'),
        'level': Level.LOW,
        'big_endian': np.arange(3, dtype='>i4'),
        'pair': torch.Size([1, 2]),
    }
    plain = to_plain(value)
    assert same({'cfg': plain['cfg'], 3: plain[3], 'level': plain['level']}, {
        'cfg': {'a': {'b': 1}}, 3: 'text', 'level': 1,
    })  # fmt: skip
    assert same(from_plain(plain)['big_endian'], np.arange(3, dtype='i4'))


def test_unknown_objects_are_left_out_with_a_warning_that_names_them(monkeypatch):
    class Odd:
        pass

    strange, loop = Odd(), {'kept': 1}
    loop['loop'] = loop
    value = {
        'info': {'odd': Odd(), 'kept': 1},
        'list': [1, Odd(), 3],
        'text array': np.array(['x']),
        strange: 2,
        'loop': loop,
    }
    log = []
    monkeypatch.setattr(
        'mmkd.io.checkpoint.print_log', lambda message, logger, level: log.append((level, message))
    )
    plain = to_plain(value)
    assert plain == {'info': {'kept': 1}, 'list': [1, None, 3], 'loop': {'kept': 1}}
    odd = 'test_unknown_objects_are_left_out_with_a_warning_that_names_them.<locals>.Odd'
    why = 'is no tensor, number, text or container of such'
    assert [level for level, _ in log] == [logging.WARNING] * 5
    assert [message.split(' left out of the checkpoint: ') for _, message in log] == [
        ['checkpoint.info.odd is', f'test_checkpoint.{odd} {why}'],
        ['checkpoint.list[1] is', f'test_checkpoint.{odd} {why}'],
        ['checkpoint.text array is', f'numpy.ndarray {why}'],
        [f'checkpoint[{strange!r}] is', 'builtins.int has a key of type Odd'],
        ['checkpoint.loop.loop is', 'builtins.dict contains itself'],
    ]


def test_attributes_of_tensors_are_not_written(tmp_path):
    tensor = torch.arange(3.0)
    tensor.owner = partial(print)
    torch.save(to_plain({'x': tensor}), tmp_path / 'x.pth')
    assert torch.equal(torch.load(tmp_path / 'x.pth')['x'], torch.arange(3.0))


def test_somebody_elses_dict_with_our_mark_survives():
    value = {'x': {TAG: 'HistoryBuffer', 'y': [np.float32(1)]}}
    assert same(from_plain(to_plain(value)), value)


@pytest.mark.parametrize(
    'form',
    [
        {TAG: 'eval', 'value': 'x'},
        {TAG: 'ndarray', 'value': [1]},
        {TAG: np.zeros(2), 'value': [1]},
        {TAG: 'dict', 'items': [([], 1)]},
        {TAG: 'scalar', 'value': torch.zeros(2)},
        {TAG: 'ndarray', 'value': torch.zeros(2, dtype=torch.bfloat16)},
        {TAG: 'HistoryBuffer', 'log_history': torch.zeros(2), 'count_history': torch.zeros(3),
         'max_length': 9},
        {TAG: 'HistoryBuffer', 'log_history': torch.zeros(2), 'count_history': torch.zeros(2),
         'max_length': 1},
        {TAG: 'HistoryBuffer', 'log_history': torch.zeros(2), 'count_history': torch.zeros(2),
         'max_length': 'x'},
    ],
)  # fmt: skip
def test_forged_plain_forms_are_refused(form):
    with pytest.raises(CheckpointError, match='holds'):
        from_plain({'x': form})


@pytest.mark.parametrize('failing', ['fsync', 'replace'])
def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, failing):
    path = str(tmp_path / 'epoch_1.pth')
    save_checkpoint({'x': torch.zeros(3)}, path)

    def fail(*args):
        raise OSError('No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match='No space'):
            save_checkpoint({'x': torch.ones(3)}, path)
    assert torch.equal(torch.load(path)['x'], torch.zeros(3))
    assert os.listdir(tmp_path) == ['epoch_1.pth']
    save_checkpoint({'x': torch.ones(3)}, path)
    assert torch.equal(torch.load(path)['x'], torch.ones(3))


def test_text_and_links_through_the_backend(tmp_path):
    (tmp_path / 'real.txt').write_text('old')
    (tmp_path / 'link.txt').symlink_to('real.txt')
    get_file_backend(str(tmp_path)).put_text('zwölf\n', tmp_path / 'link.txt')
    assert (tmp_path / 'real.txt').read_text(encoding='utf-8') == 'zwölf\n'
    assert (tmp_path / 'link.txt').is_symlink()


# --- MMEngine's doors -----------------------------------------------------------------------------


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder and the address under which a local server shows it; downloads go to ``hub``."""
    (tmp_path / 'site').mkdir()
    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(_Quiet, directory=str(tmp_path / 'site'))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    yield tmp_path / 'site', f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def _old_format() -> bytes:
    file = io.BytesIO()
    torch.save({'x': torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def test_a_download_is_read_safely_and_kept(site, tmp_path):
    folder, address = site
    torch.save(training_checkpoint(), folder / 'x.pth')
    digits = hashlib.sha256((folder / 'x.pth').read_bytes()).hexdigest()[:8]
    (folder / 'x.pth').rename(folder / f'x-{digits}.pth')
    url = f'{address}/x-{digits}.pth'
    first = CheckpointLoader.load_checkpoint(url, map_location='cpu')
    (folder / f'x-{digits}.pth').unlink()
    assert same(CheckpointLoader.load_checkpoint(url, map_location='cpu'), first)
    assert isinstance(first['message_hub']['log_scalars']['loss'], HistoryBuffer)
    assert os.listdir(tmp_path / 'hub' / 'checkpoints') == [f'x-{digits}.pth']
    assert is_here(url) and is_here(f'{url}?token=a/b#c') and not is_here(f'{address}/y.pth')


@pytest.mark.parametrize(
    ('name', 'content', 'reason'),
    [
        ('x_20240131-01234567.pth', None, r'invalid hash value \(expected "01234567"'),
        ('x.pth', b'<html>log in first</html>', r'is a web page'),
        ('x.pth', b'PK\3\4 and so on', r'is cut off'),
        ('x.pth', b'version https://git-lfs.github.com/spec/v1', r'is a git-LFS pointer'),
        ('x.pth', _old_format()[:-2], r'cut off'),
        ('missing.pth', b'', r'HTTPError: HTTP Error 404'),
    ],
)
def test_a_bad_download_names_the_url_and_is_not_kept(site, tmp_path, name, content, reason):
    folder, address = site
    if content is None:
        torch.save({'x': 1}, folder / name)
    elif content:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_from_http(f'{address}/{name}')
    assert f'{address}/{name}' in str(caught.value)
    assert 'Download it by hand' in str(caught.value)
    assert os.listdir(tmp_path / 'hub' / 'checkpoints') == []


ORDINARY = ('model-12345678', 'ckpt-00012000', 'slurm-31415926', 'epoch-deadbeef', 'x-20240131')


@pytest.mark.parametrize('name', ORDINARY)
def test_eight_digits_are_a_hash_only_where_openmmlabs_form_or_place_says_so(site, tmp_path, name):
    folder, address = site
    for path in (folder / f'{name}.pth', tmp_path / f'{name}.pth'):
        torch.save({'x': 1}, path)
    assert load_from_http(f'{address}/{name}.pth') == {'x': 1}
    assert read_checkpoint(tmp_path / f'{name}.pth') == {'x': 1}
    official = tmp_path / f'faster_rcnn_r50_fpn_1x_coco_20200130-{name[-8:]}.pth'
    (tmp_path / f'{name}.pth').rename(official)
    if name[-8:] != '20240131':
        with pytest.raises(CheckpointError, match=f'and {name[-8:]} is in its name'):
            read_checkpoint(official)


def test_the_zoos_addresses_state_a_hash():
    assert _digits('resnet50-0676ba61.pth', 'https://download.pytorch.org/models/x') == '0676ba61'
    assert _digits('x-6cc46731.pth', 'https://download.openmmlab.com/pretrain/x') == '6cc46731'
    assert _digits('x-6cc46731.pth', 'https://openmmlab.com.example/x') is None


def test_names_of_the_zoos(site, tmp_path, monkeypatch):
    kept = tmp_path / 'hub' / 'checkpoints'
    kept.mkdir(parents=True)
    state = {'conv1.weight': torch.ones(1)}
    monkeypatch.setattr('mmkd.io.checkpoint._check_hash', lambda *_: None)  # these are not those
    torch.save(state, kept / 'resnet50-0676ba61.pth')
    torch.save(state, kept / 'resnet101_msra-6cc46731.pth')
    for name in (
        'torchvision://resnet50',
        'modelzoo://resnet50',
        'open-mmlab://detectron2/resnet101_caffe',
        'openmmlab://detectron2/resnet101_caffe',
    ):
        assert same(CheckpointLoader.load_checkpoint(name, 'cpu'), state)
        assert is_here(name)
    assert not is_here('torchvision://resnet18') and not is_here('mmcls://vgg11')
    torch.save({'state_dict': {'backbone.x': torch.ones(1), 'head.x': torch.ones(1)}},
               kept / 'vgg11_batch256_imagenet_20210208-4271cd6c.pth')  # fmt: skip
    read = CheckpointLoader.load_checkpoint('mmcls://vgg11', 'cpu')
    assert is_here('mmcls://vgg11')
    assert list(read['state_dict']) == ['x']
    with pytest.raises(CheckpointError, match=r'torchvision://resnet5: no model .*resnet50'):
        CheckpointLoader.load_checkpoint('torchvision://resnet5', 'cpu')


def test_every_scheme_is_ours_and_installing_twice_changes_nothing():
    schemes = dict(CheckpointLoader._schemes)
    install()
    assert dict(CheckpointLoader._schemes) == schemes
    for path in ('x.pth', '/x.pth', 'http://x', 'https://x', 'torchvision://x', 'modelzoo://x',
                 'open-mmlab://x', 'openmmlab://x', 'mmcls://x'):  # fmt: skip
        loader = CheckpointLoader._get_checkpoint_loader(path)
        assert loader.__module__ == 'mmkd.io.checkpoint'
        assert loader.__name__.startswith('load_from_')
