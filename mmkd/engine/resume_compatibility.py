"""What a run that resumes takes from a file, before it acts on it.

Weights are checked by the reader. The rest of a training checkpoint decides what is deleted, how
often something is repeated and which kernels run over which memory, so it has to be what a run
like this one writes.
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
from ..io.safe_reader import show
from ..recipe import rename_adapters

_HOW = ('fused', 'foreach', 'capturable', 'differentiable')
"""Which kernels compute an optimizer's step: not the file's to say."""
_BY_ELEMENT = frozenset(
    ('momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'exp_inf', 'square_avg')
    + ('grad_avg', 'sum', 'acc_delta', 'prev', 'step_size', 'ax', 'mu_product', 'eta')
)
"""State that has a number for each of a parameter's, or one: fused kernels take it for granted."""
_WAY_OUT = (
    'resume it with the config that it was written with, or start from its weights: load_from'
)


def check_resumed(checkpoint: dict, path: str, runner: Runner, model: nn.Module) -> None:
    """Before anything of it is used.

    Args:
        checkpoint: as it was read.
        path: where.
        runner: of the run that is to go on.
        model: its own, without a wrapper.

    Raises:
        CheckpointError: It is not the state of a training run, or is that of another network, or
            counts what cannot be.
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
            raise CheckpointError(f'checkpoint {path} is at {name} {show(count)}, which is none')
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


def guard_optimizer(optimizer: Optimizer) -> None:
    """Whatever it loads from now on is checked."""
    if not hasattr(optimizer, '_mmkd_guarded'):
        optimizer._mmkd_guarded = True
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
        {**group, **{key: mine[key] for key in _HOW if key in mine}}
        for group, mine in zip(saved, own, strict=True)
    ]
    return {**state, 'param_groups': groups}


def _after_loading(optimizer: Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            if key not in _BY_ELEMENT or not isinstance(value, Tensor) or not value.ndim:
                continue
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint's optimizer has a {key} of shape {tuple(value.shape)} for a "
                    f'parameter of shape {tuple(parameter.shape)}. Either {_WAY_OUT}'
                )
            # A kernel that goes through it from its beginning must not leave it.
            if not value.is_contiguous() and not (
                value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
            ):
                state[key] = value.contiguous()


def own_ids(ids: Any, same_folder: bool) -> list[int]:
    """Epochs or iterations whose files the run may delete: those that it wrote to its folder."""
    known = isinstance(ids, list) and all(type(each) is int for each in ids)
    return list(ids) if known and same_folder else []


def own_file(path: Any, folder: str, starts: Sequence[str]) -> str | None:
    """A path that the run may delete or read: of a file in its folder that is called like its own.

    A folder that was moved is found by the file's name.
    """
    if type(path) is not str:
        return None
    name = path.replace('\\', '/').rsplit('/', 1)[-1]
    if not name.startswith(tuple(starts)) or not name.endswith('.pth'):
        return None
    return osp.join(folder, name)
