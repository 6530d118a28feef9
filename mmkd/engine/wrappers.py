"""The objects inside MMEngine's wrappers of models and optimizers."""

from __future__ import annotations

from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from torch import nn
from torch.optim import Optimizer


def unwrap(model: nn.Module) -> Any:
    """The detector inside a wrapper such as DistributedDataParallel."""
    return model.module if is_model_wrapper(model) else model


def optimizers(wrapper: Any) -> list[Optimizer]:
    """The optimizers inside one OptimWrapper or several; none of None."""
    if wrapper is None:
        return []
    inner = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return [each.optimizer for each in inner]


def distils(model: Any) -> bool:
    """Whether a detector, without wrapper, is a distilling one."""
    return hasattr(model, 'kd_terms') and hasattr(model, 'teacher')
