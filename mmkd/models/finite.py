"""A loss that is not finite."""

from __future__ import annotations

from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; the weights have not been touched by it."""


def require_finite(total: Tensor, losses: dict[str, Tensor]) -> None:
    """Stop before the backward pass where the sum that is trained on is not finite.

    Args:
        total: that sum, a scalar.
        losses: what it is made of, by the names in the log.

    Raises:
        NonFiniteLossError: naming the losses at fault.
    """
    if total.isfinite():
        return
    wrong = {k: v for k, v in losses.items() if 'loss' in k and k != 'loss' and not v.isfinite()}
    said = ', '.join(f'{name} is {value.item()}' for name, value in wrong.items())
    raise NonFiniteLossError(said or f'the sum of the losses is {total.item()}')
