"""Attention transfer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..registry import TERMS
from .base import LEVELS, MapTerm


@TERMS.register_module()
class AT(MapTerm):
    r"""The student looks where the teacher looks: the energy of each place, over all channels.

    Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the Performance of
    Convolutional Neural Networks via Attention Transfer", ICLR 2017.

    .. math:: \frac{1}{N H W} \Bigl\| \frac{Q_S}{\|Q_S\|} - \frac{Q_T}{\|Q_T\|} \Bigr\|^2, \qquad
        Q = \mathrm{mean}_c\, x^2

    S and T are the student's and the teacher's map, (N, C, H, W) and (N, C', H, W); the norms are
    those of each image; the pairs are summed. The value falls with 1 / (H·W), hence its weight.

    Needs: layer pairs, of any widths.
    Parameters: none.
    Public code: the authors' and others (equal) square the distance, which the paper does not.
    Defaults: P2 to P5 and weight 1000, the authors' for classification; none is published for
        detectors.
    """

    loss_weight = 1000.0
    entries = LEVELS

    def adapt(self, pair: LayerPair) -> nn.Module:
        return super().adapt(pair) if pair.adapter else nn.Identity()

    def compare(self, student: Tensor, teacher: Tensor, layers: Any, boxes: Any) -> Tensor:
        own, theirs = (
            F.normalize(to_float32(maps).square().mean(1).flatten(1), dim=1)
            for maps in (student, teacher.detach())
        )
        return (own - theirs).square().sum() / max(own.numel(), 1)
