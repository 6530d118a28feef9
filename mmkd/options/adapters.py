"""Adaptation layers: from the student's guided layer to the shape of the teacher's hint layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

KINDS = ('conv1x1', 'conv3x3', 'linear', 'identity', 'match')


def build_adapter(guided: Sequence[int], hint: Sequence[int], kind: str | None = None) -> nn.Module:
    """The adaptation layer between two features of the given shapes (section 3.4).

    The paper puts one even where the shapes agree already; it also matches the norms.

    Args:
        guided: shape of the student's feature, (N, C, H, W) or (n, C).
        hint: shape of the teacher's.
        kind: 'conv1x1' or 'conv3x3' between maps, 'linear' between vectors, 'identity' for none,
            'match' for none where the channels agree; None is the paper's, a 1×1 convolution or a
            linear layer.

    Raises:
        ValueError: if one is a map and the other a vector, or neither, or the kind does not fit.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f'adapter {kind!r} must be one of {", ".join(KINDS)}')
    shapes = f'{tuple(guided)} to {tuple(hint)}'
    dims = len(guided) if len(guided) == len(hint) else 0
    if dims not in (2, 4):
        raise ValueError(
            f'no adaptation layer leads from shape {shapes}: hints join two maps (N, C, H, W) or '
            'two vectors (n, C)'
        )
    kinds = ['conv1x1', 'conv3x3'] if dims == 4 else ['linear']
    if kind == 'match' and guided[1] == hint[1]:
        kind = 'identity'
    if kind in (None, 'match'):
        kind = kinds[0]
    if kind == 'identity' and guided[1] != hint[1]:
        raise ValueError(
            f"adapter 'identity' cannot lead from shape {shapes}: the channels differ, so one of "
            'the other kinds has to map them'
        )
    if kind not in [*kinds, 'identity']:
        raise ValueError(
            f'adapter {kind!r} cannot lead from shape {shapes}: between maps it is conv1x1 or '
            'conv3x3, between vectors linear'
        )
    if kind == 'identity':
        return nn.Identity()
    if kind == 'linear':
        return nn.Linear(guided[1], hint[1])
    size = 3 if kind == 'conv3x3' else 1
    return nn.Conv2d(guided[1], hint[1], size, padding=size // 2)


@torch.no_grad()
def set_identity(terms: nn.ModuleDict) -> None:
    """Let the adaptation layers of all terms begin as the identity, on as many channels as both
    sides have."""
    for term in terms.values():
        for pair in getattr(term, 'pairs', ()) if term.needs().pairs else ():
            adapter = dict(getattr(term, 'adapters', {})).get(pair.name)
            if isinstance(adapter, (nn.Conv2d, nn.Linear)):
                start = nn.init.dirac_ if isinstance(adapter, nn.Conv2d) else nn.init.eye_
                start(adapter.weight)
                nn.init.zeros_(adapter.bias)
