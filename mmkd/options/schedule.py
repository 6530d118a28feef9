"""When a distillation term is in force."""

from __future__ import annotations

from dataclasses import dataclass

from mmengine.logging import MessageHub


@dataclass(frozen=True)
class WeightSchedule:
    """A factor on a term's weight: 0, then a linear warm-up to 1, then 0 again.

    Args:
        begin: the first iteration (or epoch) at which the term is above 0.
        warmup: how many iterations (epochs) the rise from 0 to 1 takes.
        end: the iteration (epoch) from which the term is 0 again; None means never.
        by_epoch: count in epochs instead of iterations.
    """

    begin: int = 0
    warmup: int = 0
    end: int | None = None
    by_epoch: bool = False

    def __post_init__(self) -> None:
        for name in ('begin', 'warmup', 'end'):
            value = getattr(self, name)
            if type(value) is not int and not (name == 'end' and value is None):
                raise ValueError(f'{name}={value!r} must be a whole number')
        if not isinstance(self.by_epoch, bool):
            raise ValueError(f'by_epoch={self.by_epoch!r} must be True or False')
        if self.begin < 0 or self.warmup < 0 or (self.end is not None and self.end <= self.begin):
            raise ValueError(
                f'{self}: begin and warmup must be 0 or more, and end must come after begin'
            )

    def factor(self, now: int) -> float:
        """The factor in force at iteration (epoch) ``now``, in [0, 1]."""
        if now < self.begin or (self.end is not None and now >= self.end):
            return 0.0
        if now >= self.begin + self.warmup:
            return 1.0
        return (now - self.begin + 1) / (self.warmup + 1)

    def __call__(self) -> float:
        """The factor in force now, by the training loop's own count.

        Raises:
            RuntimeError: outside a training loop, where no iteration is counted.
        """
        if self.begin == self.warmup == 0 and self.end is None:
            return 1.0
        unit = 'epoch' if self.by_epoch else 'iter'
        now = MessageHub.get_current_instance().get_info(unit)
        if now is None:
            raise RuntimeError(
                f'a distillation term is scheduled, but no {unit} is counted: MMEngine counts it '
                'in RuntimeInfoHook, which Runner registers by default'
            )
        return self.factor(now)
