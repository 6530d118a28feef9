"""What the published methods share: kinds of terms, and small pieces of arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..models.heads import Rows, stage_of
from ..models.terms import FeatureTerm, RowTerm

LEVELS = tuple(f'neck[{level}]' for level in range(4))
"""P2 to P5 of an FPN, fine to coarse."""


class MapTerm(FeatureTerm):
    """A method that compares maps (N, C, H, W); behind a 1×1 convolution if their widths differ.

    Attributes:
        over_image: whether the maps must lie over the image, because objects are looked up there.
        ordered: whether the pairs must be named fine to coarse.
    """

    adapter = 'match'
    over_image = ordered = False

    def bind(self, pairs: Sequence[LayerPair]) -> None:
        for pair in pairs:
            vectors = any(len(shape) != 4 for shape in pair.shapes)
            if vectors or (self.over_image and pair.strides is None):
                what = 'maps over the image' if self.over_image else 'maps (N, C, H, W)'
                raise ValueError(
                    f'{type(self).__name__} compares {what}, and {pair.student} is none: name a '
                    'layer of the neck or the backbone in its pairs'
                )
        strides = [pair.strides[0] for pair in pairs if pair.strides]
        if self.ordered and strides != sorted(strides):
            raise ValueError(
                f'{type(self).__name__} takes levels from fine to coarse, and its pairs have '
                f'strides {strides}: name them in that order'
            )
        super().bind(pairs)


class LevelTerm(MapTerm):
    """A method that looks at the level of the student's RPN that has the stride of a pair."""

    over_image = True

    def check_networks(self, student: Any, teacher: Any) -> None:
        generator: Any = getattr(getattr(student, 'rpn_head', None), 'prior_generator', None)
        if not hasattr(generator, 'base_anchors'):
            raise ValueError(
                f"{type(self).__name__} needs an RPN with anchors, and the student's is "
                f'{type(getattr(student, "rpn_head", None)).__name__}: take a method without one, '
                'such as PKD'
            )
        self.strides = [float(stride[0]) for stride in generator.strides]

    def bind(self, pairs: Sequence[LayerPair]) -> None:
        super().bind(pairs)
        for pair in pairs:
            if pair.strides and pair.strides[0] not in self.strides:
                raise ValueError(
                    f'{type(self).__name__}: {pair.student} has stride {pair.strides[0]:g}, and '
                    f'the RPN has no level of it ({", ".join(f"{s:g}" for s in self.strides)}): '
                    'name other layers in its pairs'
                )

    def level(self, pair: LayerPair) -> int:
        """The index of the RPN's level that lies on the grid of a pair."""
        return self.strides.index(pair.strides[0])  # type: ignore[index]


class LogitTerm(RowTerm):
    """A method that compares logits.

    Attributes:
        classes: how many columns of a softmax it needs to say anything; 0: a sigmoid head will do.
        instead: the way out.
    """

    classes, instead = 0, "take type='KL'"

    def check_networks(self, student: Any, teacher: Any) -> None:
        name = type(self).__name__
        if self.kind != 'cls':
            raise ValueError(f"{name} compares logits, so kind={self.kind!r} must be 'cls'")
        if not self.classes:
            return
        if self.site == 'rpn':
            raise ValueError(
                f'{name} compares how probability is shared out among classes, and an RPN has '
                f"none, only object or not: take site='rcnn', or {self.instead}"
            )
        head = box_head(student)
        if not hasattr(head, 'loss_cls'):
            return  # refused in other words
        if getattr(head.loss_cls, 'use_sigmoid', False):
            raise ValueError(
                f'{name} compares how a softmax shares probability out among classes, and the '
                f"student's RoI head scores each class by a sigmoid of its own: {self.instead}"
            )
        if head.num_classes + 1 < self.classes:
            raise ValueError(
                f'{name} needs at least {self.classes - 1} classes beside the background, and the '
                f"student's RoI head has {head.num_classes}: {self.instead}"
            )


def box_head(network: Any) -> Any:
    """The box head of the first stage; None where there is none."""
    heads = getattr(getattr(network, 'roi_head', None), 'bbox_head', None)
    return stage_of(heads, 0)


def divergence(student: Tensor, teacher: Tensor, sigmoid: bool = False, tau: float = 1.0) -> Tensor:
    """τ² KL(teacher ‖ student) of each row (n,); of sigmoids, the sum over their columns."""
    logs = []
    for logits in (student, teacher.detach()):
        logits = to_float32(logits) / tau
        if sigmoid:
            logs.append(F.logsigmoid(torch.stack([logits, -logits], -1)))
        else:
            logs.append(logits.log_softmax(-1))
    return tau**2 * (logs[1].exp() * (logs[1] - logs[0])).flatten(1).sum(1)


def average(rows: Rows, each: Tensor) -> Tensor:
    """The mean of what is said of each row, (n,) or (n, 4), weighted and divided as in the head's
    own loss."""
    if not len(each):
        return each.sum()  # a zero with a graph
    total = (each if rows.weight is None else each * rows.weight).sum()
    return total / (len(each) if rows.avg_factor is None else rows.avg_factor)


def with_weight(rows: Rows) -> Tensor:
    """Whether the head's own loss gives a row weight, (n,): not if the teacher lacks its class."""
    weight = torch.as_tensor(1.0 if rows.weight is None else rows.weight)
    return (weight > 0).to(rows.student.device).expand(len(rows.student))


def without_target(logits: Tensor, target: Tensor) -> Tensor:
    """The logits (n, C) of the classes that are not the target, (n, C - 1)."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, target[:, None], False)
    return logits[others].view(len(logits), logits.size(1) - 1)


def centred(rows: Tensor) -> Tensor:
    """Each row (r, n) minus its mean. One that is constant up to rounding is 0 without gradient,
    which a division by its deviation would make a million times the usual."""
    apart = rows - rows.mean(1, keepdim=True)
    noise = 8 * torch.finfo(rows.dtype).eps * rows.detach().abs()
    return apart.masked_fill((apart.detach().abs() <= noise).all(1, keepdim=True), 0)


def standardised(rows: Tensor, epsilon: float) -> Tensor:
    """Each row (r, n) with mean 0 and deviation 1 (unbiased, plus ``epsilon``)."""
    rows = centred(rows)
    deviation = vector_norm(rows, dim=1, keepdim=True) / max(rows.size(1) - 1, 1) ** 0.5
    return rows / (deviation + epsilon)


def per_image(total: Tensor, maps: Tensor) -> Tensor:
    """``total`` over the number of images (or RoIs) of ``maps``, which may be none."""
    return total / max(len(maps), 1)


def spatial_attention(maps: Tensor, temperature: float) -> Tensor:
    """H·W · softmax over the places of the mean over channels of |x|: (N, H, W)."""
    places = maps.abs().mean(1).flatten(1)
    return places.size(1) * (places / temperature).softmax(1).view(len(maps), *maps.shape[2:])


def channel_attention(maps: Tensor, temperature: float) -> Tensor:
    """C · softmax over the channels of the mean over places of |x|: (N, C)."""
    return maps.size(1) * (maps.abs().mean((2, 3)) / temperature).softmax(1)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that takes one value per channel, which PyTorch's refuses to train on."""

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and maps.numel() <= maps.size(1):
            weight, bias = (p.view(1, -1, 1, 1) for p in (self.weight, self.bias))
            return (maps - maps) * weight + bias
        return super().forward(maps)


def in_full(maps: Tensor) -> torch.autocast:
    """A context in which products over many channels or places stay out of half precision."""
    return torch.autocast(maps.device.type, enabled=False)
