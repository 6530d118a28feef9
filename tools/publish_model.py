"""Prepares a checkpoint for publication: the plain student's weights, with a hash in the name.

It removes optimizer, schedulers, message hub and the weights of distillation terms. Weights and
``meta`` stay, the latter without the config, which MMDetection's inferencer would run as Python. As
in the published files of PyTorch and OpenMMLab, the name ends in the first eight digits of the
file's SHA-256: ``student.pth`` becomes ``student-1a2b3c4d.pth``.
"""

import argparse
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mmkd.engine.exit import run, stop
from mmkd.io.checkpoint import CheckpointError, read_checkpoint, to_plain
from mmkd.recipe import without_terms


def publish(in_file: str, out_file: str) -> Path:
    """Writes the published form of ``in_file``; equal weights and meta give an equal file.

    Returns:
        The path: ``out_file`` with the hash before ``.pth``.

    Raises:
        SystemExit: ``in_file`` is no checkpoint of a model, or the output exists.
    """
    if not os.path.isfile(in_file):
        stop(f'no such checkpoint: {in_file}')
    try:
        checkpoint = read_checkpoint(in_file)
    except CheckpointError as error:
        stop(str(error))
    if 'state_dict' not in checkpoint:
        stop(f'{in_file} is no training checkpoint: it has no state_dict, but {list(checkpoint)}')
    weights = checkpoint['state_dict']
    published = {
        'meta': checkpoint.get('meta', {}),
        # Cloned, since torch.save writes the whole storage of a view.
        'state_dict': {key: value.clone() for key, value in without_terms(weights).items()},
    }
    buffer = io.BytesIO()
    torch.save(to_plain(published), buffer)
    data = buffer.getvalue()
    out = Path(out_file)
    stem = out.name.removesuffix('.pth')
    final = out.with_name(f'{stem}-{hashlib.sha256(data).hexdigest()[:8]}.pth')
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(final, 'xb') as file:
            file.write(data)
    except FileExistsError:
        stop(f'{final} exists and is left as it is: remove it, or name another output')
    of_terms = len(weights) - len(published['state_dict'])
    dropped = sorted(set(checkpoint) - {'meta', 'state_dict'})
    print(
        f'{final}: {len(published["state_dict"])} tensors, {len(data) / 2**20:.1f} MiB; '
        f'left out: {of_terms} tensors of distillation terms, '
        + (', '.join(dropped) or 'nothing else')
    )
    return final


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Process a checkpoint to be published')
    parser.add_argument('in_file', help='training checkpoint')
    parser.add_argument('out_file', help='output file; the hash is put before its .pth')
    args = parser.parse_args(argv)
    publish(args.in_file, args.out_file)


if __name__ == '__main__':
    run(main)
