"""Watch the first steps of a distilled run: no term is dead, none dwarfs the student's own losses.

The detector calls each of its observers while the graph of a step is alive. They change nothing but
the factor of a term whose weight is a share of the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from mmengine.logging import MMLogger
from torch import Tensor, nn

from .options.share import gradient_norm
from .recipe import TERM_PREFIXES, UNTRAINED, log_name, turn_off
from .shipped import command

DWARFS = 10.0
"""Share of the hard losses' gradient above which a term is warned about."""
GROWN = 10.0
"""Times its first value: above it the hard loss has grown, which is no term's fault."""
COMPARED = (1, 50, 500)
"""The steps at which it is measured."""


class DeadTermError(RuntimeError):
    """A distillation term cannot teach the student anything."""


class UnownedParameterError(RuntimeError):
    """A distillation term uses a parameter that nothing trains and no checkpoint holds."""


def prove_terms(model: Any, step: Any, losses: dict, terms: dict, factors: dict) -> None:
    """Show at the first step that can that each term is finite and reaches the student.

    It is the wiring that is tested, not the value: equation (4) is rightly 0 where the student is
    better than its teacher. So the graph is walked, nothing is computed; this holds under DDP, AMP
    and activation checkpointing alike.

    Raises:
        DeadTermError: naming the term, or the layer of a term over several pairs of layers.
        UnownedParameterError: naming the term, if it learns what is no part of the detector.
    """
    if not model.unproven:
        return
    own = own_parameters(model)
    if not total(losses).isfinite():
        return  # refuse_total names all of them
    for key in sorted(model.unproven):
        term = model.kd_terms[key]
        if key not in step.silent:
            # In their sum a dead pair would hide behind a living one.
            for pair in getattr(term, 'pairs', ()) if term.needs().pairs else ():
                name = f'{log_name(key)} at {pair.student}'
                for feature in step.features(pair):
                    _require_finite(name, feature.detach().float().mean())
                _require_reaching(name, step.features(pair)[0], own)
            value = sum(terms[key].values())
            _require_finite(log_name(key), value)
            _require_reaching(log_name(key), value, own)
            _require_owned(log_name(key), value, step.known)
            model.unproven.remove(key)
            continue
        boxes = sum(len(sample.gt_instances) for sample in step.samples)
        if boxes and any(kind == 'cls' for _, kind in term.needs().rows):
            raise DeadTermError(
                f'{log_name(key)} is dead: the batch has {boxes} boxes, but the student was not '
                f'heard to classify anything. {turn_off(key).capitalize()}'
            )


def measure_shares(model: Any, step: Any, losses: dict, terms: dict, factors: dict) -> None:
    """Measure, in the first steps, the terms whose weight is a share of the gradient."""
    wanted = {
        key: term.share
        for key, term in model.kd_terms.items()
        if term.share and factors[key] > 0 and not term.share.done(log_name(key))
    }
    if wanted:
        own = own_parameters(model)
        norm = gradient_norm(total(losses), own)
        for key, share in wanted.items():
            share.measure(log_name(key), gradient_norm(sum(terms[key].values()), own), norm)


def warn_of_dwarfing(model: Any, step: Any, losses: dict, terms: dict, factors: dict) -> None:
    """Name, once, a term whose gradient dwarfs the hard losses', at a few early steps.

    It costs one more backward pass for each term at each of these steps, and nothing else.
    """
    if model.steps not in COMPARED or model.teacher.source == UNTRAINED:
        return
    values = {
        key: factors[key] * sum(terms[key].values())
        for key, term in model.kd_terms.items()
        if term.share is None and key not in model.dwarfing and factors[key] > 0
    }
    hard, own = total(losses), own_parameters(model)
    model.first_hard = model.first_hard or float(hard.detach())
    if float(hard.detach()) > GROWN * max(model.first_hard, 1):
        return  # the student itself diverges, which is no term's fault
    # A reentrant checkpoint cannot be asked for a part of the gradient.
    if not own or has_checkpoints(hard):
        return
    norm = float(gradient_norm(hard, own))
    for key, value in values.items():
        share = float(gradient_norm(value, own)) / max(norm, 1e-12)
        if share > DWARFS:
            model.dwarfing.add(key)
            weight = model.kd_terms[key].loss_weight
            MMLogger.get_current_instance().warning(
                f'{log_name(key)} dwarfs the hard losses: at step {model.steps} its gradient is '
                f'{share:.0f} times theirs ({norm:.3g}). Try '
                f'--cfg-options model.distillation.{key}.loss_weight={weight / share:.1g} (now '
                f'{weight:g})'
            )


