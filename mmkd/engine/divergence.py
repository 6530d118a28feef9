"""Stops a run whose losses grow without end, before its last good checkpoint is replaced."""

from __future__ import annotations

import math
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from ..observers import GROWN
from ..recipe import log_name, term_of
from .wrappers import distils, optimizers, unwrap

HIGH, HIGH_STEPS = 100.0, 50
"""A loss this many times its first value for this many consecutive steps is divergence, not a
spike."""
ENDLESS, ENDLESS_STEPS = 1e4, 3
"""The same for a loss that is about to overflow."""
SETTLING = 50
"""Steps in force from which the reference of a term is taken."""


class DivergedError(RuntimeError):
    """The losses have grown until the weights are worthless."""


class DivergenceHook(Hook):
    """Compares the losses of each iteration with the first.

    The student's own losses are compared with those of the first iteration, and with 1 if that is
    more, since a start from trained weights begins low. A term is compared at the weight that it
    has now, since it may rise with its schedule: with its first value where the student's own
    losses have grown, else with the largest of its first steps, since it may begin at 0.

    Raises:
        DivergedError: naming the growth and its likely cause.
    """

    priority = 'NORMAL'  # what saves comes later

    def __init__(self) -> None:
        self.first = self.own = math.nan
        self.began, self.at = 0, 0
        self.high, self.endless = 0, 0
        self.terms: dict[str, list[float]] = {}
        self.beyond: tuple[str, float, float] | None = None

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Compares; raises once it is sure. RuntimeInfoHook has waited for the device."""
        losses = _losses(outputs)
        if not losses:
            return
        wrong = [f'{name} is {value}' for name, value in losses.items() if not math.isfinite(value)]
        if wrong:  # of a detector that does not look itself
            raise DivergedError(
                f'{", ".join(wrong)} in iteration {runner.iter + 1}. {self.cause(runner)}'
            )
        self.at = runner.iter + 1
        self.own = sum(v for k, v in losses.items() if not k.startswith('loss_kd_'))
        if math.isnan(self.first):
            self.first, self.began = self.own, self.at
        times = self.own / max(self.first, 1)
        self.beyond = self._term_beyond(unwrap(runner.model), losses, outputs)
        self.high = self.high + 1 if times > HIGH else 0
        self.endless = self.endless + 1 if times > ENDLESS or self.beyond else 0
        if self.high >= HIGH_STEPS or self.endless >= ENDLESS_STEPS:
            self._stop(runner)

    def _term_beyond(self, model: Any, losses: dict, outputs: dict) -> tuple | None:
        """A term that has grown without end: its name in the log, its reference, its value."""
        found = None
        for name, value in losses.items():
            key = term_of(name, model.kd_terms) if distils(model) else None
            weight = float(outputs.get(log_name(key).replace('loss', 'weight'), 1)) if key else 0
            if weight <= 0 or not value:
                continue
            early = self.terms.setdefault(name, [])
            if len(early) < SETTLING:
                early.append(value / weight)
                if not self.grown:
                    continue
            before = weight * (early[0] if self.grown else max(early))
            if value > ENDLESS * max(before, self.first, 1):
                found = name, before, value
        return found

    def _refuse(self, runner: Runner, checkpoint: dict | None = None) -> None:
        """Stops before the last good checkpoint is replaced, before a validation that would find
        nothing, and at an end as if the run had trained."""
        if self.endless:
            self._stop(runner)

    before_save_checkpoint = before_val = after_train = _refuse

    @property
    def grown(self) -> bool:
        """Whether the student's own losses have grown."""
        return self.own > GROWN * max(self.first, 1)

    def cause(self, runner: Runner) -> str:
        """The likely cause of losses that are not finite, or far too large."""
        rates = [g['lr'] for o in optimizers(runner.optim_wrapper) for g in o.param_groups]
        rate = f'{max(rates, default=math.nan):g}'
        if self.grown:
            return (
                f"The student's own losses were {self.first:.3g} in iteration {self.began} and "
                f'{self.own:.3g} in iteration {self.at}: the likely cause is the learning rate '
                f'({rate}). Lower optim_wrapper.optimizer.lr, give it a warm-up (param_scheduler), '
                'or clip the gradient (optim_wrapper.clip_grad)'
            )
        return f'Common causes are the learning rate ({rate}), an empty box, and fp16'

    def _stop(self, runner: Runner) -> None:
        if self.beyond and not self.grown:
            name, before, now = self.beyond
            key = term_of(name, unwrap(runner.model).kd_terms)
            raise DivergedError(
                f'training has diverged: {name} was at most {before:.3g} in its first steps and is '
                f"{now:.3g} in iteration {self.at}, and the student's own losses have not grown. "
                f'Lower distillation.{key}.loss_weight, or let distillation.{key}.share find it'
            )
        raise DivergedError(f'training has diverged. {self.cause(runner)}')


def _losses(outputs: Any) -> dict[str, float]:
    """The single losses of an iteration by name; their sum, where there is nothing else."""
    values = {
        name: float(value.detach()) if isinstance(value, Tensor) else float(value)
        for name, value in (outputs.items() if isinstance(outputs, dict) else ())
        if 'loss' in name and (isinstance(value, (int, float)) or getattr(value, 'ndim', 1) == 0)
    }
    return {n: v for n, v in values.items() if n != 'loss'} or values
