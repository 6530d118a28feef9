"""A weight given as a share of the student's gradient: measured first, then fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from mmengine.dist import all_reduce
from mmengine.logging import MessageHub, MMLogger
from torch import Tensor, nn

_MEASURED = 'mmkd_gradient_shares'


@dataclass(frozen=True)
class GradientShare:
    """Finds the factor at which a term's gradient is ``share`` times the hard losses' gradient.

    Both are norms over the student's own parameters. In each of the first ``iters`` steps the ratio
    of the two is measured, and the factor in force is ``share`` over the median so far; then it
    stays. What was measured is kept in MMEngine's message hub, so it is in every checkpoint, and a
    resumed run goes on with it.

    Args:
        share: wanted norm of the term's gradient, as a multiple of the hard losses'; above 0.
        iters: how many steps are measured.
    """

    share: float
    iters: int = 50

    def __post_init__(self) -> None:
        for name, low in (('share', 0), ('iters', 1)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value < float('inf') or value == 0:
                raise ValueError(
                    f'gradient share: {name}={value!r} must be a number '
                    + ('above 0' if low == 0 else 'of steps, 1 or more')
                )

    def measured(self, name: str) -> list[float]:
        """Ratios of the two norms, one a step, that were measured for the term ``name``."""
        ratios: dict[str, list[float]] = MessageHub.get_current_instance().get_info(_MEASURED, {})
        return ratios.get(name, [])

    def factor(self, name: str) -> float:
        """The factor in force; 1 before anything could be measured."""
        ratios = self.measured(name)
        return self.share / median(ratios) if ratios else 1.0

    def done(self, name: str) -> bool:
        """Whether the factor is fixed."""
        return len(self.measured(name)) >= self.iters

    def measure(self, name: str, term: Tensor, hard: Tensor) -> None:
        """Note one more ratio.

        Args:
            name: of the term.
            term: norm of its gradient at the student, a scalar of this process.
            hard: norm of the gradient of the hard losses.
        """
        norms = torch.stack([term, hard])
        all_reduce(norms)  # every process has to find the same factor
        if not norms.isfinite().all() or norms.min() <= 0:
            return  # a batch without boxes, say: it tells nothing
        hub = MessageHub.get_current_instance()
        ratios = dict(hub.get_info(_MEASURED, {}))
        ratios[name] = [*ratios.get(name, []), (norms[0] / norms[1]).item()]
        hub.update_info(_MEASURED, ratios)
        if self.done(name):
            MMLogger.get_current_instance().info(
                f'{name}: factor {self.factor(name):.4g} from now on; over {self.iters} steps its '
                f"gradient was {median(ratios[name]):.4g} times the hard losses', and "
                f'{self.share:g} is wanted'
            )


def gradient_norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm of the gradient of ``value`` at ``parameters``, a scalar; 0 where none arrives.

    The graph stays, and no ``.grad`` is touched.
    """
    if not value.requires_grad:
        return value.new_zeros(())
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    squares = [g.float().pow(2).sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else value.new_zeros(())
