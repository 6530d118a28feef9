"""The teacher: built from its config, filled completely from its checkpoint, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from ..recipe import (
    UNTRAINED,
    MissingFileError,
    TeacherError,
    plain_student,
    read_teacher_config,
    without_terms,
)
from .checkpoint import CheckpointError, load_verified


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher's frozen network, in eval mode.

    Attributes:
        network: the detector.
        config: of the teacher.
        name: of its config, for messages.
        source: of its weights: a path or URL, or 'random'.
        loaded: how many tensors were loaded.
        passed_over: how many were not, because they are of the terms of a distilled student.
    """

    network: Any
    config: Any
    name: str
    source: str
    loaded: int = 0
    passed_over: int = 0


def load_teacher(
    config: str | Path | dict | None, checkpoint: str | None, sha256: str | None
) -> LoadedTeacher:
    """Build and load a teacher.

    Args:
        config: a path, an ``mmdet::...`` name, or a dict.
        checkpoint: a path or URL; 'random' leaves the network untrained.
        sha256: of the checkpoint, 64 hex digits; None: it may be any.

    Raises:
        TeacherError: if there is no config or no checkpoint, or the two do not fit.
        CheckpointError: if the file is refused, or is another than ``sha256`` says.
    """
    if checkpoint is None or checkpoint == '':
        raise TeacherError(
            'model.teacher_ckpt is missing, so the teacher would be random noise: name its '
            f'checkpoint (or {UNTRAINED!r}, if noise is what you want, in a test)'
        )
    cfg = read_teacher_config(config)
    name = str(cfg.filename or 'given as a dict')
    network = MODELS.build({**plain_student(cfg.model), 'train_cfg': None})
    counts = (0, 0)
    if checkpoint != UNTRAINED:
        counts = load_completely(network, str(checkpoint), sha256, name)
    elif isinstance(network, BaseModule):
        _without_pretrained(network).init_weights()
    network.eval().requires_grad_(False)
    return LoadedTeacher(network, cfg, name, str(checkpoint), *counts)


def load_completely(
    network: nn.Module, checkpoint: str, sha256: str | None, config: str
) -> tuple[int, int]:
    """Load a checkpoint into a teacher's network.

    Args:
        network: built from ``teacher_config``.
        checkpoint: a path or URL.
        sha256: of the file, 64 hex digits; None: it may be any.
        config: the name of ``teacher_config``, for messages.

    Returns:
        How many tensors were loaded, and how many were passed over because they are of the terms
        of a distilled student.

    Raises:
        TeacherError: if keys are missing, left over, or have another shape.
        CheckpointError: if the file is refused, or is another than ``sha256`` says.
    """
    try:
        if sha256 is None:
            state = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        else:
            state = load_verified(checkpoint, sha256)
    except FileNotFoundError:
        raise MissingFileError('teacher_ckpt', checkpoint) from None
    except CheckpointError as error:
        said = f"the teacher's checkpoint, model.teacher_ckpt: {error}"
        raise CheckpointError(said) from error.__cause__
    state = state.get('state_dict', state)
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    own = without_terms(state)
    wanted = network.state_dict()
    misshaped = {
        k: f'{k} ({tuple(own[k].shape)} in the file, {tuple(v.shape)} in teacher_config)'
        for k, v in wanted.items()
        if k in own and own[k].shape != v.shape
    }
    # Through the network's own hooks: they translate the keys of older versions.
    fitting = {k: v for k, v in own.items() if k not in misshaped}
    result = network.load_state_dict(fitting, strict=False)
    missing = [
        k
        for k in result.missing_keys
        if k not in misshaped and not k.endswith('num_batches_tracked')
    ]
    problems = [
        f'{verb} {len(keys)} of {len(wanted)} keys (first: {", ".join(keys[:3])})'
        for verb, keys in (
            ('lacks', missing),
            ('has in another shape', list(misshaped.values())),
            ('has, beyond the network,', result.unexpected_keys),
        )
        if keys
    ]
    if problems:
        raise TeacherError(
            f'teacher checkpoint {checkpoint} {"; ".join(problems)}. It was trained with another '
            f'config than teacher_config {config}: name the config it was trained with'
        )
    return len(wanted) - len(result.missing_keys), len(state) - len(own)


def _without_pretrained(network: Any) -> Any:
    for module in network.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            module.init_cfg = None
    return network
