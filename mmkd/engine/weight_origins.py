"""Finds out where a network's weights come from, by comparing them with the checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint_with_prefix
from torch import Tensor, nn

from ..digests import sha256
from ..options.inherit import PARTS
from ..recipe import TERM_PREFIXES


def origins(
    network: nn.Module, load_from: str | None = None, resumed: str | None = None
) -> list[str]:
    """Count the tensors of a network that are equal to those in each checkpoint.

    Args:
        network: after its weights were initialised and loaded.
        load_from: the checkpoint it was loaded from, if any.
        resumed: the checkpoint that the run is resumed from, if any.

    Returns:
        A line for each checkpoint, and one for the tensors initialised at random.

    Raises:
        ValueError: no tensor is equal to one in a checkpoint that the config names.
    """
    if resumed:
        return [f'resumed from {resumed}']
    if load_from:
        return [_loaded(network, load_from)]
    return _initialised(network)


def _loaded(network: nn.Module, path: str) -> str:
    file = CheckpointLoader.load_checkpoint(path, 'cpu')
    file = file.get('state_dict', file)
    file = {k.removeprefix('module.'): v for k, v in file.items()}
    own = _weights(network)
    same = _same(own, file)
    if not same:
        raise ValueError(
            f'load_from {path} holds not one of the {len(own)} tensors of the detector, which '
            f'would start from random weights (first of its keys: {", ".join(list(file)[:3])}): it '
            'is of another detector, or of one of another width, or its keys have another prefix'
        )
    backbone = {k: v for k, v in own.items() if k.startswith('backbone.')}
    if 2 * _equal(backbone, file) <= len(backbone):  # a backbone's file is a start
        _warn_of_noise(f'load_from {path}', same, len(own))
    rest = '' if same == len(own) else f'; THE OTHER {len(own) - same} ARE NOT IN IT'
    return f'{same} of {len(own)} tensors loaded from {path}{rest}'


def _initialised(network: nn.Module) -> list[str]:
    lines, found = [], 0
    for path, module in network.named_modules():
        for init_cfg in _pretrained(module):
            checkpoint = init_cfg['checkpoint']
            if prefix := init_cfg.get('prefix'):
                file = _load_checkpoint_with_prefix(prefix, checkpoint, 'cpu')
            else:
                file = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
                file = file.get('state_dict', file)
            own = _weights(module)
            same = _same(own, file)
            if not same:
                raise ValueError(
                    f'init_cfg of {path or "the detector"}: not one of its {len(own)} tensors was '
                    f'loaded from {checkpoint} (first of its keys: {", ".join(list(file)[:3])}), '
                    'so it would start from random weights: name a file of this depth and width, '
                    "give init_cfg.prefix='backbone.' if it holds a whole detector, or set "
                    'init_cfg=None if you want random weights'
                )
            _warn_of_noise(f'{checkpoint} (init_cfg of {path or "all"})', same, len(own))
            lines.append(f'{same} of {len(own)} tensors of {path or "all"} from {checkpoint}')
            found += same
    start = getattr(network, 'start', None)
    own = _weights(network)
    rest = len(own) - found - (sum(k in own for k in start.taken) if start else 0)
    return [*lines, f'{rest} of {len(own)} tensors initialised at random']


def warn_of_inheritance(start: Any) -> None:
    """Warns if the student could take little of what its start from the teacher is to give."""
    parts = [(key.partition('.')[0], key in start.left) for key in (*start.taken, *start.left)]
    # A Cascade R-CNN takes one stage of three, and the whole of the neck that its heads stand on.
    first_part = min((part for part, _ in parts), key=PARTS.index)
    if parts.count((first_part, True)) < parts.count((first_part, False)):
        return
    of = len(parts)
    first = next(iter(start.left.items()), ('', ''))
    _warn_of_noise(
        "the teacher (distillation.start='teacher')", len(start.taken), of,
        f'The first that does not fit is {first[0]}: {first[1]}',
    )  # fmt: skip


def _warn_of_noise(
    what: str, same: int, of: int,
    why: str = 'Is it the file of another network, or of another width?',
) -> None:  # fmt: skip
    if 2 * same < of:
        print_log(
            f'{what} holds {same} of the {of} tensors that it is for: MOST OF THEM DO NOT START '
            f'FROM IT. {why}',
            logger='current',
            level=logging.WARNING,
        )


def _weights(module: nn.Module) -> dict[str, Tensor]:
    # Integer buffers (BatchNorm's counters, position indices) are equal in unrelated networks.
    return {
        k: v
        for k, v in module.state_dict().items()
        if not k.startswith(TERM_PREFIXES) and v.is_floating_point()
    }


def _same(own: dict[str, Tensor], file: dict[str, Any]) -> int:
    """Number of weights that are equal to one in the file: of the same name, else of any name.

    A backbone may load the file of another library, whose names differ.
    """
    if same := _equal(own, file):
        return same
    theirs = {(v.shape, sha256(v)) for v in _tensors(file) if _varies(v)}
    return sum(_varies(v) and (v.shape, sha256(v)) in theirs for v in own.values())


def _equal(own: dict[str, Tensor], file: dict[str, Any]) -> int:
    """Number of weights that are equal to those of the same name in the file."""
    return sum(k in file and torch.equal(v.cpu(), file[k]) for k, v in own.items())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)


def _varies(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any())


def _pretrained(module: nn.Module) -> list[dict]:
    init_cfg = getattr(module, 'init_cfg', None) or []
    init_cfgs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg
    return [c for c in init_cfgs if c['type'] == 'Pretrained']
