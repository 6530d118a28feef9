"""Hooks that convert the objects in a checkpoint to plain forms before saving, and back."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..io import checkpoint as checkpoints
from ..recipe import without_terms
from .resume_compatibility import check_resumed
from .wrappers import unwrap


class FromPlainHook(Hook):
    """Restores the objects of a checkpoint that was loaded; runs before all other hooks.

    Keys of adaptation layers are dropped if the model has none. A checkpoint that a run is resumed
    from is checked first, see :func:`check_resumed`.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Converts the checkpoint in place."""
        checkpoints.from_plain(checkpoint)
        resuming = getattr(runner, '_resuming', None)
        model = unwrap(runner.model)
        checkpoints.require_finite(model, checkpoint.get('ema_state_dict', {}))
        if resuming is not None:
            check_resumed(checkpoint, resuming, runner, model)
        if not any(key.startswith('kd_terms.') for key in model.state_dict()):
            _drop_terms(runner, checkpoint)


class ToPlainHook(Hook):
    """Converts the objects of a checkpoint to plain forms; runs after all other hooks."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Changes only the outermost dict in place."""
        plain = checkpoints.to_plain(checkpoint)
        checkpoint.clear()
        checkpoint.update(plain)


def _drop_terms(runner: Runner, checkpoint: dict) -> None:
    count = 0
    for state in (checkpoint.get('state_dict', checkpoint), checkpoint.get('ema_state_dict', {})):
        for key in state.keys() - without_terms(state).keys():
            del state[key]
            count += 1
    if count:
        runner.logger.info(
            f"{count} tensors of a distilled student's terms (kd_terms.*) are ignored: this model "
            'has no terms'
        )
