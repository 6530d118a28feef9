"""Feature-based knowledge distillation: attention and non-local relations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..recipe import number
from ..registry import TERMS
from .base import LEVELS, BatchNorm, MapTerm, channel_attention, in_full, spatial_attention


@TERMS.register_module()
class FBKD(MapTerm):
    r"""Maps where both networks look, their attention, and the relations between their places.

    Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation: Towards
    Accurate and Efficient Detectors", ICLR 2021.

    .. math:: w_1 \|(T - a_1(S)) \sqrt M\| + w_2 \|\bar T_{nc} - a_2(\bar S_{nc})\|
        + w_3 \|\bar T_{nhw} - a_3(\bar S_{nhw})\| + w_4 \|R_T(T) - a_4(R_S(S))\|

    S and T are the student's and the teacher's map, (N, C, H, W); the norms are over the local
    batch and not squared, and have gradient 0 at 0. M is the mean of both networks' attention over
    places (softmax of the mean of |x|, times their number) times that over channels, without
    gradient. A bar is a mean over places or channels; a are a 1×1 convolution, a linear layer, a
    3×3 and a 1×1 convolution. R is a non-local block, one for each network; its keys are pooled by
    ``pool`` first. The pairs are summed.

    Needs: layer pairs.
    Parameters: for each pair 3 C² of adapters and 2 non-local blocks of 4 C² / ``reduction``, the
        teacher's trained too (1.6 M for four of 256 channels).
    Public code: MMRazor's pools keys by 2 a second time, and computes the attention over channels
        without using it.
    Defaults: P2 to P5, weights, reduction and pooling of MMRazor's config of Faster R-CNN.

    Args:
        weights: w_1 to w_4, of masked maps, channels, places and relations.
        reduction: C over the width of the non-local blocks; one number, or one for each pair.
        pool: side of the cells that a key is pooled from; one number, or one for each pair.
        spatial_T: temperature of the attention over places.
        channel_T: temperature of the attention over channels.
        as_published: pool twice, and leave the attention over channels out.
    """

    entries = LEVELS

    def __init__(
        self, weights: Sequence[float] = (7e-5, 4e-3, 4e-3, 7e-5),
        reduction: int | Sequence[int] = (4, 4, 2, 2), pool: int | Sequence[int] = (8, 4, 2, 2),
        spatial_T: float = 0.5, channel_T: float = 0.5, as_published: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(weights) != 4:
            raise ValueError(f'FBKD: weights={weights!r} must be four numbers')
        self.weights = [number('FBKD', f'weights[{i}]', w, 0) for i, w in enumerate(weights)]
        self.reduction, self.pool, self.as_published = reduction, pool, as_published
        self.temperatures = (
            number('FBKD', 'spatial_T', spatial_T, 1e-3),
            number('FBKD', 'channel_T', channel_T, 1e-3),
        )

    def bind(self, pairs: Sequence[LayerPair]) -> None:
        sizes = []
        for name, value in (('reduction', self.reduction), ('pool', self.pool)):
            each = [value] * len(pairs) if isinstance(value, int) else list(value)
            if len(each) != len(pairs) or not all(type(n) is int and n > 0 for n in each):
                raise ValueError(
                    f'FBKD: {name}={value!r} must be a whole number, or one for each of the '
                    f'{len(pairs)} pairs'
                )
            sizes.append(each)
        names = (pair.name for pair in pairs)
        self.sizes = dict(zip(names, zip(*sizes, strict=True), strict=True))
        super().bind(pairs)

    def build(self, pair: LayerPair) -> nn.Module:
        width = pair.channels[1]
        options = (width, *self.sizes[pair.name], self.as_published)
        return nn.ModuleDict(
            dict(
                maps=nn.Conv2d(width, width, 1),
                channels=nn.Linear(width, width),
                places=nn.Conv2d(1, 1, 3, padding=1),
                relations=nn.Conv2d(width, width, 1),
                student=NonLocal(*options),
                teacher=NonLocal(*options),
            )
        )

    def compare(
        self, student: Tensor, teacher: Tensor, layers: Any, boxes: Any
    ) -> dict[str, Tensor]:
        student, teacher = to_float32(student), to_float32(teacher.detach())
        both = (student.detach(), teacher)
        mask = sum(spatial_attention(maps, self.temperatures[0]) for maps in both)[:, None] / 2
        if not self.as_published:
            across = sum(channel_attention(maps, self.temperatures[1]) for maps in both) / 2
            mask = mask * across[:, :, None, None]
        own = (
            layers['maps'](student),
            layers['channels'](student.mean((2, 3))),
            layers['places'](student.mean(1, keepdim=True)),
            layers['relations'](layers['student'](student)),
        )
        theirs = (
            teacher, teacher.mean((2, 3)), teacher.mean(1, keepdim=True), layers['teacher'](teacher)
        )  # fmt: skip
        apart = [t - to_float32(s) for s, t in zip(own, theirs, strict=True)]
        apart[0] = apart[0] * mask.sqrt()
        names = ('mask', 'channel', 'spatial', 'nonlocal')
        return {
            n: w * vector_norm(a) for n, w, a in zip(names, self.weights, apart, strict=True)
        }  # fmt: skip


class NonLocal(nn.Module):
    """A non-local block (Wang et al., CVPR 2018) by dot products, and its input."""

    def __init__(self, width: int, reduction: int, pool: int, twice: bool) -> None:
        super().__init__()
        inner = max(width // reduction, 1)
        self.pools = [2, pool] if twice else [pool]
        self.query, self.key, self.value = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out, self.norm = nn.Conv2d(inner, width, 1, bias=False), BatchNorm(width)
        # It begins as the identity.
        nn.init.zeros_(self.norm.weight)

    def forward(self, maps: Tensor) -> Tensor:
        with in_full(maps):
            key, value = (self.pooled(layer(maps)).flatten(2) for layer in (self.key, self.value))
            # The mean over keys of (query · key) value, in the order that needs no H·W squared.
            relation = key @ value.mT / key.size(2)
            found = relation.mT @ self.query(maps).flatten(2)
            return maps + self.norm(self.out(found.unflatten(2, maps.shape[2:])))

    def pooled(self, maps: Tensor) -> Tensor:
        for side in self.pools:
            # A map smaller than that is one key.
            maps = F.max_pool2d(maps, [min(side, size) for size in maps.shape[2:]])
        return maps
