"""Decoupled knowledge distillation."""

from __future__ import annotations

from torch import Tensor

from ..models.chen2017 import to_float32
from ..models.heads import Rows
from ..recipe import number
from ..registry import TERMS
from .base import LogitTerm, average, divergence, without_target


@TERMS.register_module()
class DKD(LogitTerm):
    r"""KL in two parts: the target against the rest, and the rest among themselves.

    Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.

    .. math:: \frac{\tau^2}{n} \sum_i \bigl( \alpha\, \mathrm{KL}(b^t_i \,\|\, b^s_i)
        + \beta\, \mathrm{KL}(\hat t_i \,\|\, \hat s_i) \bigr)

    s and t are the logits (n, C + 1) over τ; b is (p, 1 - p) with p the softmax of the target; a
    hat is the softmax of the other classes alone. The background is a class like the others. Rows
    are weighted and divided as in the head's own loss.

    Needs: rows of a RoI head with a softmax, labels.
    Parameters: none.
    Public code: the authors' is equal, but infinite where float32 rounds 1 - p to 0; ours takes
        logarithms of sums. MMRazor's ``reduction`` of 'mean' and 'none' acts as 'sum'.
    Defaults: α = 1, β = 0.25, τ = 1, the authors' for detectors.

    Args:
        alpha: α, of the target.
        beta: β, of the rest.
        tau: τ, the temperature.
    """

    classes = 2

    def __init__(self, alpha: float = 1.0, beta: float = 0.25, tau: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta = number('DKD', 'alpha', alpha, 0), number('DKD', 'beta', beta, 0)
        self.tau = number('DKD', 'tau', tau, 1e-3)

    def compare(self, rows: Rows) -> dict[str, Tensor]:
        split, rest = [], []
        for logits in (rows.student, rows.teacher.detach()):
            logs = (to_float32(logits) / self.tau).log_softmax(1)
            rest.append(without_target(logs, rows.target))
            target = logs.gather(1, rows.target[:, None])[:, 0]
            split.append((target, rest[-1].logsumexp(1)))
        binary = sum(t.exp() * (t - s) for s, t in zip(*split, strict=True))
        return dict(
            target=self.alpha * average(rows, self.tau**2 * binary),
            rest=self.beta * average(rows, self.tau**2 * divergence(*rest)),
        )
