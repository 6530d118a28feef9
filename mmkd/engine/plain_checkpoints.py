"""Hooks that turn the objects in a checkpoint into plain forms before saving, and back."""

from __future__ import annotations

import re

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from ..datasets.labels import check_labels, check_same_labels
from ..io import checkpoint as checkpoints
from .processes import unwrap
from .resume_compatibility import check_resumed
from .summary import startup_table
from .weight_origins import origins

_OF_TERMS = re.compile(r'(module\.)?(kd_terms|kd_adapters)\.')


class FromPlainHook(Hook):
    """After loading, first of all: real objects for plain forms, no adapters that nobody has.

    Before training it logs the model's start-up table, or where a plain model's weights are from.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Turns the checkpoint's plain forms back, in place."""
        checkpoints.from_plain(checkpoint)
        resuming = getattr(runner, '_resuming', None)
        if resuming is not None:
            check_resumed(checkpoint, resuming, runner, unwrap(runner.model))
        if not any(key.startswith('kd_terms.') for key in unwrap(runner.model).state_dict()):
            _drop_terms(runner, checkpoint)

    def before_test(self, runner: Runner) -> None:
        """Warns where the names of the classes are not those of their numbers."""
        try:
            check_labels(getattr(runner.test_loop.dataloader, 'dataset', None))
        except ValueError as error:
            runner.logger.warning(
                f'{error}. Unless the detector was trained on a file in the same order, its '
                'classes are scored as others'
            )

    def before_train(self, runner: Runner) -> None:
        """Logs what is about to be trained.

        Raises:
            ValueError: A term is scheduled by epochs, and the loop counts none; the classes of the
                training data are numbered in another order than their names, or than those of
                validation; a file that the config names holds none of the weights.
        """
        model = unwrap(runner.model)
        data = runner.train_dataloader.dataset
        if hasattr(model, 'kd_terms'):
            check_labels(data)
        check_same_labels(
            data, getattr(getattr(runner.val_loop, 'dataloader', None), 'dataset', None)
        )
        scheduled = [n for n, t in getattr(model, 'kd_terms', {}).items() if t.schedule.by_epoch]
        if scheduled and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                f'distillation.{scheduled[0]}.schedule has by_epoch=True, but '
                f'{type(runner.train_loop).__name__} counts iterations alone, so the term would '
                'stay where it begins: give begin, warmup and end in iterations, without by_epoch'
            )
        resumed = getattr(runner, 'resumed_from', None)
        load_from = None if resumed else runner._load_from
        # On all ranks: it may read a checkpoint by URL, which is a collective call.
        if hasattr(model, 'kd_terms'):
            text = startup_table(model, load_from, resumed)
        else:
            text = 'weights: ' + '; '.join(origins(model, load_from, resumed))
        if is_main_process():
            runner.logger.info(text)


class ToPlainHook(Hook):
    """Before saving, last of all: plain forms for real objects."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Puts the checkpoint in plain form; only the outermost dict is changed in place."""
        plain = checkpoints.to_plain(checkpoint)
        checkpoint.clear()
        checkpoint.update(plain)


def _drop_terms(runner: Runner, checkpoint: dict) -> None:
    """Passes over a distilled student's adaptation layers in a model that has none."""
    count = 0
    for state in (checkpoint.get('state_dict', checkpoint), checkpoint.get('ema_state_dict', {})):
        for key in [key for key in state if _OF_TERMS.match(key)]:
            del state[key]
            count += 1
    if count:
        runner.logger.info(
            f"{count} tensors of a distilled student's terms (kd_terms.*) are passed over: "
            'this model has none'
        )
