"""Hostile files are refused by name, run nothing, and cost no more than their size allows."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import psutil
import pytest
import torch
from hostile import DISARMED, HOSTILE, TAG, flipped, parts_of, saved, weights, write, zipped
from mmdet.apis import DetInferencer
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader
from tiny import tiny_config

from mmkd.io import reader
from mmkd.io.checkpoint import CheckpointError, from_plain, load_verified, read_checkpoint
from mmkd.io.reader import ROOM as BUDGET
from mmkd.models.teacher import Teacher
from mmkd.recipe import plain_student


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    """Reads a file in a process of its own: message, whether it ran, seconds, bytes, size."""
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp('hostile'))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def read(name):
            process.stdin.write(f'{name}\n')
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield read
        process.stdin.close()


def marked(name):
    """What takes longer than it may takes seconds each: two of them are enough for every day."""
    slow = 'longer' in HOSTILE[name].reason and name not in ('laughs', 'keys of one hash')
    return pytest.param(name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize('name', [*map(marked, HOSTILE)])
def test_refused_by_name_without_running_in_time_and_in_memory(outcome, name):
    message, ran, seconds, memory, size = outcome(name)
    assert message.startswith('checkpoint /') and HOSTILE[name].file in message
    assert re.search(HOSTILE[name].reason, message), message
    assert not ran
    # A hang. How fast it is, is for benchmarks/reliability/hostile.py on a quiet machine.
    assert seconds < 300
    assert memory < 1.25 * size + hostile.MEMORY


def test_there_are_enough_of_each_kind():
    assert len(HOSTILE) >= 60
    assert {h.kind for h in HOSTILE.values()} == {
        'code', 'container', 'text', 'bomb', 'memory', 'integrity',
    }  # fmt: skip


def test_the_payloads_run_where_nobody_stops_them(tmp_path):
    """Or else the markers test nothing."""
    for name in ('os.system', 'eval', 'Popen'):
        path, marker = write(name, tmp_path / name.replace('.', '_'))
        torch.load(path, weights_only=False)
        for _ in range(6000):
            if marker.exists():
                break
            time.sleep(0.02)
        assert marker.exists()


@pytest.mark.parametrize('where', DISARMED)
def test_config_texts_are_not_run_by_resume_or_the_inferencer(tmp_path, where):
    path, marker = tmp_path / 'x.pth', tmp_path / 'marker'
    path.write_bytes(DISARMED[where](str(marker)))
    read = from_plain(CheckpointLoader.load_checkpoint(str(path), 'cpu'))
    assert 'config' not in read['meta'] and 'cfg' not in read['message_hub']['runtime_info']
    with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
        DetInferencer(weights=str(path), device='cpu', show_progress=False)
    assert not marker.exists()
    # What would have happened: MMEngine's own lines on what stock PyTorch reads.
    raw = torch.load(path)
    text = raw['meta'].get('config') or raw['message_hub']['runtime_info']['cfg']
    Config.fromstring(text, '.py')
    assert marker.exists()


def test_plain_forms_cannot_share_a_tensor():
    form = {TAG: 'ndarray', 'value': torch.zeros(3)}
    with pytest.raises(CheckpointError, match='plain forms that share a tensor'):
        from_plain({'x': [form, dict(form)]})
    assert from_plain({'x': [form, form]})['x'][0].tolist() == [0, 0, 0]


def test_a_flipped_bit_is_refused_or_harmless(tmp_path):
    data, path = saved(weights()), tmp_path / 'x.pth'
    expected = weights()['state_dict']
    refused = 0
    for at in range(0, len(data), 29):
        path.write_bytes(flipped(data, at, at % 8))
        try:
            read = read_checkpoint(path)['state_dict']
        except CheckpointError:
            refused += 1
        else:
            assert list(read) == list(expected)
            assert all(torch.equal(read[key], expected[key]) for key in expected)
    assert refused > 20


def test_mutated_files_give_nothing_but_refusals(tmp_path, monkeypatch):
    """The first fifty cases of benchmarks/reliability/fuzz.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / 'benchmarks' / 'reliability')
    monkeypatch.setitem(sys.modules, 'hostile', hostile)
    fuzz = importlib.import_module('fuzz')
    rng, seeds, read = random.Random(0), fuzz.genuine(), 0
    for _ in range(50):
        form, data = rng.choice(seeds)
        path = tmp_path / ('x.safetensors' if form == 'safetensors' else 'x.pth')
        path.write_bytes(fuzz.mutate((form, data), rng))
        with contextlib.suppress(CheckpointError):
            fuzz.touch(from_plain(read_checkpoint(path)))
            read += 1
    assert 0 < read < 25