OBSERVERS = (prove_terms, measure_shares, warn_of_dwarfing)


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The student's trainable parameters, without those of the terms."""
    named = model.named_parameters()
    return [p for n, p in named if p.requires_grad and not n.startswith(TERM_PREFIXES)]


def total(losses: dict) -> Tensor:
    """The sum that MMEngine makes of a dict of losses, which may be lists."""
    return sum(
        sum(value) if isinstance(value, list) else value
        for key, value in losses.items()
        if 'loss' in key
    )


def has_checkpoints(loss: Tensor) -> bool:
    """Whether a reentrant activation checkpoint lies behind ``loss``."""
    return any('CheckpointFunction' in node.name() for node in _nodes(loss))


def _require_finite(name: str, value: Tensor) -> None:
    if not value.isfinite():
        raise DeadTermError(
            f'{name} is {value.item()} at the first step: look at the scale of the two networks '
            '(normalisation, checkpoints), or turn the term off by its loss_weight=0'
        )


def _require_reaching(name: str, value: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    leaves = {id(p) for p in parameters}
    # A reentrant checkpoint keeps the parameters of its block out of the graph.
    if not any(
        id(getattr(node, 'variable', None)) in leaves or 'CheckpointFunction' in node.name()
        for node in _nodes(value)
    ):
        raise DeadTermError(
            f'{name} is dead: no gradient arrives at the student through it, so it would teach '
            'nothing. A hint layer in a frozen stage does this (frozen_stages), or one within '
            'activation checkpointing (with_cp, activation_checkpointing), whose first pass has no '
            'gradient: take a later layer, outside of that. So does a loss of your own that '
            "detaches the student's tensors or does not use them. Or turn the term off by its "
            'loss_weight=0'
        )


def _require_owned(name: str, value: Tensor, known: Iterable[nn.Parameter]) -> None:
    ids = {id(p) for p in known}
    for node in _nodes(value):
        leaf = getattr(node, 'variable', None)
        if leaf is not None and id(leaf) not in ids:
            raise UnownedParameterError(
                f'{name} uses a parameter of shape {tuple(leaf.shape)} that the detector did not '
                'have before the first step: no optimizer trains it, and no checkpoint holds it. '
                "Create a term's layers in __init__, adapt, build or bind, and keep them as "
                'modules (nn.ModuleDict, not a dict); requires_grad_(False) marks one that is not '
                'trained'
            )


def _nodes(loss: Tensor) -> Iterator[Any]:
    ahead, seen = [loss.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead.extend(next_node for next_node, _ in node.next_functions)


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; the weights have not been touched by it."""


def refuse_total(total: Tensor, losses: dict[str, Tensor]) -> NoReturn:
    """Stop before the backward pass of a sum of losses that is not finite.

    Raises:
        NonFiniteLossError: naming the losses at fault.
    """
    wrong = {k: v for k, v in losses.items() if 'loss' in k and k != 'loss' and not v.isfinite()}
    said = ', '.join(f'{name} is {value.item()}' for name, value in wrong.items())
    raise NonFiniteLossError(said or f'the sum of the losses is {total.item()}')


class UnguardedError(RuntimeError):
    """A distilling detector is trained, and nothing has checked the run."""


def refuse_unguarded() -> NoReturn:
    """Stop a training of which nobody has taken charge.

    Raises:
        UnguardedError: with the lines to write.
    """
    raise UnguardedError(
        'this detector distils, and nothing has checked its teacher, classes, scales and data. '
        'Write '
        "runner_type = 'mmkd.DistillationRunner' into the config (it stands in mmkd's recipes) and "
        f'build the runner by RUNNERS.build(cfg), as `{command("train")}` does, not by '
        'Runner.from_cfg(cfg); or, for a training loop of your own, call '
        'mmkd.guard(model, train_dataloader) before it'
    )
