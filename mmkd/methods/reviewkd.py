"""Knowledge review."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..registry import TERMS
from .base import BatchNorm, MapTerm


@TERMS.register_module()
class ReviewKD(MapTerm):
    r"""Each of the student's maps, fused with the coarser ones, against the teacher's of its level,
    whole and in a pyramid of means.

    Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.

    .. math:: \sum_l \frac{\sum_k 2^{-k} \,\mathrm{mse}(P_k(F_l), P_k(T_l))}{\sum_k 2^{-k}}, \qquad
        F_l = \mathrm{ABF}(S_l, \mathrm{up}(F'_{l + 1}))

    S and T are the student's and the teacher's maps, (N, C, H, W), fine to coarse. P_0 is the map
    itself; the next are means over a grid of 4×4, 2×2 and 1×1 cells, without those not below the
    map's height. ABF is a 1×1 convolution, a sum of both inputs by learned attentions (F') and a
    3×3 convolution, each with BatchNorm over the local batch.

    Needs: layer pairs of one pyramid, fine to coarse, and the same resolution in both networks.
    Parameters: 10 C² for each pair (3.3 M for five of 256 channels); none without fusion.
    Public code: the authors' is equal.
    Defaults: P2 to P6 and weight 1, the authors' for R101 to R50 (1.2 to R18, 2 to MobileNetV2).

    Args:
        fusion: fuse levels; False compares the student's maps as they are.
        mid_channels: the width of fused maps; None: the teacher's.
    """

    ordered = True

    def __init__(self, fusion: bool = True, mid_channels: int | None = None) -> None:
        super().__init__()
        if mid_channels is not None and (type(mid_channels) is not int or mid_channels < 1):
            raise ValueError(f'ReviewKD: mid_channels={mid_channels!r} must be a whole number')
        self.fusion, self.mid_channels = fusion, mid_channels

    def check_networks(self, student: Any, teacher: Any) -> None:
        if getattr(student, 'resolution', None) is not None:
            raise ValueError(
                'ReviewKD compares two pyramids level by level, so both networks must see one '
                'resolution: leave distillation.resolution out, or take CWD or PKD'
            )

    def adapt(self, pair: LayerPair) -> nn.Module:
        # The first layer of a fusion takes any width.
        return nn.Identity() if self.fusion and not pair.adapter else super().adapt(pair)

    def build(self, pair: LayerPair) -> nn.Module | None:
        if not self.fusion:
            return None
        student, teacher = pair.channels
        width = teacher if pair.adapter else student
        return Fusion(width, self.mid_channels or teacher, teacher, pair is self.pairs[-1])

    def forward(  # type: ignore[override]
        self, student: list, teacher: list, layers: list, boxes: list
    ) -> Tensor:
        coarser, total = None, 0
        for own, theirs, fuse in zip(student[::-1], teacher[::-1], layers[::-1], strict=True):
            if fuse is not None:
                own, coarser = fuse(own, coarser)
            total = total + pyramid_distance(to_float32(own), to_float32(theirs.detach()))
        return total


def pyramid_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared distance of two maps (N, C, H, W) and of their means over coarse grids."""
    if not student.numel():
        return student.sum()
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for cells in (4, 2, 1):
        if cells < student.size(2):
            weight /= 2
            pooled = (F.adaptive_avg_pool2d(maps, cells) for maps in (student, teacher))
            total, weights = total + weight * F.mse_loss(*pooled), weights + weight
    return total / weights


class Fusion(nn.Module):
    """ABF, the attention-based fusion of a map with the coarser one."""

    def __init__(self, width: int, mid: int, out: int, coarsest: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width, mid, 1, bias=False), BatchNorm(mid))
        self.outer = nn.Sequential(nn.Conv2d(mid, out, 3, padding=1, bias=False), BatchNorm(out))
        self.attention = None if coarsest else nn.Conv2d(2 * mid, 2, 1)
        for layer in (self.inner[0], self.outer[0]):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, maps: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """The fused map of the teacher's width, and what the next finer level takes."""
        maps = self.inner(maps)
        if self.attention is not None and coarser is not None:
            coarser = F.interpolate(coarser, maps.shape[2:])
            own, other = self.attention(torch.cat([maps, coarser], 1)).sigmoid().split(1, 1)
            maps = maps * own + coarser * other
        return self.outer(maps), maps
