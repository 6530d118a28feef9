"""Feature richness score."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compatibility import same_anchors
from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..models.step import Step
from ..recipe import Needs, number
from ..registry import TERMS
from .base import LevelTerm


@TERMS.register_module()
class FRS(LevelTerm):
    r"""Maps and objectness, each place weighted by the objectness that the teacher's RPN sees.

    Du et al., "Distilling Object Detectors with Feature Richness", NeurIPS 2021.

    .. math:: \sum_l \frac{1}{\sum m} \Bigl( w_f \sum_{nchw} m_{nhw} (a(S) - T)^2
        + w_r \sum_{nahw} m_{nhw} \mathrm{BCE}(\sigma(s), \sigma(t)) \Bigr), \qquad
        m = \max_a \sigma(t)

    S and T are the student's and the teacher's map of level l, (N, C, H, W), s and t the logits of
    the two RPNs, (N, A, H, W); m is without gradient, and where it is 0 all over, so is the loss.

    Needs: layer pairs at strides of the RPN, the teacher's score maps, the student's RPN logits.
    Parameters: the adapter a, a 3×3 convolution of 9 C² + C for each pair (3.0 M for five of 256
        channels).
    Public code: the authors' takes BCE of probabilities, which has no gradient beyond logits of ±18
        in float32; ours is of logits.
    Defaults: P2 to P6 and weights 0.002 and 0.1, the authors', who let both rise over 500 steps.

    Args:
        feature_weight: w_f.
        rpn_weight: w_r.
    """

    adapter = 'conv3x3'

    def __init__(self, feature_weight: float = 0.002, rpn_weight: float = 0.1) -> None:
        super().__init__()
        self.feature_weight = number('FRS', 'feature_weight', feature_weight, 0)
        self.rpn_weight = number('FRS', 'rpn_weight', rpn_weight, 0)

    def needs(self) -> Needs:
        rows = (('rpn', 'cls'),) if self.rpn_weight else ()
        return Needs(pairs=self.entries, rows=rows, score_maps=True)

    def check_networks(self, student: Any, teacher: Any) -> None:
        super().check_networks(student, teacher)
        if getattr(teacher, 'rpn_head', None) is None:
            raise ValueError(
                "FRS looks at what the teacher's RPN sees, and this teacher has none: take a "
                'method that needs none, such as PKD'
            )
        generators: list[Any] = [
            getattr(n.rpn_head, 'prior_generator', None) for n in (student, teacher)
        ]
        if not hasattr(generators[1], 'base_anchors'):
            return  # refused in other words
        strides = [generator.strides for generator in generators]
        if strides[0] != strides[1]:
            raise ValueError(
                'FRS looks at the objectness of both RPNs level by level, and their strides are '
                f'not the same ({strides[0]} and {strides[1]}): take a teacher of the same levels'
            )
        if self.rpn_weight and (student.resolution or not same_anchors(*generators)):
            raise ValueError(
                'FRS compares the two RPNs anchor by anchor, and their anchors are not the same '
                '(another generator, or resolution): give rpn_weight=0, and it compares maps alone'
            )

    def context(self, step: Step, pair: LayerPair) -> tuple[Tensor, Tensor | None]:
        level = self.level(pair)
        own = step.objectness()[level] if self.rpn_weight else None
        return step.score_maps()[level], own

    def compare(
        self, student: Tensor, teacher: Tensor, layers: Any, scores: Any
    ) -> dict[str, Tensor]:
        theirs, own = scores
        theirs = to_float32(theirs.detach()).sigmoid()
        mask = theirs.amax(1)
        mask = mask / mask.sum().clamp(min=torch.finfo(mask.dtype).tiny)
        error = (to_float32(student) - to_float32(teacher.detach())).square().sum(1)
        parts = dict(features=self.feature_weight * (mask * error).sum())
        if own is not None:
            cross = F.binary_cross_entropy_with_logits(to_float32(own), theirs, reduction='none')
            parts['rpn'] = self.rpn_weight * (mask * cross.sum(1)).sum()
        return parts
