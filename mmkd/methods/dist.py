"""Distillation from a stronger teacher: correlations in the place of distances."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm

from ..models.chen2017 import to_float32
from ..models.heads import Rows
from ..recipe import number
from ..registry import TERMS
from .base import LogitTerm, centred, with_weight


@TERMS.register_module()
class DIST(LogitTerm):
    r"""Probabilities that correlate with the teacher's, over classes and over rows.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.

    .. math:: \tau^2 \bigl( \beta\, (1 - \mathrm{mean}_i\, r(p^s_{i}, p^t_{i}))
        + \gamma\, (1 - \mathrm{mean}_c\, r(p^s_{\cdot c}, p^t_{\cdot c})) \bigr)

    p are softmaxes of the logits (n, C + 1) over τ, r is Pearson's correlation, with 1e-8 added to
    the product of the norms. The second part depends on which RoIs the local batch has. Rows that
    the head's own loss gives no weight are left out.

    Needs: rows of a RoI head with a softmax.
    Parameters: none.
    Public code: the authors' and MMRazor's are equal, with NaN where there is no RoI (here 0).
    Defaults: weights 1 and 1, τ = 1, as in MMRazor for detectors.

    Args:
        inter_loss_weight: β, of the correlation over the classes of each row.
        intra_loss_weight: γ, of the correlation over the rows of each class.
        tau: τ, the temperature.
    """

    classes = 2

    def __init__(
        self, inter_loss_weight: float = 1.0, intra_loss_weight: float = 1.0, tau: float = 1.0
    ) -> None:
        super().__init__()
        self.inter = number('DIST', 'inter_loss_weight', inter_loss_weight, 0)
        self.intra = number('DIST', 'intra_loss_weight', intra_loss_weight, 0)
        self.tau = number('DIST', 'tau', tau, 1e-3)

    def compare(self, rows: Rows) -> dict[str, Tensor]:
        kept = with_weight(rows)
        student, teacher = (
            (to_float32(logits[kept]) / self.tau).softmax(1)
            for logits in (rows.student, rows.teacher.detach())
        )
        return dict(
            inter=self.inter * self.tau**2 * uncorrelated(student, teacher),
            intra=self.intra * self.tau**2 * uncorrelated(student.T, teacher.T),
        )


def uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """1 minus the mean correlation of the rows of two matrices; 0 of empty ones."""
    if not student.numel():
        return student.sum()
    student, teacher = centred(student), centred(teacher)
    norms = vector_norm(student, dim=1) * vector_norm(teacher, dim=1)
    return 1 - ((student * teacher).sum(1) / (norms + 1e-8)).mean()
