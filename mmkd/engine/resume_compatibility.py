"""Checks of the training state in a checkpoint before a run resumes from it.

The reader checks the weights. The rest of a training checkpoint decides which files are deleted,
how often loops run and which kernels read which memory, so it must be what such a run writes.
"""

from __future__ import annotations

import os.path as osp
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.optim import Optimizer

from ..io.checkpoint import CheckpointError
from ..literals import show
from ..recipe import rename_adapters

_KERNEL_OPTIONS = ('fused', 'foreach', 'capturable', 'differentiable')
"""Options that choose the optimizer's kernels; they are never taken from a file."""
_PARAMETER_SHAPED = frozenset(
    ('momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'exp_inf', 'square_avg')
    + ('grad_avg', 'sum', 'acc_delta', 'prev', 'step_size', 'ax', 'mu_product', 'eta')
)
"""Optimizer state with the shape of its parameter, or a scalar; fused kernels do not check it."""
_WAY_OUT = (
    'resume it with the config that it was written with, or start from its weights: load_from'
)


def check_resumed(checkpoint: dict, path: str, runner: Runner, model: nn.Module) -> None:
    """Check a checkpoint before any of it is used.

    Args:
        checkpoint: its content.
        path: its file, for messages.
        runner: of the run that is resumed.
        model: the unwrapped model.

    Raises:
        CheckpointError: the file is not the state of a training run, or is of another network, or
            its epoch or iteration is impossible.
    """
    parts = ('meta', 'message_hub', 'optimizer')
    lacks = [key for key in parts if not isinstance(checkpoint.get(key), dict)]
    if lacks:
        raise CheckpointError(
            f'checkpoint {path} cannot be resumed: it holds no {", ".join(lacks)}, so it '
            'is not the state of a training run. To start from its weights set load_from'
        )
    for name in ('epoch', 'iter'):
        count = checkpoint['meta'].get(name)
        if type(count) is not int or count < 0:
            raise CheckpointError(f'checkpoint {path} has {name} {show(count)}, which is no count')
    loop = runner.train_loop
    if isinstance(loop, IterBasedTrainLoop) and checkpoint['meta']['iter'] > loop.max_iters:
        raise CheckpointError(
            f'checkpoint {path} is at iteration {checkpoint["meta"]["iter"]}, and '
            f'train_cfg.max_iters is {loop.max_iters}: nothing would be trained'
        )
    own, saved = model.state_dict(), checkpoint.get('state_dict', {})
    saved = {key.removeprefix('module.'): value for key, value in saved.items()}
    rename_adapters(saved)
    for key in [key for key in {**own, **saved} if key.startswith('kd_terms.')]:
        if (key in own) != (key in saved):
            raise CheckpointError(
                f'checkpoint {path} {"lacks" if key in own else "has"} {key}, a weight of a '
                'distillation term: it was written with other terms, or with none. Either '
                + _WAY_OUT
            )
    for key, value in own.items():
        if isinstance(saved.get(key), Tensor) and saved[key].shape != value.shape:
            raise CheckpointError(
                f'checkpoint {path} is of another network: {key} is {tuple(saved[key].shape)} in '
                f'it and {tuple(value.shape)} here. Either {_WAY_OUT}'
            )


def check_loaded_states(optimizer: Optimizer) -> None:
    """Register hooks that check every state which the optimizer loads from now on."""
    if not hasattr(optimizer, '_mmkd_checks'):
        optimizer._mmkd_checks = True
        optimizer.register_load_state_dict_pre_hook(_before_loading)
        optimizer.register_load_state_dict_post_hook(_after_loading)


def _before_loading(optimizer: Optimizer, state: dict) -> dict:
    own, saved = optimizer.param_groups, state.get('param_groups')
    if not isinstance(saved, list) or not all(
        isinstance(group, dict) and isinstance(group.get('params'), list) for group in saved
    ):
        raise CheckpointError('the checkpoint holds an optimizer without its groups of parameters')
    kind = type(optimizer).__name__
    sizes = [[len(group['params']) for group in groups] for groups in (saved, own)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f'the checkpoint has an optimizer of {sum(sizes[0])} parameters in {len(saved)} '
            f'groups, this run one of {sum(sizes[1])} in {len(own)}: other adaptation layers, '
            f'frozen stages or paramwise_cfg. Either {_WAY_OUT}'
        )
    for key in ('momentum', 'betas'):
        if saved and (key in own[0]) != (key in saved[0]):
            raise CheckpointError(
                f'the checkpoint has the state of another optimizer than {kind}: one with'
                f'{"out" if key in own[0] else ""} {key}. Either {_WAY_OUT}'
            )
    groups = [
        {**group, **{key: mine[key] for key in _KERNEL_OPTIONS if key in mine}}
        for group, mine in zip(saved, own, strict=True)
    ]
    return {**state, 'param_groups': groups}


def _after_loading(optimizer: Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            if key not in _PARAMETER_SHAPED or not isinstance(value, Tensor) or not value.ndim:
                continue
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint's optimizer has a {key} of shape {tuple(value.shape)} for a "
                    f'parameter of shape {tuple(parameter.shape)}. Either {_WAY_OUT}'
                )
            # A kernel may walk the memory linearly: strides must not lead out of it.
            if not value.is_contiguous() and not (
                value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
            ):
                state[key] = value.contiguous()


def own_ids(ids: Any, same_folder: bool) -> list[int]:
    """Epochs or iterations whose files the run may delete; none if another folder has them."""
    known = isinstance(ids, list) and all(type(each) is int for each in ids)
    return list(ids) if known and same_folder else []


def own_file(path: Any, folder: str, starts: Sequence[str]) -> str | None:
    """The path in ``folder`` of a file that the run may delete or read; None if it is not its own.

    Only the file's name is used, so that a folder may be moved.
    """
    if type(path) is not str:
        return None
    name = path.replace('\\', '/').rsplit('/', 1)[-1]
    if not name.startswith(tuple(starts)) or not name.endswith('.pth'):
        return None
    return osp.join(folder, name)
