"""Mutates checkpoints where it hurts, and reads them in child processes.

Pickle instructions, their numbers and texts, the zip archive's lists, the header of safetensors,
and plain bytes are changed; what holds the changed part gets fitting sizes and CRCs most of the
time, so that the change is reached. A case is lost when the child crashes, hangs for 10 seconds,
takes more than 1.25 times the file and 200 MB, or raises anything but a CheckpointError.

    python benchmarks/reliability/fuzz.py --seconds 60 --json out.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickletools
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from campaign import report  # noqa: E402

HANG, MEMORY = 10, 200e6
NUMBERS = (0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, -(2**63))
TEXTS = (b'', b'storage', b'cpu', b'meta', b'cuda:0', b'0', b'1', b'__mmkd__', b'dict', b'\xff')
GLOBALS = (
    *(b'torch\nFloatStorage', b'torch\nDoubleStorage', b'torch\nBoolStorage', b'torch\nfloat32'),
    *(b'torch._utils\n_rebuild_tensor_v2', b'torch._utils\n_rebuild_tensor_v3', b'os\nsystem'),
    *(b'torch._utils\n_rebuild_sparse_tensor', b'collections\nOrderedDict', b'numpy\ndtype'),
    *(b'collections\nCounter', b'numpy\nndarray', b'__builtin__\nset', b'__builtin__\ngetattr'),
    *(b'torch\nSize', b'torch\ndevice', b'_codecs\nencode', b'numpy._core.multiarray\nscalar'),
    b'mmengine.logging.history_buffer\nHistoryBuffer',
)
OPCODES = [op.code.encode('latin1') for op in pickletools.opcodes]


# --- mutations ------------------------------------------------------------------------------------


def instructions(data: bytes) -> list[bytes]:
    """A pickle cut into its instructions; what is behind its end is one more."""
    starts = [at for _, _, at in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Some instructions otherwise."""
    try:
        parts = instructions(data)
    except Exception:  # mutated before
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        match rng.randrange(8):
            case 0:
                del parts[at]
                parts = parts or [b'.']
            case 1:
                parts.insert(at, rng.choice(parts))
            case 2:
                other = rng.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = rng.choice(OPCODES) + parts[at][1:]
            case 4:
                numbers = [i for i, part in enumerate(parts) if part[:1] in b'KMJ\x8a']
                at = rng.choice(numbers or [at])
                value = rng.choice(NUMBERS)
                raw = value.to_bytes(9, 'little', signed=True)
                parts[at] = b'\x8a' + bytes([len(raw)]) + raw
            case 5:
                texts = [i for i, part in enumerate(parts) if part[:1] == b'X']
                at, text = rng.choice(texts or [at]), rng.choice(TEXTS)
                parts[at] = b'X' + struct.pack('<I', len(text)) + text
            case 6:
                names = [i for i, part in enumerate(parts) if part[:1] == b'c']
                parts[rng.choice(names or [at])] = b'c' + rng.choice(GLOBALS) + b'\n'
            case 7:
                memos = [i for i, part in enumerate(parts) if part[:1] in b'hq']
                parts[rng.choice(memos or [at])] = bytes([rng.choice(b'hq'), rng.randrange(256)])
    return b''.join(parts)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes otherwise, wherever they are."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(raw) + 1)
        span = rng.choice((1, 2, 4, 8, 30, 46))
        match rng.randrange(5):
            case 0:
                raw[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del raw[at : at + span]
            case 2:
                other = rng.randrange(len(raw) + 1)
                raw[at:at] = raw[other : other + span]
            case 3:
                wide = rng.choice(('<H', '<I', '<Q'))
                limit = 2 ** (8 * struct.calcsize(wide)) - 1
                raw[at : at + struct.calcsize(wide)] = struct.pack(
                    wide, rng.choice(NUMBERS) & limit
                )
            case 4:
                del raw[rng.randrange(len(raw) + 1) :]
        raw = raw or bytearray(b'P')
    return bytes(raw)


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """One field of one list of the archive otherwise."""
    marks = [b'PK\1\2', b'PK\3\4', b'PK\5\6', b'PK\6\6', b'PK\6\7']
    places = [i for i in range(len(data)) if data[i : i + 4] in marks]
    if not places:
        return mutate_bytes(data, rng)
    raw = bytearray(data)
    at = rng.choice(places) + rng.randrange(4, 50, 2)
    wide = rng.choice(('<H', '<I', '<Q'))
    value = rng.choice((*NUMBERS, len(data), *places)) & 2 ** (8 * struct.calcsize(wide)) - 1
    raw[at : at + struct.calcsize(wide)] = struct.pack(wide, value)
    return bytes(raw)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """One value of a safetensors header otherwise."""
    (length,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = rng.choice([e for k, e in header.items() if k != '__metadata__'])
    match rng.randrange(4):
        case 0:
            entry['dtype'] = rng.choice(('F64', 'F32', 'BF16', 'BOOL', 'I8', 'X', None, 3))
        case 1:
            entry['shape'] = [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]
        case 2:
            entry['data_offsets'] = [rng.choice((*NUMBERS, 12, 24)) for _ in range(2)]
        case 3:
            entry[rng.choice(list(entry))] = rng.choice(([], {}, None, True, 'x', 1.5))
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + length :]


def mutate(seed: tuple[str, bytes], rng: random.Random) -> bytes:
    """One case from one seed: (form, bytes)."""
    form, data = seed
    if form == 'safetensors':
        return rng.choice((mutate_header, mutate_header, mutate_bytes))(data, rng)
    if form == 'legacy':
        return rng.choice((mutate_pickle_in_legacy, mutate_bytes))(data, rng)
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(data, rng)
    if kind == 1:
        return mutate_zip(data, rng)
    import hostile

    parts = hostile.parts_of(data)
    name = next(n for n in parts if n.endswith('data.pkl'))
    parts[name] = mutate_pickle(parts[name], rng)
    if rng.random() < 0.2:
        name = rng.choice(list(parts))
        parts[name] = mutate_bytes(parts[name] or b'\0', rng)
    return hostile.zipped(parts)


def mutate_pickle_in_legacy(data: bytes, rng: random.Random) -> bytes:
    """One of the pickles of the older format otherwise."""
    file = io.BytesIO(data)
    ends = [0]
    for _ in range(5):
        list(pickletools.genops(file))
        ends.append(file.tell())
    which = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
    a, b = ends[which], ends[which + 1]
    return data[:a] + mutate_pickle(data[a:b], rng) + data[b:]


# --- reading --------------------------------------------------------------------------------------


def genuine() -> list[tuple[str, bytes]]:
    """Small files of all formats: (form, bytes)."""
    import hostile
    import torch
    from test_checkpoint import every_tensor, safetensors_of, training_checkpoint

    from mmkd.io.checkpoint import to_plain

    small = {'a': torch.ones(3), 'b': torch.tensor([True, False]), 'c': torch.zeros(2, 2)}
    values = [hostile.weights(), training_checkpoint(), to_plain(training_checkpoint())]
    values.append(every_tensor())
    old = dict(_use_new_zipfile_serialization=False)
    return [
        *[('zip', hostile.saved(value)) for value in values] * 4,
        *[('legacy', hostile.saved(value, **old)) for value in values] * 2,
        *[('safetensors', safetensors_of(small))] * 2,
    ]


def wild() -> list[tuple[str, bytes]]:
    """The smaller hostile files."""
    import hostile

    made = [
        case.make('/nonexistent/marker')
        for case in hostile.HOSTILE.values()
        if case.kind in ('code', 'memory', 'bomb') and case.file == 'x.pth'
    ]
    return [('zip', data) for data in made if len(data) < 20000 and data[:2] == b'PK']


def child(folder: Path, seed: int, seconds: float) -> None:
    """Reads cases until the time is over; the case at hand is on disk."""
    import hostile
    import torch

    from mmkd.io.checkpoint import CheckpointError, from_plain, read_checkpoint

    rng = random.Random(seed)
    torch.manual_seed(0)
    known = genuine(), wild()
    counts = dict(tried=0, refused=0, read=0)
    lost: list[str] = []

    def hang(*_: object) -> None:
        raise TimeoutError(f'more than {HANG} s')

    signal.signal(signal.SIGALRM, hang)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        chosen = rng.choice(known[rng.randrange(2)])
        data = mutate(chosen, rng)
        path = folder / ('x.safetensors' if chosen[0] == 'safetensors' else 'x.pth')
        path.write_bytes(data)
        counts['tried'] += 1
        before = hostile.reset_peak()
        failure = None
        signal.alarm(HANG)
        try:
            touch(from_plain(read_checkpoint(path)))
            counts['read'] += 1
        except CheckpointError:
            counts['refused'] += 1
        except BaseException as error:
            failure = f'{type(error).__name__}: {error}'[:160]
        signal.alarm(0)
        if hostile.peak() - before > 1.25 * len(data) + MEMORY:
            failure = f'{(hostile.peak() - before) / 1e6:.0f} MB for {len(data)} bytes'
        if failure:
            kept = folder / f'lost-{seed}-{counts["tried"]}{path.suffix}'
            shutil.copy(path, kept)
            lost.append(f'seed {seed}, case {counts["tried"]}: {failure}')
        if counts['tried'] % 50 == 0 or failure:
            (folder / 'progress.json').write_text(json.dumps(dict(counts, lost=lost)))
    (folder / 'progress.json').write_text(json.dumps(dict(counts, lost=lost, done=True)))


def touch(obj: object) -> None:
    """Uses every number of every tensor, as training would."""
    import torch

    if isinstance(obj, torch.Tensor):
        obj.detach().clone().flatten().view(-1)
    elif isinstance(obj, dict):
        for value in obj.values():
            touch(value)
    elif isinstance(obj, list | tuple):
        for value in obj:
            touch(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.seed, args.seconds)
        return
    start = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seed = args.seed
        while (left := args.seconds - (time.perf_counter() - start)) > 5 or not rows:
            span = min(60, max(left, 5))
            (folder / 'progress.json').write_text(
                '{"tried": 0, "refused": 0, "read": 0, "lost": []}'
            )
            process = subprocess.run(
                [sys.executable, __file__, '--child', name, '--seed', str(seed)]
                + ['--seconds', str(span)],
                timeout=span + 120,
                stderr=subprocess.PIPE,
            )
            row = json.loads((folder / 'progress.json').read_text())
            if process.returncode or not row.pop('done', False):
                tail = process.stderr[-300:].decode(errors='replace')
                row['lost'].append(
                    f'seed {seed}: the process ended with {process.returncode}: {tail}'
                )
                shutil.copy(folder / 'x.pth', folder / f'lost-{seed}.pth')
            rows.append(dict(seed=seed, **row))
            print(f'seed {seed}: {row}', flush=True)
            seed += 1
        kept = sorted(folder.glob('lost-*'))
        if kept:
            target = Path(tempfile.mkdtemp(prefix='fuzz-lost-'))
            for path in kept:
                shutil.copy(path, target)
            print(f'the lost cases are in {target}')
    tried, lost = sum(row['tried'] for row in rows), sum(len(row['lost']) for row in rows)
    notes = [
        f'{sum(row["refused"] for row in rows)} refused with a CheckpointError, '
        f'{sum(row["read"] for row in rows)} read and used',
        f'lost: a crash, {HANG} s, memory beyond 1.25 times the file and 200 MB, or any other '
        'exception',
    ]
    sys.exit(report('fuzz', tried, lost, start, notes, rows, args.json))


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main()
