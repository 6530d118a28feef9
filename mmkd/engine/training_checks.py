"""Checks that what is trained is what the config says, before the first step and after it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from ..datasets.labels import check_labels, check_same_labels
from ..datasets.unlabelled import labelled_part
from ..digests import digest, tensor_digests
from ..models.chen2017 import TeacherBoundedL2Loss
from ..recipe import TERM_PREFIXES, TeacherError, log_name
from .save_best import check_metrics, check_predictions
from .teacher_check import check_teacher, require_channels
from .wrappers import distils, optimizers, unwrap

SILENT = 50
"""Steps after which a term that was always 0 is logged, and the teacher is hashed again."""


class TrainingSetupError(RuntimeError):
    """A run would train something else than its config says."""


class InputChecksHook(Hook):
    """Checks class labels and the unit of schedules, before any other hook."""

    priority = 'HIGHEST'

    def before_train(self, runner: Runner) -> None:
        """Checks the data sets and the schedules.

        Raises:
            ValueError: the training data number their classes in another order than their names,
                than each other, or than the validation data; a schedule in epochs, in a loop that
                counts none; a metric of what the detector does not predict; a hook or scheduler
                that monitors a metric that no validation reports.
        """
        model = unwrap(runner.model)
        data = runner.train_dataloader.dataset
        validation = getattr(getattr(runner.val_loop, 'dataloader', None), 'dataset', None)
        if distils(model):
            check_labels(data)
        if labelled_part(data) is None:
            # The teacher's boxes are numbered as the names are, validation as its file is.
            check_labels(validation)
        check_same_labels(data, validation)
        scheduled = [
            n for n, t in (model.kd_terms if distils(model) else {}).items() if t.schedule.by_epoch
        ]
        if scheduled and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                f'distillation.{scheduled[0]}.schedule has by_epoch=True, but '
                f'{type(runner.train_loop).__name__} counts iterations alone, so the term would '
                'stay where it begins: give begin, warmup and end in iterations, without by_epoch'
            )

        check_predictions(model, getattr(runner.val_loop, 'evaluator', None), 'val_evaluator')
        _check_monitors(runner)

    def before_test(self, runner: Runner) -> None:
        """Warns if the test data number their classes in another order than their names.

        Raises:
            ValueError: a metric of what the detector does not predict.
        """
        model = unwrap(runner.model)
        check_predictions(model, getattr(runner.test_loop, 'evaluator', None), 'test_evaluator')
        try:
            check_labels(getattr(runner.test_loop.dataloader, 'dataset', None))
        except ValueError as error:
            runner.logger.warning(
                f'{error}. Unless the detector was trained on a file in the same order, its '
                'classes are scored as others'
            )


def check_teaching(
    model: Any, loader: Any, logger: Any, optim_wrapper: Any = None
) -> dict[str, str]:
    """Check that the teacher is frozen, unchanged and detects; the detector may then train.

    Args:
        model: the distilling detector, unwrapped.
        loader: of the training data, whose first images it is tested on; None leaves that out.
        logger: for what was found.
        optim_wrapper: of the run, if there is one.

    Returns:
        The digests of the teacher's tensors.
    """
    teacher = model.teacher
    require_frozen(model, optim_wrapper)
    if not teacher.prepared:
        require_same(teacher.digests, teacher.network, 'since it was loaded')
    teacher.follow(next(model.parameters()))
    if model.check_teacher and loader is not None and not teacher.prepared:
        # Before acceleration: the detection path of its RoI head misreads channels_last maps.
        logger.info(check_teacher(model, loader))
    teacher.prepare()
    model.guarded = True
    found = tensor_digests(teacher.network)
    logger.info(f'teacher: {len(found)} tensors, sha256 {digest(found)} before training')
    return found


def _check_monitors(runner: Runner) -> None:
    """Early stopping, and schedules that follow a metric, wait for one that is reported."""
    schedulers = getattr(runner, 'param_schedulers', None) or []
    if isinstance(schedulers, dict):
        schedulers = [each for group in schedulers.values() for each in group]
    evaluator = getattr(getattr(runner, 'val_loop', None), 'evaluator', None)
    # A user's hook may call something else its monitor.
    hooks = [h for h in getattr(runner, 'hooks', []) if isinstance(h, EarlyStoppingHook)]
    for each in [*hooks, *schedulers]:
        name = getattr(each, 'monitor', None)
        if isinstance(name, str) and name != 'train/loss':
            kind = type(each).__name__
            if evaluator is None:
                raise ValueError(
                    f'{kind} monitors {name}, and this config has no validation (val_dataloader)'
                )
            check_metrics([name], evaluator, f'{kind}.monitor', 'it would wait forever')


class TrainingChecksHook(Hook):
    """Checks that the student can learn, that the terms act, and that the teacher stays the same.

    Raises:
        TrainingSetupError: nothing would be trained, or a term never begins.
        TeacherError: the teacher is not frozen, has changed, or does not detect
            (``check_teacher``).
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.zeros: Counter[str] = Counter()
        self.settled: set[str] = set()
        self.looked = False

    def before_train(self, runner: Runner) -> None:
        """Checks student, schedules and teacher, and hashes the teacher."""
        model = unwrap(runner.model)
        if not distils(model):
            return
        require_trainable(model, runner.optim_wrapper)
        _require_begun(model, runner)
        teacher = model.teacher
        if teacher is None or not (model.kd_terms or model.unlabelled.asks):
            model.guarded = True
            return
        loader = None if getattr(runner, 'resumed_from', None) else runner.train_dataloader
        self.digests = check_teaching(model, loader, runner.logger, runner.optim_wrapper)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Checks the channels of the first images.

        Raises:
            ValueError: they are not those that the student takes.
        """
        if self.digests and not self.looked:
            self.looked = True
            require_channels(unwrap(runner.model), data_batch)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Logs each term that stays at 0, once; compares the teacher with its hashes once more."""
        model = unwrap(runner.model)
        if not self.digests:
            return
        if model.teacher.network.training:
            raise TeacherError(_TRAINS)
        if runner.iter + 1 == SILENT:
            require_same(self.digests, model.teacher.network, 'since training began')
        # value.any() waits for the device, so a term is read until it was above 0 once.
        for name, value in (outputs or {}).items():
            if not name.startswith('loss_kd_') or name in self.settled:
                continue
            if not outputs.get(name.replace('loss', 'weight'), 1):
                continue  # its schedule has not begun
            self.zeros[name] += 1
            if value.any():
                self.settled.add(name)
            elif self.zeros[name] == SILENT:
                self.settled.add(name)
                silent = f'{name} has been 0 for all of the first {SILENT} steps, so it has taught '
                if name in _bounded(model):
                    # Equation (4) is 0 where the student is better.
                    runner.logger.info(
                        f'{silent}nothing yet: on no box was the teacher better than the student'
                    )
                    continue
                runner.logger.warning(
                    f'{silent}nothing yet: look at its weights (hard_weight, background_weight), '
                    'at the ground truth of the batches, and whether student and teacher are the '
                    f'same network{_matched_anchors(model, name)}'
                )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuses to save a student whose teacher has changed."""
        if self.digests:
            require_same(self.digests, unwrap(runner.model).teacher.network, 'since training began')

    def after_train(self, runner: Runner) -> None:
        """Compares the teacher with its hashes, and logs that it is unchanged."""
        if self.digests:
            require_same(self.digests, unwrap(runner.model).teacher.network, 'since training began')
            runner.logger.info(
                f'teacher: sha256 {digest(self.digests)} after training, as before: unchanged'
            )


def _matched_anchors(model: Any, name: str) -> str:
    match = getattr(model.sites.get('rpn'), 'match', None)
    if match is None or not name.startswith('loss_kd_rpn_'):
        return ''
    return (
        f". {100 * match.share:.0f} % of the student's anchors are the teacher's too "
        f'(levels {match.levels}): perhaps none of those that ground truth meets'
    )


def _bounded(model: Any) -> set[str]:
    """Log names of the losses that are 0 where the student is better than its teacher."""
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
    """Compare a teacher with the hashes of its tensors.

    Raises:
        TeacherError: naming the tensors that differ.
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


