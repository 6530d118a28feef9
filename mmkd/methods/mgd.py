"""Masked generative distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..recipe import number
from ..registry import TERMS
from .base import LEVELS, MapTerm, per_image


@TERMS.register_module()
class MGD(MapTerm):
    r"""A generator makes the teacher's map out of what is left of the student's.

    Yang et al., "Masked Generative Distillation", ECCV 2022.

    .. math:: \frac{1}{N} \| G(M \odot S) - T \|^2, \qquad
        M_{nhw} = [\,\mathrm{rand} \le 1 - \lambda\,]

    S and T are the student's and the teacher's map, (N, C, H, W); G is a 3×3 convolution, ReLU and
    a 3×3 convolution, one for each pair; the pairs are summed. What is kept is not rescaled. The
    sum over places makes the value depend on the resolution.

    Needs: layer pairs. It draws from PyTorch's generator, which a checkpoint holds.
    Parameters: 2 (9 C² + C) for each pair (4.7 M for four of 256 channels).
    Public code: the authors' and MMRazor's are equal.
    Defaults: P2 to P5, weight 5e-7 and λ = 0.45, the authors' for two-stage detectors.

    Args:
        lambda_mgd: λ, the share of the places that is hidden.
        mask_on_channel: hide channels in the place of places.
    """

    loss_weight = 5e-7
    entries = LEVELS

    def __init__(self, lambda_mgd: float = 0.45, mask_on_channel: bool = False) -> None:
        super().__init__()
        self.ratio = number('MGD', 'lambda_mgd', lambda_mgd, 0, 1)
        self.mask_on_channel = mask_on_channel

    def build(self, pair: LayerPair) -> nn.Module:
        width = pair.channels[1]
        return nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def draw(self, maps: Tensor) -> Tensor:
        """Uniform numbers, one for each place (N, 1, H, W), or channel (N, C, 1, 1)."""
        only = maps[:, :, :1, :1] if self.mask_on_channel else maps[:, :1]
        return torch.rand(only.shape, device=maps.device)

    def compare(self, student: Tensor, teacher: Tensor, layers: Any, boxes: Any) -> Tensor:
        kept = self.draw(student) <= 1 - self.ratio
        generated = layers(student * kept)
        error = to_float32(generated) - to_float32(teacher.detach())
        return per_image(error.square().sum(), student)
