"""A teacher's checkpoint fills its network completely, or is refused with counts and names."""

from __future__ import annotations

from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from ..recipe import TeacherError, without_terms
from .checkpoint import load_verified


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
    if sha256 is None:
        state = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    else:
        state = load_verified(checkpoint, sha256)
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
