"""No dead term: each one is finite, and a gradient reaches the student through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


class DeadTermError(RuntimeError):
    """A distillation term cannot teach the student anything."""


def prove(term: str, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Show that ``loss`` is finite and that its graph leads to the student.

    It is the wiring that is tested, not the value: equation (4) is rightly 0 where the student is
    better than its teacher. So the graph is walked, nothing is computed; this holds under DDP, AMP
    and activation checkpointing alike.

    Args:
        term: the name under which the loss is logged.
        loss: its value in this step, a scalar.
        parameters: the student's own, without adaptation layers.

    Raises:
        DeadTermError: if it is not finite, or no gradient can arrive.
    """
    if not loss.isfinite():
        raise DeadTermError(
            f'{term} is {loss.item()} at the first step: look at the scale of the two networks '
            '(normalisation, checkpoints), or turn the term off by its loss_weight=0'
        )
    if not _reaches(loss, {id(p) for p in parameters if p.requires_grad}):
        raise DeadTermError(
            f'{term} is dead: no gradient arrives at the student through it, so it would teach '
            'nothing. A hint layer in a frozen stage does this (frozen_stages), or one within '
            'activation checkpointing (with_cp, activation_checkpointing), whose first pass has no '
            'gradient: take a later layer, outside of that, or turn the term off by its '
            'loss_weight=0'
        )


def _reaches(loss: Tensor, leaves: set[int]) -> bool:
    # A reentrant checkpoint keeps the parameters of its block out of the graph.
    return any(
        id(getattr(node, 'variable', None)) in leaves or 'CheckpointFunction' in node.name()
        for node in _nodes(loss)
    )


def has_checkpoints(loss: Tensor) -> bool:
    """Whether a reentrant activation checkpoint lies behind ``loss``."""
    return any('CheckpointFunction' in node.name() for node in _nodes(loss))


def _nodes(loss: Tensor) -> Iterator[Any]:
    ahead, seen = [loss.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead.extend(next_node for next_node, _ in node.next_functions)
