"""The check that the loss is finite before the backward pass."""

from __future__ import annotations

from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; no weight was changed by it."""


def require_finite(total: Tensor, losses: dict[str, Tensor]) -> None:
    """Check the sum of the losses.

    Args:
        total: the sum, a scalar.
        losses: its parts, by their names in the log.

    Raises:
        NonFiniteLossError: naming the losses that are not finite.
    """
    if total.isfinite():
        return
    wrong = {k: v for k, v in losses.items() if 'loss' in k and k != 'loss' and not v.isfinite()}
    said = ', '.join(f'{name} is {value.item()}' for name, value in wrong.items())
    raise NonFiniteLossError(said or f'the sum of the losses is {total.item()}')