def require_frozen(model: Any, optim_wrapper: Any) -> None:
    """Check that the teacher gets no gradient, is in no optimizer and shares no tensor.

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
    slots = {id(p) for group in _groups(optim_wrapper) for p in group['params']}
    for name, parameter in theirs.items():
        if id(parameter) in slots:
            raise TeacherError(
                f"the teacher's {name} is in the optimizer, so it would be trained: build the "
                "optimizer from the student's parameters() alone; the teacher is not in them"
            )


def require_trainable(model: nn.Module, optim_wrapper: Any) -> None:
    """Check that the whole student is in the optimizer, at a learning rate above 0.

    Raises:
        TrainingSetupError: nothing requires a gradient; a parameter that does is in no optimizer;
            the learning rate is 0.
    """
    own = {n: p for n, p in model.named_parameters() if not n.startswith(TERM_PREFIXES)}
    free = {n: p for n, p in own.items() if p.requires_grad}
    if not free:
        raise TrainingSetupError(
            f'not one of the {len(own)} parameters of the student requires a gradient, so nothing '
            'would be trained: look at frozen_stages, and at what calls requires_grad_(False)'
        )
    slots = {id(p) for group in _groups(optim_wrapper) for p in group['params']}
    left = [name for name, parameter in free.items() if id(parameter) not in slots]
    if left:
        raise TrainingSetupError(
            f"{len(left)} of the student's {len(free)} trainable parameters are not in the "
            f'optimizer (first: {left[0]}), so they would stay as they are: build the optimizer '
            'from this model, after all of its layers exist (optim_wrapper.constructor)'
        )
    ours = {id(p) for p in free.values()}
    groups = [g for g in _groups(optim_wrapper) if any(id(p) in ours for p in g['params'])]
    # A warm-up may start at 0; initial_lr is what it leads to.
    if all(group.get('initial_lr', group['lr']) == 0 for group in groups):
        raise TrainingSetupError(
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
            raise TrainingSetupError(
                f'train_cfg asks for {end} epochs or iterations, so nothing would be trained: set '
                'max_epochs, or max_iters'
            )
        if term.schedule.begin >= end:
            unit = 'epochs' if term.schedule.by_epoch else 'iterations'
            raise TrainingSetupError(
                f'distillation.{name}.schedule begins at {term.schedule.begin}, and training ends '
                f'after {end} {unit}, so the term would never be on: let it begin earlier, or turn '
                f'it off by distillation.{name}.loss_weight=0'
            )


def _groups(wrapper: Any) -> list[dict]:
    return [group for optimizer in optimizers(wrapper) for group in optimizer.param_groups]
