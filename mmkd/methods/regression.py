"""Regression towards the teacher's boxes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..models.chen2017 import to_float32
from ..models.heads import Rows
from ..models.terms import RowTerm
from ..recipe import number
from ..registry import TERMS
from .base import average


@TERMS.register_module()
class PlainRegression(RowTerm):
    r"""The student's deltas towards the teacher's, whichever of the two is better.

    Girshick, "Fast R-CNN", ICCV 2015, with the teacher's deltas in the place of the true ones: the
    unbounded counterpart of equation (4) of Chen et al., NIPS 2017.

    .. math:: \frac{1}{n} \sum_i w_i\, \ell(s_i - t_i), \qquad \ell(x) =
        \tfrac{1}{2} x^2 / \beta \text{ if } |x| < \beta \text{, else } |x| - \tfrac{1}{2} \beta

    s and t are deltas of the positive rows, (n, 4), in the student's frame; weights w and divisor n
    are those of the head's own loss.

    Needs: rows of the RoI head or the RPN.
    Parameters: none.
    Public code: MMDetection's smooth L1 and L1 loss are equal.
    Defaults: weight 1, β = 1, as in Fast R-CNN; none is published for teachers.

    Args:
        beta: β, below which the distance is squared; 0 is L1.
    """

    kind = 'bbox'

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = number('PlainRegression', 'beta', beta, 0)

    def check_networks(self, student: Any, teacher: Any) -> None:
        if self.kind != 'bbox':
            raise ValueError(
                f"PlainRegression compares deltas, so kind={self.kind!r} must be 'bbox'"
            )

    def compare(self, rows: Rows) -> Tensor:
        student, teacher = to_float32(rows.student), to_float32(rows.teacher.detach())
        each = F.smooth_l1_loss(student, teacher, reduction='none', beta=self.beta)
        return average(rows, each)
