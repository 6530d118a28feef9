"""Silent failures made loud: looked for before the first step, and again while a run goes on."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ..digests import tensor_digests
from ..models.chen2017 import TeacherBoundedL2Loss
from ..recipe import TERM_PREFIXES, TeacherError, log_name
from .teacher_check import check_teacher

SILENT = 50
"""Steps at zero after which a term is named, and the step at which the teacher is hashed anew."""


class GuardError(RuntimeError):
    """A run would train something else than its config says."""


def digest(prints: dict[str, str]) -> str:
    """One number for all of them, 16 hexadecimal digits."""
    return hashlib.sha256('\n'.join(f'{k} {v}' for k, v in prints.items()).encode()).hexdigest()[
        :16
    ]


class GuardHook(Hook):
    """Asks, before, during and after training, whether what is trained is what was meant.

    Raises:
        GuardError: nothing would be trained, or a term never begins.
        TeacherError: the teacher can learn, has changed, or does not detect (``check_teacher``).
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.zeros: Counter[str] = Counter()
        self.heard: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Everything that can be told before the first step."""
        model = _unwrap(runner.model)
        if not hasattr(model, 'kd_terms'):
            return
        require_trainable(model, runner.optim_wrapper)
        _require_begun(model, runner)
        teacher = model.teacher
        if teacher is None or not model.kd_terms:
            return
        require_frozen(model, runner.optim_wrapper)
        if not teacher.prepared:
            require_same(teacher.digests, teacher.network, 'since it was loaded')
        teacher.follow(next(model.parameters()))
        resumed = getattr(runner, 'resumed_from', None)
        if model.check_teacher and not resumed and not teacher.prepared:
            # Before it is accelerated: its RoI head would read what is laid out by pixel wrongly.
            runner.logger.info(check_teacher(model, runner.train_dataloader))
        teacher.prepare()
        self.digests = tensor_digests(teacher.network)
        runner.logger.info(
            f'teacher: {len(self.digests)} tensors, sha256 {digest(self.digests)} before training'
        )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Terms that stay at zero are named once; the teacher is looked at again."""
        model = _unwrap(runner.model)
        if not self.digests:
            return
        if model.teacher.network.training:
            raise TeacherError(_TRAINS)
        if runner.iter + 1 == SILENT:
            require_same(self.digests, model.teacher.network, 'since training began')
        # Each look waits for the device: none at a term that has been heard.
        for name, value in (outputs or {}).items():
            if not name.startswith('loss_kd_') or name in self.heard:
                continue
            if not outputs.get(name.replace('loss', 'weight'), 1):
                continue  # its schedule has not begun
            self.zeros[name] += 1
            if value.any():
                self.heard.add(name)
            elif self.zeros[name] == SILENT:
                self.heard.add(name)
                silent = f'{name} has been 0 for all of the first {SILENT} steps, so it has taught '
                if name in _bounded(model):
                    # Rightly so, where it is: nothing to be warned about.
                    runner.logger.info(
                        f'{silent}nothing yet: on no box was the teacher better than the student'
                    )
                    continue
                runner.logger.warning(
                    f'{silent}nothing yet: look at its weights (hard_weight, background_weight), '
                    'at the ground truth of the batches, and whether student and teacher are the '
                    f'same network{_apart(model, name)}'
                )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """No checkpoint is written of a student whose teacher has changed."""
        if self.digests:
            self._require_unchanged(runner)

    def _require_unchanged(self, runner: Runner) -> None:
        network = _unwrap(runner.model).teacher.network
        require_same(self.digests, network, 'since training began')

    def after_train(self, runner: Runner) -> None:
        """Says that the teacher is what it was."""
        if self.digests:
            self._require_unchanged(runner)
            runner.logger.info(
                f'teacher: sha256 {digest(self.digests)} after training, as before: unchanged'
            )


def _apart(model: Any, name: str) -> str:
    match = getattr(model.sites.get('rpn'), 'match', None)
    if match is None or not name.startswith('loss_kd_rpn_'):
        return ''
    return (
        f". {100 * match.share:.0f} % of the student's anchors are the teacher's too "
        f'(levels {match.levels}): perhaps none of those that ground truth meets'
    )


def _bounded(model: Any) -> set[str]:
    """The losses that are 0 wherever the student is better than its teacher."""
    return {
        log_name(name)
        for name, term in model.kd_terms.items()
        if isinstance(getattr(term, 'loss', None), TeacherBoundedL2Loss)
    }


_TRAINS = (
    'the teacher is in training mode, so its BatchNorm buffers would follow the batches and it '
    'would no longer be the network that you trained: something called .train() on '
    'model.teacher.network; call .eval() on it'
)


