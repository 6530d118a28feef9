"""RoIAlign without gradient, fast on a CPU: a bin is a weighted sum of the maps' rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

AT_ONCE = 256
"""RoIs whose bins are summed in one go: what they need then stays in the cache."""


class GatheredRoIExtractor(SingleRoIExtractor):
    """Equal to MMDetection's extractor up to float rounding; for inference only.

    He et al., "Mask R-CNN", ICCV 2017, section 3. The average over a bin's bilinear samples is a
    product of one average along y and one along x, so that all its weights are known beforehand,
    and over maps laid out by pixel (channels last) it is ``embedding_bag``: vectorised, on all
    threads and for all levels at once, where mmcv's kernel for CPUs takes one channel and one
    thread at a time.
    """

    def __init__(self, replaced: SingleRoIExtractor) -> None:
        nn.Module.__init__(self)
        for name in ('roi_layers', 'out_channels', 'featmap_strides', 'finest_scale'):
            setattr(self, name, getattr(replaced, name))
        self._forward_hooks = replaced._forward_hooks  # a hint may be tapped here
        self.train(replaced.training)

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        """Whether an extractor of this class can replace ``module``."""
        return type(module) is SingleRoIExtractor and all(
            isinstance(layer, RoIAlign) and layer.pool_mode == 'avg' for layer in module.roi_layers
        )

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Pool.

        Args:
            feats: of each level (N, C, H, W); channels last is fastest.
            rois: (n, 5), the index of the image and x1, y1, x2, y2 in pixels of the batch.
            roi_scale_factor: by which RoIs grow, if there is more than one level.

        Returns:
            (n, C, height, width) of the layers' output size.
        """
        if rois.device.type != 'cpu' or not len(rois):
            return super().forward([f.contiguous() for f in feats], rois, roi_scale_factor)
        rois = rois.float()
        level = rois.new_zeros(len(rois), dtype=torch.long)
        if len(feats) > 1:
            level = self.map_roi_levels(rois, len(feats)).clamp(0, len(feats) - 1)
            if roi_scale_factor is not None:
                rois = self.roi_rescale(rois, roi_scale_factor)
        layer, channels = self.roi_layers[0], feats[0].size(1)
        table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in feats])
        sizes = torch.tensor([f.shape for f in feats], dtype=torch.int)[:, [0, 2, 3]]
        rows = sizes.prod(1, dtype=torch.int)
        cells = sizes[:, 1:][level]
        first = (rows.cumsum(0, dtype=torch.int) - rows)[level]
        first += rois[:, 0].int() * cells[:, 0] * cells[:, 1]
        scale = rois.new_tensor([each.spatial_scale for each in self.roi_layers])[level, None]
        offset = 0.5 if layer.aligned else 0.0
        begin = rois[:, [2, 1]] * scale - offset  # y, x
        extent = rois[:, [4, 3]] * scale - offset - begin
        if not layer.aligned:
            extent = extent.clamp(min=1)
        samples = (extent / extent.new_tensor(layer.output_size)).ceil()
        if layer.sampling_ratio > 0:
            samples = torch.full_like(extent, layer.sampling_ratio)
        pooled = table.new_empty(len(rois), channels, *layer.output_size)
        # RoIs with about as many samples a bin go together.
        most = samples.nan_to_num().amax(1).long().clamp(min=1)
        for count in most.unique().tolist():
            some = (most == count).nonzero().squeeze(1)
            (y, in_y), (x, in_x) = (
                _samples(
                    begin[some, axis], extent[some, axis], samples[some, axis],
                    layer.output_size[axis], count, cells[some, axis],
                )
                for axis in (0, 1)
            )  # fmt: skip
            y = y * cells[some, 1, None, None] + first[some, None, None]
            parts = (each.split(AT_ONCE) for each in (some, y, x, in_y, in_x))
            for part, row, column, of_row, of_column in zip(*parts, strict=True):
                index = _pairs(row)[:, :, None] + _pairs(column, inner=True)[:, None]
                weight = _pairs(of_row)[:, :, None] * _pairs(of_column, inner=True)[:, None]
                bags = F.embedding_bag(
                    index.flatten(0, 2),
                    table,
                    mode='sum',
                    per_sample_weights=weight.flatten(0, 2).to(table),
                ).view(len(part), -1, channels)
                pooled.index_copy_(0, part, bags.mT.reshape(-1, *pooled.shape[1:]))
        return pooled


def _samples(
    begin: Tensor, extent: Tensor, samples: Tensor, bins: int, count: int, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Along one axis: the cells that each bin reads and their weights, both (n, bins, 2·count)."""
    bin_of = torch.arange(bins)[None, :, None]
    sample = torch.arange(count)[None, None, :]
    begin, size, samples, cells = (v[:, None, None] for v in (begin, extent / bins, samples, cells))
    divisor = samples.clamp(min=1)  # a RoI without extent has no sample, and its bins are 0
    place = begin + bin_of * size + (sample + 0.5) * size / divisor
    # A place further outside than one cell counts as 0.
    counts = (place >= -1) & (place <= cells) & (sample < samples)
    place = torch.minimum(place.nan_to_num().clamp(min=0), cells - 1)
    low = place.floor()
    share = place - low
    weight = counts / divisor
    cell = torch.stack([low, torch.minimum(low + 1, cells - 1)], -1).int()
    return cell.flatten(2), torch.stack([(1 - share) * weight, share * weight], -1).flatten(2)


def _pairs(each: Tensor, inner: bool = False) -> Tensor:
    """(n, bins, k) of one axis as (n, bins, k·k), in which it is the inner or the outer one."""
    size = each.size(2)
    pair = each[:, :, None] if inner else each[..., None]
    return pair.expand(-1, -1, size, size).flatten(2)
