"""Distillation by the Pearson correlation of channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models.chen2017 import to_float32
from ..models.terms import FeatureTerm
from ..registry import TERMS
from .base import LEVELS, standardised


@TERMS.register_module()
class PKD(FeatureTerm):
    r"""Half the squared distance of two maps whose channels are standardised, so that each counts
    alike whatever its scale: one minus the correlation r of each channel, nearly.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022.

    .. math:: \frac{1}{2 N C H W} \|\hat S - \hat T\|^2, \qquad
        \hat x = \frac{x - \mathrm{mean}_{nhw}(x)}{\mathrm{std}_{nhw}(x) + 10^{-6}}

    S and T are the student's and the teacher's map, (N, C, H, W), or vectors (n, C); the pairs are
    summed. The mean and the unbiased deviation are those of the local batch, so that the value is
    (1 - r) (n - 1) / n with n = N·H·W. A constant channel is 0, without gradient.

    Needs: layer pairs.
    Parameters: none; a 1×1 convolution for each pair of different widths.
    Public code: MMRazor's (equal) has (n - 1) / n times the paper's 1 - r, and NaN at n = 1.
    Defaults: P2 to P5 and weight 6, as MMRazor has them for Faster R-CNN.
    """

    loss_weight = 6.0
    adapter = 'match'
    entries = LEVELS

    def compare(self, student: Tensor, teacher: Tensor, layers: Any, boxes: Any) -> Tensor:
        own, theirs = (
            standardised(to_float32(maps).transpose(0, 1).flatten(1), 1e-6)
            for maps in (student, teacher.detach())
        )
        return (own - theirs).square().sum() / max(2 * own.numel(), 1)
