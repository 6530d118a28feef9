"""A loss that is not finite stops the run, and the step is kept so that it can be looked at."""

from __future__ import annotations

import os
import os.path as osp
import random
from typing import Any

import numpy as np
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

STEP = 'mmkd_step'
"""The key that tells such a file."""
_ELEMENTS: dict[str, type[BaseDataElement]] = {
    c.__name__: c for c in (BaseDataElement, InstanceData, PixelData)
}


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; the weights have not been touched by it."""


def require_finite(total: Tensor, losses: dict[str, Tensor]) -> None:
    """Stop before the backward pass where the sum that is trained on is not finite.

    Args:
        total: that sum, a scalar.
        losses: what it is made of, by the names in the log.

    Raises:
        NonFiniteLossError: naming the losses at fault.
    """
    if total.isfinite():
        return
    wrong = {k: v for k, v in losses.items() if 'loss' in k and k != 'loss' and not v.isfinite()}
    said = ', '.join(f'{name} is {value.item()}' for name, value in wrong.items())
    raise NonFiniteLossError(said or f'the sum of the losses is {total.item()}')


class StepHook(Hook):
    """Remembers what a step begins with: its batch and the state of the random numbers."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.batch: Any = None
        self.random: dict = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keeps references; nothing is copied but the states of the generators."""
        self.batch, self.random = data_batch, random_state()

    def keep(self, runner: Runner, model: nn.Module) -> str:
        """Write the step to the work directory.

        Args:
            runner: the run that it stopped.
            model: the detector, unwrapped, with the weights from before the step.

        Returns:
            The file.
        """
        rank = f'_rank{get_rank()}' if get_rank() else ''
        path = osp.join(runner.work_dir, f'step_{runner.iter}{rank}.pth')
        step = {
            STEP: 1,
            'iter': runner.iter,
            'epoch': runner.epoch,
            'random': self.random,
            'state_dict': {k: v.cpu() for k, v in model.state_dict().items()},
            'inputs': [image.cpu() for image in self.batch['inputs']],
            'data_samples': [_plain_element(s) for s in self.batch['data_samples']],
        }
        torch.save(checkpoints.to_plain(step), path + '.part')
        os.replace(path + '.part', path)
        return path


def images(batch: Any) -> str:
    """The files of a batch, for a message."""
    paths = [str(getattr(s, 'img_path', '?')) for s in batch['data_samples']]
    return ', '.join(paths[:4]) + (f' and {len(paths) - 4} more' if len(paths) > 4 else '')


def read_step(path: str) -> tuple[dict, dict]:
    """A step that :meth:`StepHook.keep` wrote.

    Returns:
        The batch, as a data loader gives it, and the rest of the file.

    Raises:
        CheckpointError: the file is none, or is damaged.
    """
    # The step of a loss that was not finite may hold what made it so.
    step = checkpoints.from_plain(checkpoints.read_checkpoint(path, finite=False))
    if STEP not in step:
        raise checkpoints.CheckpointError(
            f'{path} is no step: name the step_*.pth that a stopped run has left in its work_dir'
        )
    samples = [_element(plain) for plain in step.pop('data_samples')]
    return dict(inputs=step.pop('inputs'), data_samples=samples), step


def set_back(step: dict) -> None:
    """Put random numbers and the count of iterations where they were when the step began."""
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', step['iter'])
    hub.update_info('epoch', step['epoch'])
    set_random(step['random'])


def set_random(state: dict) -> None:
    """Put the generators where :func:`random_state` found them.

    Raises:
        CheckpointError: The state is none; numpy would read beyond its numbers.
    """
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    if name != 'MT19937' or type(position) is not int or not 0 <= position <= len(keys) == 624:
        raise checkpoints.CheckpointError(
            f"the checkpoint's random numbers of numpy are no state of its generator ({name}, "
            f'{len(keys)} numbers, position {position})'
        )
    np.random.set_state((name, np.asarray(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def random_state(cuda: bool = True) -> dict:
    """The state of the generators that a training step draws from, in plain form.

    Args:
        cuda: with the GPU's; a forked process must not ask for it.
    """
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = legacy
    return {
        'python': [version, list(internal), gauss],
        'numpy': [name, keys.astype(np.int64), position, has_gauss, cached],
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if cuda and torch.cuda.is_available() else None,
    }


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
