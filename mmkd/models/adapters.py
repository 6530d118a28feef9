"""Adaptation layers: from the student's guided layer to the shape of the teacher's hint layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .alignment import View

KINDS = ('conv1x1', 'conv3x3', 'linear', 'identity')


def build_adapter(guided: Sequence[int], hint: Sequence[int], kind: str | None = None) -> nn.Module:
    """Build the adaptation layer between two features of the given shapes (section 3.4).

    The paper puts one even where the shapes agree already; it also matches the norms.

    Args:
        guided: shape of the student's feature, (N, C, H, W) or (n, C).
        hint: shape of the teacher's feature.
        kind: 'conv1x1' or 'conv3x3' between maps, 'linear' between vectors, 'identity' for none;
            None is the paper's, a 1×1 convolution or a linear layer.

    Raises:
        ValueError: if one is a map and the other a vector, or neither, or the kind does not fit.
    """
    shapes = f'{tuple(guided)} to {tuple(hint)}'
    if kind is not None and kind not in KINDS:
        raise ValueError(f'adapter {kind!r} must be one of {", ".join(KINDS)}')
    dims = len(guided) if len(guided) == len(hint) else 0
    if dims not in (2, 4):
        raise ValueError(
            f'no adaptation layer leads from shape {shapes}: hints join two maps (N, C, H, W) or '
            'two vectors (n, C)'
        )
    if kind is None:
        kind = 'conv1x1' if dims == 4 else 'linear'
    if kind == 'identity':
        if guided[1] != hint[1]:
            raise ValueError(
                f"adapter 'identity' cannot lead from shape {shapes}: the channels differ, so one "
                'of the other kinds has to map them'
            )
        return nn.Identity()
    if (kind == 'linear') != (dims == 2):
        raise ValueError(
            f'adapter {kind!r} cannot lead from shape {shapes}: between maps it is conv1x1 or '
            'conv3x3, between vectors linear'
        )
    if kind == 'linear':
        return nn.Linear(guided[1], hint[1])
    size = 3 if kind == 'conv3x3' else 1
    return nn.Conv2d(guided[1], hint[1], size, padding=size // 2)


def set_identity(adapter: nn.Module) -> None:
    """Let ``adapter`` start as the identity, on as many channels as both sides have."""
    if isinstance(adapter, nn.Identity):
        return
    if isinstance(adapter, nn.Conv2d):
        nn.init.dirac_(adapter.weight)
    else:
        nn.init.eye_(adapter.weight)
    nn.init.zeros_(adapter.bias)


def resample(
    hint: Tensor,
    guided: Tensor,
    strides: tuple[float, float] | None = None,
    view: View | None = None,
) -> Tensor:
    """Bring the teacher's map to the student's grid, where the two differ. The paper pads instead.

    Bilinear, at the place in the image of each of the student's cells. Cell i of a map of stride s
    covers the pixels [s · i, s · (i + 1)) and stands for their middle, as RoIAlign reads it: what
    is pooled from one RoI agrees if the maps do. A convolution's own middle is s · i + 0.5, but the
    trained necks that were measured look where RoIAlign does (``benchmarks/hint_alignment.py``).

    Args:
        hint: (N, C, H, W).
        guided: (N, C', H', W').
        strides: pixels of the own image from cell to cell, of the student and of the teacher; None
            where the maps are not over an image (of a RoI, say): they are then stretched.
        view: where the teacher's images lie over the student's; None for the same place.

    Returns:
        (N, C, H', W'); ``hint`` itself where the two grids are one.
    """
    if hint.dim() != 4:
        return hint
    same_size = hint.shape[2:] == guided.shape[2:]
    if strides is None:
        if same_size:
            return hint
        return F.interpolate(hint, guided.shape[2:], mode='bilinear', align_corners=False)
    if view is None and (same_size and strides[0] == strides[1]):
        return hint
    axes = []
    for axis, cells in enumerate(guided.shape[:1:-1]):
        place = (torch.arange(cells, device=hint.device) + 0.5) * strides[0]
        place = place.expand(len(hint), -1)
        if view is not None:
            place = place * view.scale[:, axis, None] + view.offset[:, axis, None]
        # -1 and 1 are the outer edges of the first and the last cell.
        axes.append((2 * place / (strides[1] * hint.size(3 - axis)) - 1).float())
    x, y = axes[0][:, None, :], axes[1][:, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1)
    return F.grid_sample(
        hint.float(), grid, mode='bilinear', padding_mode='border', align_corners=False
    )
