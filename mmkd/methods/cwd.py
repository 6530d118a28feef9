"""Channel-wise distillation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models.chen2017 import to_float32
from ..recipe import number
from ..registry import TERMS
from .base import MapTerm, per_image


@TERMS.register_module()
class CWD(MapTerm):
    r"""Each channel of a map is a distribution over its places, and KL compares the two.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.

    .. math:: \frac{\tau^2}{N C} \sum_{n,c} \mathrm{KL}(\mathrm{softmax}_{hw}(T_{nc} / \tau) \,\|\,
        \mathrm{softmax}_{hw}(S_{nc} / \tau))

    S and T are the student's and the teacher's map, (N, C, H, W); the pairs are summed.

    Needs: layer pairs.
    Parameters: none; a 1×1 convolution for each pair of different widths.
    Public code: MMRazor's (equal) averages over images, where the paper writes the sum of one.
    Defaults: P2 to P6, weight 10 and τ = 1, as MMRazor has them for two-stage detectors.

    Args:
        tau: τ, the temperature.
    """

    loss_weight = 10.0

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        self.tau = number('CWD', 'tau', tau, 1e-3)

    def compare(self, student: Tensor, teacher: Tensor, layers: Any, boxes: Any) -> Tensor:
        own, theirs = (
            (to_float32(maps).flatten(2) / self.tau).log_softmax(2)
            for maps in (student, teacher.detach())
        )
        total = (theirs.exp() * (theirs - own)).sum()
        return per_image(self.tau**2 * total / student.size(1), student)
