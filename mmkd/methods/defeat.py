"""Decoupled features: objects and background apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..models.heads import Rows
from ..models.step import Step
from ..recipe import number
from ..registry import TERMS
from .base import LogitTerm, MapTerm, divergence, with_weight


@TERMS.register_module()
class DeFeat(MapTerm):
    r"""Objects and background of a map, each with its own weight.

    Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021.

    .. math:: \frac{1}{L} \sum_l \Bigl( \frac{\alpha_{obj} \sum M (S - T)^2}{2 \sum M}
        + \frac{\alpha_{bg} \sum (1 - M) (S - T)^2}{2 \sum (1 - M)} \Bigr)

    S and T are the student's and the teacher's map of level l, (N, C, H, W), and M, repeated over
    the channels, is 1 in the cells of the boxes of that level: log2(sqrt(area) / 56), rounded down,
    counted from the first pair, as an FPN assigns them. A box ends before its last partial cell.
    :class:`DeFeatHead` is the part of the RoI head.

    Needs: layer pairs, fine to coarse, boxes.
    Parameters: none; a 1×1 convolution for each pair of different widths.
    Public code: the authors' reduces a box thinner than a cell to one cell, and raises at a border;
        ours keeps all of its length.
    Defaults: P2 to P6, weights 4 and 16, the authors' for COCO (3 and 12 for VOC).

    Args:
        object_weight: α_obj.
        background_weight: α_bg.
        as_published: reduce thin boxes as the authors' code does.
    """

    over_image = ordered = True

    def __init__(
        self, object_weight: float = 4.0, background_weight: float = 16.0,
        as_published: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.object_weight = number('DeFeat', 'object_weight', object_weight, 0)
        self.background_weight = number('DeFeat', 'background_weight', background_weight, 0)
        self.as_published = as_published

    def context(self, step: Step, pair: LayerPair) -> Tensor:
        stride, size = pair.strides[0], step.features(pair)[0].shape[-2:]  # type: ignore[index]
        boxes = [each * stride for each in step.boxes(pair) or ()]
        level = list(self.pairs).index(pair)
        return self.mask(boxes, level, len(self.pairs), stride, size)

    def mask(
        self, boxes: Sequence[Tensor], level: int, levels: int, stride: float, size: Sequence[int]
    ) -> Tensor:
        """M of one level, (N, H, W), from the boxes of each image in pixels."""
        return torch.stack(
            [
                covered(b[levels_of(b, levels) == level] / stride, size, self.as_published)
                for b in boxes
            ]
        )

    def forward(  # type: ignore[override]
        self, student: list, teacher: list, layers: list, masks: list
    ) -> dict[str, Tensor]:
        parts = super().forward(student, teacher, layers, masks)
        return {name: part / len(student) for name, part in parts.items()}

    def compare(
        self, student: Tensor, teacher: Tensor, layers: Any, mask: Tensor
    ) -> dict[str, Tensor]:
        error = (to_float32(student) - to_float32(teacher.detach())).square().sum(1)

        def mean(where: Tensor) -> Tensor:
            return (error * where).sum() / (2 * student.size(1) * where.sum()).clamp(min=1)

        return dict(
            objects=self.object_weight * mean(mask.to(error)),
            background=self.background_weight * mean(1 - mask.to(error)),
        )


@TERMS.register_module()
class DeFeatHead(LogitTerm):
    r"""KL of the RoI head's logits, over objects and over background apart.

    Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021.

    .. math:: \tau^2 \bigl( \beta_{obj}\, \mathrm{mean}_{obj}\, \mathrm{KL}(t \,\|\, s)
        + \beta_{bg}\, \mathrm{mean}_{bg}\, \mathrm{KL}(t \,\|\, s) \bigr)

    s and t are softmaxes of the logits (n, C + 1) over τ; the means are over rows labelled as
    objects, and over the others.

    Needs: rows of the RoI head, labels.
    Parameters: none.
    Public code: the authors' takes the largest label present for the background, and in its default
        mode compares RoIs with the labels of others.
    Defaults: weights 2 and 2, τ = 1, the authors' for COCO; off in their config for VOC.

    Args:
        object_weight: β_obj.
        background_weight: β_bg.
        tau: τ, the temperature.
        as_published: take the largest label present for the background.
    """

    def __init__(
        self, object_weight: float = 2.0, background_weight: float = 2.0, tau: float = 1.0,
        as_published: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.object_weight = number('DeFeatHead', 'object_weight', object_weight, 0)
        self.background_weight = number('DeFeatHead', 'background_weight', background_weight, 0)
        self.tau, self.as_published = number('DeFeatHead', 'tau', tau, 1e-3), as_published

    def check_networks(self, student: Any, teacher: Any) -> None:
        super().check_networks(student, teacher)
        if self.site == 'rpn':
            raise ValueError("DeFeatHead compares RoIs, so site='rpn' must be 'rcnn'")

    def compare(self, rows: Rows) -> dict[str, Tensor]:
        each = divergence(rows.student, rows.teacher, rows.sigmoid, self.tau)
        background = rows.student.size(1) - rows.background
        if self.as_published and len(rows.target):
            background = int(rows.target.max())
        counted = with_weight(rows)
        objects = (rows.target != background) & counted

        def mean(where: Tensor) -> Tensor:
            return (each * where).sum() / where.sum().clamp(min=1)

        return dict(
            objects=self.object_weight * mean(objects),
            background=self.background_weight * mean(~objects & counted),
        )


def levels_of(boxes: Tensor, levels: int) -> Tensor:
    """The level (n,) of each box (n, 4) in pixels, 0 the finest."""
    side = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1).clamp(min=0).sqrt()
    return (side / 56 + 1e-6).log2().floor().clamp(0, levels - 1)


def covered(boxes: Tensor, size: Sequence[int], thin_is_one_cell: bool) -> Tensor:
    """1 in the cells of boxes (n, 4), which are in cells, else 0: (H, W)."""
    cells = boxes.long()
    last = cells.new_tensor([size[1] - 1, size[0] - 1])
    low, high = cells[:, :2], cells[:, 2:]
    if thin_is_one_cell:
        thin = (low == high).any(1, keepdim=True)
        high = torch.where(thin, low + 1, high)
    low = low.clamp(min=0).minimum(last)
    high = high.maximum(low + 1)
    y, x = (torch.arange(length, device=boxes.device) for length in size)
    rows = (y >= low[:, 1:]) & (y < high[:, 1:])
    columns = (x >= low[:, :1]) & (x < high[:, :1])
    return (rows[:, :, None] & columns[:, None, :]).any(0).to(boxes)
