"""The teacher: built from its config, filled completely from its checkpoint, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from ..recipe import (
    UNTRAINED,
    MissingFileError,
    TeacherError,
    plain_student,
    read_teacher_config,
    without_terms,
)
from .checkpoint import CheckpointError, load_verified, require_finite


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
        wrapping: what the file's weights were wrapped in; '' where they are as MMEngine saves them.
    """

    network: Any
    config: Any
    name: str
    source: str
    loaded: int = 0
    passed_over: int = 0
    wrapping: str = ''


def load_teacher(
    config: str | Path | dict | Config | None, checkpoint: str | None, sha256: str | None
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
    counts: tuple[int, int, str] = (0, 0, '')
    if checkpoint != UNTRAINED:
        counts = load_completely(network, str(checkpoint), sha256, name)
    elif isinstance(network, BaseModule):
        _without_pretrained(network).init_weights()
    network.eval()  # which returns nothing where it is one of MMDetection's distilled detectors
    network.requires_grad_(False)
    return LoadedTeacher(network, cfg, name, str(checkpoint), *counts)


def load_completely(
    network: nn.Module, checkpoint: str, sha256: str | None, config: str
) -> tuple[int, int, str]:
    """Load a checkpoint into a teacher's network.

    Weights that are wrapped in another way than MMEngine's (:func:`wrappings`) are unwrapped if
    exactly one way makes all keys fit.

    Args:
        network: built from ``teacher_config``.
        checkpoint: a path or URL.
        sha256: of the file, 64 hex digits; None: it may be any.
        config: the name of ``teacher_config``, for messages.

    Returns:
        How many tensors were loaded, how many were passed over because they are of the terms of a
        distilled student, and the wrapping ('' if there is none).

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
    wanted = network.state_dict()
    ways = wrappings(state)
    fitting_ways = [way for way, weights in ways.items() if _fits(without_terms(weights), wanted)]
    unwrap = len(fitting_ways) == 1 and '' not in fitting_ways
    wrapping = fitting_ways[0] if unwrap else ''
    state = ways[wrapping]
    own = without_terms(state)
    misshaped = {
        k: f'{k} ({tuple(own[k].shape)} in the file, {tuple(v.shape)} in teacher_config)'
        for k, v in wanted.items()
        if k in own and own[k].shape != v.shape
    }
    # Through the network's own hooks: they translate the keys of older versions.
    fitting = {k: v for k, v in own.items() if k not in misshaped}
    require_finite(network, fitting, checkpoint)
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
            f'teacher checkpoint {checkpoint} {"; ".join(problems)}. '
            + _way_out(fitting_ways, [way for way in ways if way], config)
        )
    return len(wanted) - len(result.missing_keys), len(state) - len(own), wrapping


_HOLDERS = (
    *('state_dict', 'model', 'model_state_dict', 'ema', 'ema_state_dict', 'model_ema', 'module'),
    *('state_dict_ema', 'teacher', 'network', 'net', 'weights'),
)
_PREFIXES = ('module.', '_orig_mod.', 'model.', 'net.', 'network.', 'ema_model.', 'teacher.')


def wrappings(file: dict) -> dict[str, dict[str, Any]]:
    """The weights in a file by how they are wrapped there.

    Args:
        file: a checkpoint.

    Returns:
        First those where MMEngine has them (under ``state_dict`` or not, after ``module.`` or not),
        by ''; then those under other names, and after prefixes that all keys have.
    """
    usual = file.get('state_dict', file)
    found = {'': {k.removeprefix('module.'): v for k, v in usual.items() if isinstance(k, str)}}
    holders = {f'under {k!r}': file[k] for k in _HOLDERS if isinstance(file.get(k), dict)}
    for where, weights in {'': usual, **holders}.items():
        tensors = {
            k: v if isinstance(v, Tensor) else torch.from_numpy(v)
            for k, v in weights.items()
            if isinstance(k, str) and isinstance(v, Tensor | np.ndarray)
        }
        steps = [where] if where and weights is not usual else []
        if steps and tensors:
            found[where] = tensors
        while tensors:
            tensors.pop('steps', None)  # of MMEngine's EMA
            prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), '')
            if not prefix:
                break
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
            steps.append(f'after {prefix!r}')
            if steps != ["after 'module.'"]:
                found[' '.join(steps)] = tensors
    return found


def _fits(weights: dict[str, Any], wanted: dict[str, Tensor]) -> bool:
    shapes = {k: tuple(getattr(v, 'shape', ())) for k, v in weights.items()}
    return all(
        shapes.get(k) == tuple(v.shape) or (k not in shapes and k.endswith('num_batches_tracked'))
        for k, v in wanted.items()
    ) and set(shapes) <= set(wanted)


def _way_out(fitting: list[str], seen: list[str], config: str) -> str:
    if fitting:
        return (
            f'It holds {len(fitting)} sets of weights that fit ({"; ".join(fitting)}): save the '
            "one that you mean as torch.save({'state_dict': weights}, path)"
        )
    wrapped = f'. Its weights {"; and those ".join(seen)} do not fit either' if seen else ''
    return (
        f'It was trained with another config than teacher_config {config}: name the config it was '
        f'trained with{wrapped}'
    )


def _without_pretrained(network: Any) -> Any:
    for module in network.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            module.init_cfg = None
    return network