def test_a_file_written_without_crcs_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        (tmp_path / 'x.pth').write_bytes(saved(weights()))
    finally:
        torch.serialization.set_crc32_options(before)
    read = read_checkpoint(tmp_path / 'x.pth')['state_dict']
    assert torch.equal(read['w'], weights()['state_dict']['w'])


def test_memory_is_that_of_the_file(tmp_path):
    path = tmp_path / 'big.pth'
    torch.save({'state_dict': {'w': torch.ones(2**26)}}, path)
    script = (
        f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
        'import hostile, torch\n'
        'from mmkd.io.checkpoint import read_checkpoint\n'
        f'before = hostile.reset_peak(); read_checkpoint({str(path)!r})\n'
        'print(hostile.peak() - before)'
    )
    used = int(subprocess.check_output([sys.executable, '-c', script], text=True).split('\n')[-2])
    assert 0.9 * path.stat().st_size < used < 1.25 * path.stat().st_size
    assert BUDGET < hostile.MEMORY


def children(pid: int) -> set[int]:
    """Of a process's main thread (Linux)."""
    try:
        return set(map(int, Path(f'/proc/{pid}/task/{pid}/children').read_text().split()))
    except FileNotFoundError:
        return set()


def runs(pid: int) -> bool:
    """One that ended is kept as a zombie until whoever inherited it takes note (or for ever)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_reader_ends_with_the_process_that_asked(tmp_path):
    path, _ = write('laughs as a key', tmp_path)  # takes as long as it may
    script = f'from mmkd.io.checkpoint import read_checkpoint; read_checkpoint({str(path)!r})'
    with subprocess.Popen([sys.executable, '-c', script]) as process:
        readers = set()
        while process.poll() is None and not readers:
            readers = children(process.pid)
        process.kill()
    assert readers
    for _ in range(200):  # far less than its own limit leaves it
        if not any(map(runs, readers)):
            break
        time.sleep(0.01)
    assert not any(map(runs, readers))


def test_no_reader_is_left_after_a_file_that_is_refused_or_read(tmp_path):
    before = children(os.getpid())
    files = set(os.listdir('/proc/self/fd'))
    for name in ('os.system', 'a stack that overflows', 'laughs'):
        with pytest.raises(CheckpointError):
            read_checkpoint(write(name, tmp_path)[0])
    path = tmp_path / 'x.pth'
    path.write_bytes(saved(weights()))
    read_checkpoint(path)
    assert children(os.getpid()) == before
    assert set(os.listdir('/proc/self/fd')) == files


def test_no_pickle_can_change_what_a_name_stands_for():
    module, change = reader._PickleModule(), hostile.text('__doc__') + hostile.number(1)
    for label, kind in reader._AS_IS.items():
        before, named = dict(getattr(kind, '__dict__', {})), b'\x80\2' + hostile.name(label)
        for program in (
            *(b'}' + change + b'sb.', b'N}' + change + b's\x86b.', change + b's.'),
            *(b'K\1a.', b'(K\1e.', b'(K\1\x90.'),
        ):
            with pytest.raises((TypeError, AttributeError, pickle.UnpicklingError)):
                module.load(io.BytesIO(named + program))
        assert dict(getattr(kind, '__dict__', {})) == before


def test_one_name_in_two_cases_is_refused(tmp_path):
    """PyTorch finds a part whatever its case."""
    parts = parts_of(saved(weights()))
    root = next(iter(parts)).partition('/')[0]
    (tmp_path / 'x.pth').write_bytes(zipped({**parts, f'{root}/DATA.PKL': b'x'}))
    with pytest.raises(CheckpointError, match='two accounts of a part'):
        read_checkpoint(tmp_path / 'x.pth')


def test_one_name_in_two_encodings_is_refused(tmp_path):
    """PyTorch finds a part by the bytes of its name; zipfile reads those by the part's flags."""
    parts = parts_of(saved(weights()))
    root = next(iter(parts)).partition('/')[0]
    data = zipped({**parts, f'{root}/data/\u00e9': b'x', f'{root}/data/xy': b'y'})
    (tmp_path / 'x.pth').write_bytes(data.replace(b'data/xy', 'data/\u00e9'.encode()))
    with pytest.raises(CheckpointError, match='two accounts of a part'):
        read_checkpoint(tmp_path / 'x.pth')


