"""Where a cell of the student's map lies in the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options.resolution import View


def resample(
    hint: Tensor,
    guided: Tensor,
    strides: tuple[float, float] | None = None,
    view: View | None = None,
) -> Tensor:
    """Sample the teacher's map at the student's cells, bilinearly. The paper pads instead.

    Cell i of a map of stride s covers the pixels [s · i, s · (i + 1)) and stands for their middle,
    as RoIAlign reads it, so features pooled from one RoI agree if the maps do. A convolution's own
    middle is s · i + 0.5, but trained necks look where RoIAlign does
    (``benchmarks/hint_alignment.py``).

    Args:
        hint: (N, C, H, W).
        guided: (N, C', H', W').
        strides: pixels from cell to cell in the student's image and in the teacher's; None where
            the maps do not lie over an image (but over a RoI): they are stretched.
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
    if view is None and same_size and strides[0] == strides[1]:
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
