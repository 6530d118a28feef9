"""Publishes a trained student: weights, the plain student's config, a model card.

The weights are without optimizer, schedulers, message hub and distillation terms, and without the
config in ``meta``, which MMDetection's inferencer would run as Python. As in the published files of
PyTorch and OpenMMLab, the names end in the first eight digits of the weights' SHA-256:
``student.pth`` becomes ``student-1a2b3c4d.pth``, with a ``.py`` and a ``.md`` beside it.
MMDetection alone reads them: neither mmkd nor the teacher is needed any more.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from .. import cli
from ..analysis.model_card import model_card
from ..cli import read_config_file
from ..engine.exit import stop
from ..engine.plain_config import plain_config
from ..io.checkpoint import CheckpointError, read_checkpoint, to_plain
from ..io.config_text import read_config_text
from ..recipe import without_terms


def publish(
    in_file: str, out_file: str, config: str | None = None, results: str | None = None
) -> Path:
    """Writes the published form of ``in_file``; equal weights and meta give equal weights' files.

    Args:
        in_file: a checkpoint of a run.
        out_file: the name of the weights, before the hash is put in.
        config: the config it was trained with; None: the one that the checkpoint carries.
        results: results of ``compare`` for the card; None: those beside the run, if there are any.

    Returns:
        The path of the weights: ``out_file`` with the hash before ``.pth``.

    Raises:
        SystemExit: ``in_file`` is no checkpoint of a model, its config cannot be used, or an output
            exists.
    """
    if not os.path.isfile(in_file):
        stop(f'no such checkpoint: {in_file}')
    try:
        checkpoint = read_checkpoint(in_file, config_text=True)
    except CheckpointError as error:
        stop(str(error))
    if 'state_dict' not in checkpoint:
        stop(f'{in_file} is no training checkpoint: it has no state_dict, but {list(checkpoint)}')
    meta = checkpoint.get('meta') or {}
    cfg = _config(in_file, meta.pop('cfg', None), config)
    classes = (meta.get('dataset_meta') or {}).get('classes')
    try:
        plain = plain_config(cfg, classes) if cfg is not None else None
    except ValueError as error:
        stop(f'{config or in_file}: {error}')

    weights = checkpoint['state_dict']
    published = {
        'meta': meta,
        # Cloned, since torch.save writes the whole storage of a view.
        'state_dict': {key: value.clone() for key, value in without_terms(weights).items()},
    }
    buffer = io.BytesIO()
    torch.save(to_plain(published), buffer)
    data = buffer.getvalue()
    out = Path(out_file)
    stem = f'{out.name.removesuffix(".pth")}-{hashlib.sha256(data).hexdigest()[:8]}'
    final = out.with_name(f'{stem}.pth')
    files = (
        [final] if plain is None else [final, final.with_suffix('.py'), final.with_suffix('.md')]
    )
    for file in files:
        if file.exists():
            stop(f'{file} exists and is left as it is: remove it, or name another output')
    final.parent.mkdir(parents=True, exist_ok=True)
    final.write_bytes(data)
    of_terms = len(weights) - len(published['state_dict'])
    dropped = sorted(set(checkpoint) - {'meta', 'state_dict'})
    print(
        f'{final}: {len(published["state_dict"])} tensors, {len(data) / 2**20:.1f} MiB; '
        f'left out: {of_terms} tensors of distillation terms, '
        + (', '.join(dropped) or 'nothing else')
    )
    if plain is None:
        print(
            'no config and no model card were written: name the config that it was trained with by '
            '--config'
        )
        return final
    plain.dump(files[1])
    print(f"{files[1]}: the plain student's config")
    runs = Path(results) if results else Path(in_file).resolve().parents[2] / 'results.jsonl'
    files[2].write_text(model_card(final, files[1], cfg, meta, runs if runs.is_file() else None))
    print(f'{files[2]}: the model card\n\nMMDetection loads it without mmkd:\n')
    print('    from mmdet.apis import inference_detector, init_detector')
    print(f'    model = init_detector({str(files[1])!r}, {str(final)!r}, device="cpu")')
    print("    inference_detector(model, 'image.jpg')")
    return final


def _config(in_file: str, text: Any, config: str | None) -> Config | None:
    """The config that was named, else the text in the checkpoint, which is read as data."""
    if config is not None:
        return read_config_file(config)
    if not text or not isinstance(text, str):
        return None
    try:
        found = read_config_text(text)
    except ValueError as error:
        print(f'{in_file}: the config that it carries is not run, and is no plain data: {error}')
        return None
    return Config(found) if 'model' in found else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.command_parser(__doc__)
    parser.add_argument('in_file', help='training checkpoint')
    parser.add_argument('out_file', help='output file; the hash is put before its .pth')
    parser.add_argument('--config', help='the config it was trained with (default: its own copy)')
    parser.add_argument('--results', help="compare's results.jsonl, for the model card")
    args = parser.parse_args(argv)
    publish(args.in_file, args.out_file, args.config, args.results)
