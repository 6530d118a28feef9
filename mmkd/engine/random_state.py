"""The state of the random number generators that a training step draws from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..io.checkpoint import CheckpointError


def set_random_state(state: dict) -> None:
    """Restore the state that :func:`random_state` returned.

    Raises:
        CheckpointError: NumPy's part is malformed, so that NumPy would read out of bounds.
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
    """The states of the generators of Python, NumPy and PyTorch, in plain form.

    Args:
        cuda: include the GPU's; not allowed in a forked process.
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


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random state on leaving the block."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
