"""Divergence from the teacher's distribution."""

from __future__ import annotations

from torch import Tensor

from ..models.chen2017 import to_float32
from ..models.heads import Rows
from ..recipe import number
from ..registry import TERMS
from .base import LogitTerm, average, divergence, standardised


@TERMS.register_module()
class KL(LogitTerm):
    r"""Kullback-Leibler divergence of the student's distribution from the teacher's.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015; standardised
    logits: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.

    .. math:: \frac{\tau^2}{n} \sum_i \mathrm{KL}(\mathrm{softmax}(t_i / \tau) \,\|\,
        \mathrm{softmax}(s_i / \tau)), \qquad
        \text{standardised: } z \to \frac{z - \mathrm{mean}_c(z)}{\mathrm{std}_c(z) + 10^{-7}}

    s and t are logits of the same rows, (n, C + 1), weighted and divided as in the head's own loss;
    in a sigmoid head or RPN each column is a distribution over yes and no, and their divergences
    are summed.

    Needs: rows of the RoI head or the RPN; at least two classes if standardised.
    Parameters: none.
    Public code: MMRazor's is equal; the authors' of the standardisation has the unbiased deviation
        (equal), their paper the biased one.
    Defaults: weight 1 and τ = 1; none is published for detectors. Standardised: τ = 2, weight 9 in
        the authors' code for classification.

    Args:
        tau: τ, the temperature.
        standardise: standardise each row of logits first.
    """

    def __init__(self, tau: float = 1.0, standardise: bool = False) -> None:
        super().__init__()
        self.tau, self.standardise = number('KL', 'tau', tau, 1e-3), standardise
        if standardise:
            self.classes, self.instead = 3, 'leave standardise out'

    def compare(self, rows: Rows) -> Tensor:
        student, teacher = to_float32(rows.student), to_float32(rows.teacher)
        if self.standardise:
            student, teacher = standardised(student, 1e-7), standardised(teacher, 1e-7)
        return average(rows, divergence(student, teacher, rows.sigmoid, self.tau))
