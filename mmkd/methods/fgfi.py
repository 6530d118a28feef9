"""Fine-grained feature imitation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..models.step import Step
from ..recipe import Needs, number
from ..registry import TERMS
from .base import LevelTerm


@TERMS.register_module()
class FGFI(LevelTerm):
    r"""Maps near objects: where an anchor overlaps an object half as well as the best one does.

    Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019.

    .. math:: \frac{1}{2 \sum I} \sum_{nchw} I_{nhw} (a(S) - T)^2, \qquad I_{nhw} = \Bigl[
        \exists\, b, o: \mathrm{IoU}(b, o) > \psi \max_{b'} \mathrm{IoU}(b', o) \Bigr]

    S and T are the student's and the teacher's map, (N, C, H, W); b are the anchors of a place. The
    best anchor b' of an object o is that of all pairs, and the sums are over the batch and all
    pairs.

    Needs: layer pairs at strides of the student's RPN, its anchors, boxes.
    Parameters: the adapter a, a 3×3 convolution of 9 C² + C for each pair.
    Public code: the authors' has one map; its boxes are a pixel larger, and a ReLU ends its
        adapter.
    Defaults: P2 to P6, weight 0.01 and ψ = 0.5, the authors' (one map), who leave the term off for
        the first 400 steps.

    Args:
        psi: ψ.
        as_published: boxes and anchors include their last pixel, as in the authors' code.
    """

    adapter = 'conv3x3'
    loss_weight = 0.01

    def __init__(self, psi: float = 0.5, as_published: bool = False) -> None:
        super().__init__()
        self.psi, self.as_published = number('FGFI', 'psi', psi, 0, 1), as_published

    def needs(self) -> Needs:
        return Needs(pairs=self.entries, anchors=True)

    def context(self, step: Step, pair: LayerPair) -> list[Tensor]:
        anchors, stride = step.anchors()[self.level(pair)], pair.strides[0]  # type: ignore[index]
        boxes = [each * stride for each in step.boxes(pair) or ()]
        return [anchor_overlaps(each, anchors, int(self.as_published)) for each in boxes]

    def forward(  # type: ignore[override]
        self, student: list, teacher: list, layers: list, overlaps: list
    ) -> Tensor:
        masks = imitation_masks(overlaps, self.psi)
        total = sum(
            (mask * (to_float32(own) - to_float32(theirs.detach())).square().sum(1)).sum()
            for mask, own, theirs in zip(masks, student, teacher, strict=True)
        )
        return total / (2 * sum(mask.sum() for mask in masks)).clamp(min=1)


def anchor_overlaps(boxes: Tensor, anchors: Tensor, extra: int = 0) -> Tensor:
    """The IoU of each box (n, 4) with the best anchor of each cell, from (H, W, A, 4): (n, H, W).

    ``extra`` pixels are added to the sides of both.
    """

    def area(corners: Tensor) -> Tensor:
        return (corners[..., 2:] - corners[..., :2] + extra).clamp(min=0).prod(-1)

    found, sizes = [anchors.new_zeros(0, *anchors.shape[:2])], area(anchors)
    for box in boxes:
        corner, end = anchors[..., :2].maximum(box[:2]), anchors[..., 2:].minimum(box[2:])
        common = area(torch.cat([corner, end], -1))
        found.append((common / (sizes + area(box) - common)).amax(-1)[None])
    return torch.cat(found)


def imitation_masks(overlaps: list[list[Tensor]], psi: float) -> list[Tensor]:
    """I of each level, (N, H, W), from the overlaps of each level and image, (n, H, W)."""
    masks: list[list[Tensor]] = [[] for _ in overlaps]
    for levels in zip(*overlaps, strict=True):
        best = torch.stack([level.flatten(1).amax(1) for level in levels]).amax(0)
        for mask, level in zip(masks, levels, strict=True):
            mask.append((level > psi * best[:, None, None]).any(0).to(level))
    return [torch.stack(mask) for mask in masks]
