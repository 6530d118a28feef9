"""Saves a training step whose loss was not finite, and reads it back for tools/replay.py."""

from __future__ import annotations

import os
import os.path as osp
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn

from ..io import checkpoint as checkpoints
from .random_state import random_state, set_random_state

STEP = 'mmkd_step'
"""Key that marks a file of a saved step."""
_ELEMENTS: dict[str, type[BaseDataElement]] = {
    c.__name__: c for c in (BaseDataElement, InstanceData, PixelData)
}


class StepDumpHook(Hook):
    """Holds the batch and the random state of the current step, to save them on demand."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.batch: Any = None
        self.random: dict = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keeps a reference to the batch, and a copy of the random state."""
        self.batch, self.random = data_batch, random_state()

    def save(self, runner: Runner, model: nn.Module) -> str:
        """Write the step to the work directory.

        Args:
            runner: of the run that stopped.
            model: the unwrapped detector, with the weights from before the step.

        Returns:
            The path of the file.
        """
        rank = f'_rank{get_rank()}' if get_rank() else ''
        path = osp.join(runner.work_dir, f'step_{runner.iter}{rank}.pth')
        step = {
            STEP: 1,
            'iter': runner.iter,
            'epoch': runner.epoch,
            'random': self.random,
            'thresholds': getattr(getattr(model, 'unlabelled', None), 'thresholds', None),
            'state_dict': {k: v.cpu() for k, v in model.state_dict().items()},
            'inputs': [image.cpu() for image in self.batch['inputs']],
            'data_samples': [_plain_element(s) for s in self.batch['data_samples']],
        }
        torch.save(checkpoints.to_plain(step), path + '.part')
        os.replace(path + '.part', path)
        return path


def image_files(batch: Any) -> str:
    """The first image files of a batch, for a message."""
    paths = [str(getattr(s, 'img_path', '?')) for s in batch['data_samples']]
    return ', '.join(paths[:4]) + (f' and {len(paths) - 4} more' if len(paths) > 4 else '')


def read_step(path: str) -> tuple[dict, dict]:
    """Read a step that :meth:`StepDumpHook.save` wrote.

    Returns:
        The batch, as a data loader gives it, and the rest of the file.

    Raises:
        CheckpointError: the file is no saved step, or is damaged.
    """
    step = checkpoints.from_plain(checkpoints.read_checkpoint(path))
    if STEP not in step:
        raise checkpoints.CheckpointError(
            f'{path} is no step: name the step_*.pth that a stopped run has left in its work_dir'
        )
    samples = [_element(plain) for plain in step.pop('data_samples')]
    return dict(inputs=step.pop('inputs'), data_samples=samples), step


def restore_step(step: dict) -> None:
    """Restore the random state and the iteration count of a saved step."""
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', step['iter'])
    hub.update_info('epoch', step['epoch'])
    set_random_state(step['random'])


def _plain_element(element: BaseDataElement) -> dict:
    values = {}
    for name, value in element.items():
        if isinstance(value, BaseDataElement):
            values[name] = _plain_element(value)
        elif isinstance(value, BaseBoxes):
            values[name] = value.tensor.cpu()
        elif isinstance(value, (BitmapMasks, PolygonMasks)):
            values[name] = {'masks': value.to_tensor(torch.uint8, 'cpu')}
        elif isinstance(value, Tensor):
            values[name] = value.cpu()
        else:
            values[name] = value
    return {'type': type(element).__name__, 'meta': dict(element.metainfo_items()), 'data': values}


def _element(plain: dict) -> BaseDataElement:
    kind = _ELEMENTS.get(plain['type'], DetDataSample)
    element = kind(metainfo=plain['meta'])
    for name, value in plain['data'].items():
        if isinstance(value, dict) and 'masks' in value:
            masks = value['masks'].numpy()
            value = BitmapMasks(masks, *masks.shape[1:])
        elif isinstance(value, dict) and 'type' in value:
            value = _element(value)
        if isinstance(element, InstanceData):
            element[name] = value
        else:
            element.set_field(value, name)
    return element
