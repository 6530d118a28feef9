"""The state of the random number generators that a training step draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..io.checkpoint import CheckpointError


def set_random(state: dict) -> None:
    """Put the generators where :func:`random_state` found them.

    Raises:
        CheckpointError: The state is none; numpy would read beyond its numbers.
    """
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    if name != 'MT19937' or type(position) is not int or not 0 <= position <= len(keys) == 624:
        raise CheckpointError(
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
