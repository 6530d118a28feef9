"""Adaptation layers: from the student's guided layer to the shape of the teacher's hint layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def build_adapter(guided: Sequence[int], hint: Sequence[int]) -> nn.Module:
    """Build the adaptation layer between two features of the given shapes (section 3.4).

    The paper puts one even where the shapes agree already; it also matches the norms.

    Args:
        guided: shape of the student's feature, (N, C, H, W) or (n, C).
        hint: shape of the teacher's feature.

    Returns:
        A 1×1 convolution between maps, a linear layer between vectors.

    Raises:
        ValueError: if one is a map and the other a vector, or neither.
    """
    if len(guided) == len(hint) == 4:
        return nn.Conv2d(guided[1], hint[1], 1)
    if len(guided) == len(hint) == 2:
        return nn.Linear(guided[1], hint[1])
    raise ValueError(
        f'no adaptation layer leads from shape {tuple(guided)} to {tuple(hint)}: hints join two '
        'maps (N, C, H, W) or two vectors (n, C)'
    )


def set_identity(adapter: nn.Module) -> None:
    """Let ``adapter`` start as the identity, on as many channels as both sides have."""
    if isinstance(adapter, nn.Conv2d):
        nn.init.dirac_(adapter.weight)
    else:
        nn.init.eye_(adapter.weight)
    nn.init.zeros_(adapter.bias)


def resample(hint: Tensor, guided: Tensor) -> Tensor:
    """Bring the teacher's map to the student's grid, where their sizes differ.

    Bilinear, pixel centres aligned (``align_corners=False``): cell (i, j) of both maps then looks
    at one place of the image. The paper pads instead.

    Args:
        hint: (N, C, H, W).
        guided: (N, C', H', W').

    Returns:
        (N, C, H', W'); ``hint`` itself where the sizes agree.
    """
    if hint.dim() != 4 or hint.shape[2:] == guided.shape[2:]:
        return hint
    return F.interpolate(hint, guided.shape[2:], mode='bilinear', align_corners=False)
