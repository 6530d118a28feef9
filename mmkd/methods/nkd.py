"""Normalised knowledge distillation."""

from __future__ import annotations

from torch import Tensor

from ..models.chen2017 import to_float32
from ..models.heads import Rows
from ..recipe import number
from ..registry import TERMS
from .base import LogitTerm, average, without_target


@TERMS.register_module()
class NKD(LogitTerm):
    r"""The target, weighted by the teacher's trust in it, and the other classes among themselves.

    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
    with Normalized Loss and Customized Soft Labels", ICCV 2023.

    .. math:: - \frac{1}{n} \sum_i \bigl( p^t_{iy} \log p^s_{iy}
        + \gamma \tau^2 \sum_{c \ne y} \hat t_{ic} \log \hat s_{ic} \bigr)

    p are softmaxes of the logits (n, C + 1), y is the label; a hat is the softmax of the other
    classes' logits over τ. A cross entropy: not 0 where the student equals its teacher. Rows are
    weighted and divided as in the head's own loss.

    Needs: rows of a RoI head with a softmax, labels.
    Parameters: none.
    Public code: the authors' is equal, and raises where there is no RoI (here 0).
    Defaults: γ = 1.5, τ = 1, the authors' for classification; none is published for detectors.

    Args:
        gamma: γ.
        tau: τ, the temperature.
    """

    classes = 2

    def __init__(self, gamma: float = 1.5, tau: float = 1.0) -> None:
        super().__init__()
        self.gamma, self.tau = number('NKD', 'gamma', gamma, 0), number('NKD', 'tau', tau, 1e-3)

    def compare(self, rows: Rows) -> dict[str, Tensor]:
        logits = (to_float32(rows.student), to_float32(rows.teacher.detach()))
        own, theirs = (z.log_softmax(1).gather(1, rows.target[:, None])[:, 0] for z in logits)
        own_rest, rest = (
            (without_target(z, rows.target) / self.tau).log_softmax(1) for z in logits
        )
        others = (rest.exp() * own_rest).sum(1)
        return dict(
            target=-average(rows, theirs.exp() * own),
            rest=-self.gamma * self.tau**2 * average(rows, others),
        )
