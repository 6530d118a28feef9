"""Tests with a checkpoint that must be complete, and of a teacher on the student's classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import CheckpointLoader, TestLoop
from torch import nn

from ..io.checkpoint import CheckpointError
from .exit import stop


def check_complete(model: nn.Module, path: str, classes: Sequence[str] | None = None) -> None:
    """Loads a checkpoint's weights, which must contain every tensor of ``model``.

    MMEngine only logs a warning about missing tensors, and tests random weights.

    Args:
        model: the detector, wrapped or not.
        path: of the checkpoint.
        classes: the config's class names, to compare with those in the checkpoint.

    Raises:
        SystemExit: The file is no checkpoint, or one of other classes; tensors are missing or have
            other shapes.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except CheckpointError as error:
        stop(str(error))
    state = {
        key.removeprefix('module.'): value
        for key, value in checkpoint.get('state_dict', checkpoint).items()
    }
    meta = checkpoint.get('meta') or {}
    trained = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    if classes and trained and list(trained) != list(classes):
        stop(
            f'checkpoint {path} was trained on {_named(trained)}, the config tests '
            f'{_named(classes)}: give the config that it was trained with, or its classes in that '
            'order'
        )
    own = model.state_dict()
    shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing = [] if shapes else model.load_state_dict(state, strict=False).missing_keys
    if wrong := shapes or missing:
        sizes = (
            f', {tuple(state[wrong[0]].shape)} in the file and {tuple(own[wrong[0]].shape)} here'
            if shapes
            else ''
        )
        what = 'has other shapes for' if shapes else 'lacks'
        stop(
            f'checkpoint {path} {what} {len(wrong)} of {len(own)} keys of the detector '
            f'(first: {wrong[0]}{sizes}): it was written with another config'
        )


def _named(classes: Sequence[str]) -> str:
    names = ', '.join(classes[:4]) if not isinstance(classes, str) else classes
    return f'{len(classes)} classes ({names}{", ..." if len(classes) > 4 else ""})'


@LOOPS.register_module()
class RelabelledTestLoop(TestLoop):
    """Tests a teacher on the student's classes; drops its detections of other classes.

    Args:
        labels: the teacher's class for each class of the student, or None.
    """

    def __init__(self, *args: Any, labels: Sequence[int | None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.labels = {theirs: own for own, theirs in enumerate(labels) if theirs is not None}
        step = self.runner.model.test_step
        self.runner.model.test_step = lambda data: [self.relabel(s) for s in step(data)]

    def relabel(self, sample: Any) -> Any:
        """Gives the detections of an image the student's labels; drops those of other classes."""
        found = sample.pred_instances
        labels = torch.tensor([self.labels.get(i, -1) for i in found.labels.tolist()])
        labels = labels.to(found.labels).view(-1)
        sample.pred_instances = found[labels >= 0]
        sample.pred_instances.labels = labels[labels >= 0]
        return sample