def test_two_lists_of_parts_are_refused(tmp_path):
    """Readers differ in how they find the list of a large archive."""
    data = saved(weights())
    assert data[-42:-38] == b'PK\6\7'
    moved = data[:-34] + (len(data) - 99).to_bytes(8, 'little') + data[-26:]
    (tmp_path / 'x.pth').write_bytes(moved)
    with pytest.raises(CheckpointError, match='something before its beginning or behind its end'):
        read_checkpoint(tmp_path / 'x.pth')


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path, load = tmp_path / 'x.pth', reader._load
    path.write_bytes(saved(weights()))

    def slowly(*args):
        os.utime(path)
        return load(*args)

    monkeypatch.setattr(reader, '_load', slowly)
    with pytest.raises(CheckpointError, match='was written to while it was read'):
        read_checkpoint(path)


def test_a_thread_beside_others_reads(tmp_path):
    path = tmp_path / 'x.pth'
    path.write_bytes(saved(weights()))
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(lambda: torch.randn(200, 200).inverse()) for _ in range(200)]
        found = [pool.submit(read_checkpoint, path) for _ in range(8)]
        assert all(list(each.result()) == ['state_dict'] for each in found)
        assert all(each.result() is not None for each in others)


def test_a_teacher_is_told_by_its_digest(tmp_path):
    path = tmp_path / 'x.pth'
    path.write_bytes(saved(weights()))
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(load_verified(str(path), own.upper())['state_dict']['b'], torch.zeros(4))
    with pytest.raises(CheckpointError, match=rf'SHA-256 is {own}, and 0{{64}} was asked for'):
        load_verified(str(path), '0' * 64)
    with pytest.raises(CheckpointError, match='give the 64 hex digits'):
        load_verified(str(path), own[:8])
    with pytest.raises(CheckpointError, match='no SHA-256 is checked for s3://'):
        load_verified('s3://bucket/x.pth', own)
    named = path.rename(tmp_path / f'x_20200130-{own[:8]}.pth')
    assert list(read_checkpoint(named)) == ['state_dict']


def test_the_teachers_digest_is_checked_and_is_no_part_of_the_student(tmp_path):
    config = str(tiny_config(tmp_path))
    network = MODELS.build(Config.fromfile(config).model)
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'teacher.pth')
    own = hashlib.sha256((tmp_path / 'teacher.pth').read_bytes()).hexdigest()
    source = str(tmp_path / 'teacher.pth')
    assert Teacher(config, source, sha256=own).loaded > 100
    with pytest.raises(CheckpointError, match=rf'SHA-256 is {own}, and 1{{64}} was asked for'):
        Teacher(config, source, sha256='1' * 64)
    assert 'teacher_sha256' not in plain_student(
        dict(type='x', teacher_sha256=own, distillation={})
    )


if __name__ == '__main__':
    for asked in sys.stdin:
        tried = hostile.attempt(asked.rstrip('\n'), Path(sys.argv[1], 'files'))
        print(json.dumps(tried[1:]), flush=True)
