"""A cheaper forward of the teacher: it is inference, so it may be run as inference is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from mmcv.cnn.utils.fuse_conv_bn import fuse_conv_bn
from mmdet.models.backbones.csp_darknet import Focus
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .roi_align import GatheredRoIExtractor

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Acceleration:
    """How the teacher runs; by default exactly as built, to the bit.

    Args:
        fuse_conv_bn: fold BatchNorm into the convolution before it: equal up to float rounding.
        channels_last: lay feature maps out by pixel: equal up to float rounding.
        roi_align: on a CPU, RoIAlign as
            :class:`mmkd.options.roi_align.GatheredRoIExtractor`: equal up to float rounding.
        dtype: 'bfloat16' or 'float16': autocast for the teacher alone, which rounds its answers.

    Raises:
        ValueError: for a value that none of these takes.
    """

    fuse_conv_bn: bool = False
    channels_last: bool = False
    roi_align: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ('fuse_conv_bn', 'channels_last', 'roi_align'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f'distillation.accelerate: {name}={getattr(self, name)!r} must be True or False'
                )
        if self.dtype is not None and self.dtype not in list(DTYPES):
            raise ValueError(
                f'distillation.accelerate: dtype={self.dtype!r} must be None, '
                + ' or '.join(map(repr, DTYPES))
            )

    def __str__(self) -> str:
        said = [
            f.name if value is True else f'{f.name}={value}'
            for f in fields(self)
            if (value := getattr(self, f.name))
        ]
        return ', '.join(said) or 'exactly'

    def prepare(self, network: nn.Module) -> None:
        """Change a teacher's network in place, once its weights are where they belong.

        Raises:
            ValueError: if its features change: a BatchNorm need not belong to the convolution
                before it.
        """
        if self.fuse_conv_bn:
            _fuse(network)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.roi_align:
            _gather(network)

    def pixels(self, pixels: Tensor) -> Tensor:
        """Images (N, 3, H, W) as the network now wants them laid out."""
        return (
            pixels.contiguous(memory_format=torch.channels_last) if self.channels_last else pixels
        )

    def for_rois(self, features: Sequence[Tensor], roi_head: nn.Module) -> list[Tensor]:
        """Features as ``roi_head``'s RoIAlign wants them.

        mmcv's RoIAlign reads memory channel by channel whatever the strides, and takes half
        precision on GPUs only.
        """
        features = [_full(f, f.is_cuda) for f in features]
        extractors = [m for m in roi_head.modules() if isinstance(m, BaseRoIExtractor)]
        if extractors and all(isinstance(m, GatheredRoIExtractor) for m in extractors):
            return features
        return [f.contiguous() for f in features]

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context in which the teacher runs; without a dtype of its own, that of the caller."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=DTYPES[self.dtype])


def input_channels(network: nn.Module) -> int:
    """Channels of a detector's images: those of its first convolution."""
    backbone = getattr(network, 'backbone', network)
    for module in getattr(backbone, 'modules', tuple)():
        if isinstance(module, Focus):  # folds each 2x2 pixels into channels
            return module.conv.conv.in_channels // 4
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def full(answer: Any) -> Any:
    """A tensor of half precision in float32; anything else as it is."""
    return _full(answer) if isinstance(answer, Tensor) else answer


def laid_out(hint: Tensor, guided: Tensor) -> Tensor:
    """``hint`` in the memory format of ``guided``: mixed formats are slower than a copy."""
    if hint.is_contiguous() or not guided.is_contiguous():
        return hint
    dtype = torch.float32 if hint.dtype in (torch.bfloat16, torch.float16) else hint.dtype
    return hint.to(dtype, memory_format=torch.contiguous_format)


def _full(tensor: Tensor, half: bool = False) -> Tensor:
    halves = (torch.bfloat16,) if half else (torch.bfloat16, torch.float16)
    return tensor.float() if tensor.dtype in halves else tensor


def _gather(network: nn.Module) -> None:
    for path, module in list(network.named_modules()):
        if GatheredRoIExtractor.replaces(module):
            network.set_submodule(path, GatheredRoIExtractor(module))


@torch.no_grad()
def _fuse(network: nn.Module) -> None:
    parameter = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    size = (1, input_channels(network), 128, 128)
    image = torch.randn(size, generator=generator).to(parameter)
    before = [f.clone() for f in network.extract_feat(image)]
    hooks = {name: module._forward_hooks for name, module in network.named_modules()}
    fuse_conv_bn(network)
    for name, module in network.named_modules():
        module._forward_hooks = hooks[name]  # of a layer that an identity has replaced
        for weight in module.parameters(recurse=False):
            weight.requires_grad_(False)
    after = network.extract_feat(image)
    for old, new in zip(before, after, strict=True):
        scale = old.abs().amax().clamp(min=1e-6)
        if not (new - old).abs().amax() <= 1e-3 * scale:
            raise ValueError(
                "distillation.accelerate.fuse_conv_bn changes this teacher's features (by "
                f'{float((new - old).abs().amax() / scale):.1g} of its largest value): in it, '
                'a BatchNorm does not belong to the convolution before it. Set it to False'
            )


class _SquaredDistance(torch.autograd.Function):
    """:func:`F.mse_loss` to the bit, but it keeps V - Z alone for its backward; 0 of nothing."""

    @staticmethod
    def forward(ctx: Any, guided: Tensor, hint: Tensor, reduction: str) -> Tensor:
        difference = guided - hint
        ctx.save_for_backward(difference)
        ctx.count = max(guided.numel(), 1) if reduction == 'mean' else 1
        return difference.square().sum() / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (2 / ctx.count)).mul_(grad), None, None


def squared_distance(guided: Tensor, hint: Tensor, reduction: str) -> Tensor:
    """:func:`F.mse_loss`, with one map less in memory between forward and backward."""
    return _SquaredDistance.apply(guided, hint, reduction)
