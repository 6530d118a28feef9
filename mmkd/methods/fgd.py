"""Focal and global distillation."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..models.step import Step
from ..recipe import number
from ..registry import TERMS
from .base import LEVELS, MapTerm, channel_attention, in_full, per_image, spatial_attention


@TERMS.register_module()
class FGD(MapTerm):
    r"""Objects and background apart, where the teacher looks; and what relates the places.

    Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022.

    .. math:: \frac{1}{N} \sum_{nchw} (\alpha M + \beta B)_{nhw} A^s_{nhw} A^c_{nc} (S - T)^2
        + \frac{\gamma}{N} (\|A^s_S - A^s_T\|_1 + \|A^c_S - A^c_T\|_1)
        + \frac{\lambda}{N} \|R_S(S) - R_T(T)\|^2

    S and T are the student's and the teacher's map, (N, C, H, W). M is 1 over the number of cells
    that a box touches, the largest where boxes overlap; B is 1 over the number of the other cells.
    A are softmaxes of the mean of |x| over channels or places (temperature ``temp``), times their
    number; those in the first sum are the teacher's. R is a GCBlock, one for each network. The
    pairs are summed.

    Needs: layer pairs, boxes.
    Parameters: 2 GCBlocks for each pair, the teacher's trained too (0.53 M for four of 256
        channels).
    Public code: the authors' divides boxes by the image's own size, so that they lie beside the
        objects of an image that is padded; ours places them by stride.
    Defaults: P2 to P5 and the authors' weights for two-stage detectors.

    Args:
        temp: temperature of the attentions.
        alpha_fgd: α, of objects.
        beta_fgd: β, of the background.
        gamma_fgd: γ, of the attentions.
        lambda_fgd: λ, of the relations.
        as_published: place boxes as the authors' code does.
    """

    over_image = True
    entries = LEVELS

    def __init__(
        self, temp: float = 0.5, alpha_fgd: float = 5e-5, beta_fgd: float = 2.5e-5,
        gamma_fgd: float = 5e-5, lambda_fgd: float = 5e-7, as_published: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temp, self.as_published = number('FGD', 'temp', temp, 1e-3), as_published
        given = (alpha_fgd, beta_fgd, gamma_fgd, lambda_fgd)
        names = ('alpha_fgd', 'beta_fgd', 'gamma_fgd', 'lambda_fgd')
        self.weights = [number('FGD', n, w, 0) for n, w in zip(names, given, strict=True)]

    def build(self, pair: LayerPair) -> nn.Module:
        width = pair.channels[1]
        return nn.ModuleDict(dict(student=GlobalContext(width), teacher=GlobalContext(width)))

    def context(self, step: Step, pair: LayerPair) -> list[Tensor] | None:
        if not self.as_published:
            return step.boxes(pair)
        size = step.features(pair)[0].shape[-2:]
        boxes = [
            published_cells(get_box_tensor(s.gt_instances.bboxes), s.img_shape, size)
            for s in step.samples
        ]
        return boxes * step.repeats(pair)

    def compare(
        self, student: Tensor, teacher: Tensor, layers: Any, boxes: list[Tensor]
    ) -> dict[str, Tensor]:
        student, teacher = to_float32(student), to_float32(teacher.detach())
        places, channels = (
            [attention(maps, self.temp) for maps in (student, teacher)]
            for attention in (spatial_attention, channel_attention)
        )
        error = (channels[1][:, :, None, None] * (student - teacher).square()).sum(1) * places[1]
        objects, background = focal_masks(boxes, error)
        apart = [(own - theirs).abs().sum() for own, theirs in (places, channels)]
        related = layers['student'](student) - layers['teacher'](teacher)
        parts = (
            (error * objects).sum(), (error * background).sum(), sum(apart), related.square().sum()
        )  # fmt: skip
        names = ('fg', 'bg', 'attention', 'global')
        return {
            name: weight * per_image(part, student)
            for name, weight, part in zip(names, self.weights, parts, strict=True)
        }


def focal_masks(boxes: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """M and B, each (N, H, W), of boxes in cells."""
    y, x = (torch.arange(size, device=like.device) for size in like.shape[1:])
    masks = []
    for each in boxes:
        left, top = each[:, :2].floor().unbind(1)
        right, bottom = each[:, 2:].ceil().unbind(1)
        rows = (y >= top[:, None]) & (y <= bottom[:, None])
        columns = (x >= left[:, None]) & (x <= right[:, None])
        weight = 1 / ((bottom - top + 1) * (right - left + 1)).to(like)
        inside = (rows[:, :, None] & columns[:, None, :]) * weight[:, None, None]
        masks.append(inside.amax(0) if len(each) else torch.zeros_like(like[0]))
    objects = torch.stack(masks)
    background = (objects == 0).to(like)
    return objects, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def published_cells(boxes: Tensor, shape: tuple, size: tuple) -> Tensor:
    """Boxes (n, 4) in pixels as the authors' code puts them on a map of ``size``, in its cells."""
    image = boxes.new_tensor([shape[1], shape[0]] * 2)
    return boxes / image * boxes.new_tensor([size[1], size[0]] * 2)


class GlobalContext(nn.Module):
    """GCBlock (Cao et al., ICCVW 2019): adds to each place what all places have in common."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(width // 2, 1)
        self.attention = nn.Conv2d(width, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(width, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(),
            nn.Conv2d(inner, width, 1),
        )  # fmt: skip
        nn.init.kaiming_normal_(self.attention.weight)
        nn.init.zeros_(self.attention.bias)
        nn.init.zeros_(self.add[3].weight)
        nn.init.zeros_(self.add[3].bias)

    def forward(self, maps: Tensor) -> Tensor:
        with in_full(maps):
            weight = self.attention(maps).flatten(1).softmax(1).view(len(maps), 1, *maps.shape[2:])
            return maps + self.add((maps * weight).sum((2, 3), keepdim=True))
