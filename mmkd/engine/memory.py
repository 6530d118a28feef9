"""Explains running out of memory in one sentence."""

from __future__ import annotations

import errno
import re
from typing import Any

import torch
from torch import Tensor

from .wrappers import optimizers, unwrap

_WORDS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|insufficient memory|alloc_failed"
    r'|cannot allocate memory|bad_alloc',
    re.IGNORECASE,
)
"""Of allocators whose errors have no class of their own: PyTorch's on CPUs, cuBLAS, OpenCV."""


class OutOfMemoryError(RuntimeError):
    """Memory ran out; the message has the batch and what can be done."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or of the machine, ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # A ValueError with such words is a refusal of somebody's.
    return not isinstance(error, ValueError) and bool(_WORDS.search(str(error)))


def explain(
    error: BaseException, runner: Any, batch: Any, dataloader: str, last: str | None
) -> str:
    """What was in memory and what to change.

    Args:
        error: of the allocator.
        runner: of the run.
        batch: the last one, as the data loader gave it; None before the first.
        dataloader: the key of the config's data loader in use, such as 'train_dataloader'.
        last: the last checkpoint, if there is one.
    """
    size = (runner.cfg.get(dataloader) or {}).get('batch_size')
    where = f'in iteration {runner.iter + 1} (epoch {runner.epoch + 1}) ' if batch else ''
    first = (str(error).strip().splitlines() or [''])[-1].split('. ')
    words = ' '.join(part for part in first if _WORDS.search(part) or 'allocate' in part)
    on = (
        f'continue from {last} by the same command with --resume'
        if last
        else 'repeat the command (nothing was saved yet; from the first checkpoint on, --resume '
        'continues a run)'
    )
    return (
        f'out of memory {where}with {dataloader}.batch_size={size}'
        f'{f" ({words})" if words else ""}. {_contents(runner, batch)}. Take a smaller '
        f'{dataloader}.batch_size (and --auto-scale-lr), a smaller scale in the pipeline, on a GPU '
        f'--amp, or model.distillation.accelerate.dtype=bfloat16 for the teacher; then {on}'
    )


def _contents(runner: Any, batch: Any) -> str:
    """The largest image of the batch, and the sizes of both networks."""
    model = unwrap(runner.model)
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    wrapper = getattr(runner, 'optim_wrapper', None)
    states = [] if isinstance(wrapper, dict) else optimizers(wrapper)
    tensors += [v for o in states for s in o.state.values() for v in s.values()]
    parts = [f'The student with gradients and optimizer takes {_gib(tensors)}']
    if (teacher := getattr(model, 'teacher', None)) is not None:
        parts.append(f'the teacher {_gib(teacher.network.state_dict().values())}')
    text = ', '.join(parts) + ', and all the rest is what a batch of images needs'
    images = [i for i in (batch or {}).get('inputs', ()) if isinstance(i, Tensor) and i.dim() > 2]
    if not images:
        return text
    samples = (batch or {}).get('data_samples') or []
    boxes = [len(s.gt_instances) for s in samples if hasattr(s, 'gt_instances')]
    height, width = max((tuple(i.shape[-2:]) for i in images), key=lambda s: s[0] * s[1])
    return f'{text}: the largest of this one has {width}x{height} pixels' + (
        f', the most boxes in one image are {max(boxes)}' if boxes else ''
    )


def _gib(tensors: Any) -> str:
    return f'{sum(t.nbytes for t in tensors if isinstance(t, Tensor)) / 2**30:.2g} GiB'
