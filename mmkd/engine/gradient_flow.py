"""Checks that a distillation term is finite and that its gradient reaches the student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


class DeadTermError(RuntimeError):
    """The gradient of a distillation term does not reach the student."""


def prove(term: str, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Check that ``loss`` is finite and that its autograd graph contains the student's parameters.

    The gradient's value is no criterion: equation (4) is 0 where the student is better than its
    teacher. Walking the graph computes nothing, and works with DDP, AMP and activation
    checkpointing.

    Args:
        term: the name under which the loss is logged.
        loss: a scalar.
        parameters: the student's, without adaptation layers.

    Raises:
        DeadTermError: if the loss is not finite, or no gradient can reach a parameter.
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
    # The graph does not contain the parameters inside a reentrant activation checkpoint.
    return any(
        id(getattr(node, 'variable', None)) in leaves or 'CheckpointFunction' in node.name()
        for node in _nodes(loss)
    )


def has_checkpoints(loss: Tensor) -> bool:
    """Whether the graph of ``loss`` contains a reentrant activation checkpoint."""
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