def require_same(prints: dict[str, str], network: nn.Module, when: str) -> None:
    """Compare a teacher with its fingerprint.

    Raises:
        TeacherError: with the names of the tensors that differ.
    """
    now = tensor_digests(network)
    changed = [name for name in {**prints, **now} if prints.get(name) != now.get(name)]
    if changed:
        raise TeacherError(
            f'the teacher has changed {when}: {len(changed)} of {len(prints)} tensors (first: '
            f'{", ".join(changed[:3])}). Something wrote to it: a hook, init_weights(), an '
            'optimizer, or a module that it shares with the student. Distil from a network that '
            'nothing else touches'
        )


def require_frozen(model: Any, optimizers: Any) -> None:
    """The teacher has no gradient, no optimizer slot, and no tensor of the student's.

    Raises:
        TeacherError: naming the first tensor at fault.
    """
    network = model.teacher.network
    in_training = [n for n, m in network.named_modules() if m.training]
    if in_training:
        raise TeacherError(_TRAINS + f' (first: {in_training[0] or "the network itself"})')
    theirs = dict(network.named_parameters())
    for name, parameter in theirs.items():
        if parameter.requires_grad:
            raise TeacherError(
                f"the teacher's {name} requires a gradient, so it is not frozen: call "
                'model.teacher.network.requires_grad_(False)'
            )
    places = {p.data_ptr(): n for n, p in model.named_parameters() if p.numel()}
    for name, parameter in theirs.items():
        if parameter.data_ptr() in places and parameter.numel():
            raise TeacherError(
                f"the teacher's {name} is the student's {places[parameter.data_ptr()]}: the two "
                'share memory, so training would change the teacher. Copy the tensor (.clone())'
            )
    slots = {id(p) for p in _parameters(optimizers)}
    for name, parameter in theirs.items():
        if id(parameter) in slots:
            raise TeacherError(
                f"the teacher's {name} is in the optimizer, so it would be trained: build the "
                "optimizer from the student's parameters() alone; the teacher is not in them"
            )


def require_trainable(model: nn.Module, optimizers: Any) -> None:
    """Something of the student is trained, at a learning rate above 0.

    Raises:
        GuardError: nothing requires a gradient, is in the optimizer, or moves.
    """
    own = {n: p for n, p in model.named_parameters() if not n.startswith(TERM_PREFIXES)}
    free = {n: p for n, p in own.items() if p.requires_grad}
    if not free:
        raise GuardError(
            f'not one of the {len(own)} parameters of the student requires a gradient, so nothing '
            'would be trained: look at frozen_stages, and at what calls requires_grad_(False)'
        )
    slots = {id(p) for p in _parameters(optimizers)}
    left = [name for name, parameter in free.items() if id(parameter) not in slots]
    if left:
        raise GuardError(
            f"{len(left)} of the student's {len(free)} trainable parameters are not in the "
            f'optimizer (first: {left[0]}), so they would stay as they are: build the optimizer '
            'from this model, after all of its layers exist (optim_wrapper.constructor)'
        )
    ours = {id(p) for p in free.values()}
    groups = [group for o in _optimizers(optimizers) for group in o.param_groups]
    groups = [group for group in groups if any(id(p) in ours for p in group['params'])]
    # A warm-up from 0 begins at 0: what counts is where the schedule starts from.
    if all(group.get('initial_lr', group['lr']) == 0 for group in groups):
        raise GuardError(
            "the learning rate is 0 for each of the student's parameters, so nothing would be "
            'trained: look at optim_wrapper.optimizer.lr, and at lr_mult in '
            'optim_wrapper.paramwise_cfg'
        )


def _require_begun(model: Any, runner: Runner) -> None:
    loop = runner.train_loop
    by_iter = isinstance(loop, IterBasedTrainLoop)
    for name, term in model.kd_terms.items():
        end = loop.max_epochs if term.schedule.by_epoch and not by_iter else loop.max_iters
        if end <= 0:
            raise GuardError(
                f'train_cfg asks for {end} epochs or iterations, so nothing would be trained: set '
                'max_epochs, or max_iters'
            )
        if term.schedule.begin >= end:
            unit = 'epochs' if term.schedule.by_epoch else 'iterations'
            raise GuardError(
                f'distillation.{name}.schedule begins at {term.schedule.begin}, and training ends '
                f'after {end} {unit}, so the term would never be on: let it begin earlier, or turn '
                f'it off by distillation.{name}.loss_weight=0'
            )


def _optimizers(wrapper: Any) -> list[torch.optim.Optimizer]:
    inner = wrapper.optim_wrappers.values() if hasattr(wrapper, 'optim_wrappers') else [wrapper]
    return [each.optimizer for each in inner]


def _parameters(wrapper: Any) -> list[nn.Parameter]:
    return [p for o in _optimizers(wrapper) for group in o.param_groups for p in group['params']]


def _unwrap(model: nn.Module) -> Any:
    return model.module if is_model_wrapper(model) else model
