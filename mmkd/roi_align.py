"""RoIAlign without gradient, fast on a CPU: a bin is a weighted sum of the map's rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from torch import Tensor, nn


class GatheredRoIAlign(nn.Module):
    """What mmcv's ``RoIAlign`` says, up to float rounding, for a network that is not trained.

    He et al., "Mask R-CNN", ICCV 2017, section 3. The average over a bin's bilinear samples is a
    product of one average along y and one along x, so that all its weights are known beforehand,
    and over a map laid out by pixel (channels last) it is ``embedding_bag``: vectorised and on all
    threads, where mmcv's kernel for CPUs takes one channel and one thread at a time.

    Args:
        layer: of mmcv, with average pooling; its settings are taken.
    """

    def __init__(self, layer: RoIAlign) -> None:
        super().__init__()
        self.layer = layer
        self.output_size = layer.output_size

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Pool.

        Args:
            features: (N, C, H, W); channels last is fastest.
            rois: (n, 5), the index of the image and x1, y1, x2, y2 in pixels of the batch.

        Returns:
            (n, C, height, width) of the layer's output size.
        """
        if features.is_cuda or not len(rois):
            return self.layer(features.contiguous(), rois)
        layer, (_, channels, *cells) = self.layer, features.shape
        offset = 0.5 if layer.aligned else 0.0
        begin = rois[:, [2, 1]].float() * layer.spatial_scale - offset  # y, x
        extent = rois[:, [4, 3]].float() * layer.spatial_scale - offset - begin
        if not layer.aligned:
            extent = extent.clamp(min=1)
        bins = extent.new_tensor(layer.output_size)
        samples = (extent / bins).ceil()
        if layer.sampling_ratio > 0:
            samples = torch.full_like(extent, layer.sampling_ratio)
        table = features.permute(0, 2, 3, 1).reshape(-1, channels)
        first = rois[:, 0].int() * (cells[0] * cells[1])
        pooled = table.new_empty(len(rois), layer.output_size[0] * layer.output_size[1], channels)
        # RoIs with about as many samples a bin go together.
        most = samples.amax(1).int().clamp(min=1)
        for count in most.unique().tolist():
            some = (most == count).nonzero().squeeze(1)
            (y, in_y), (x, in_x) = (
                _samples(
                    begin[some, axis], extent[some, axis], samples[some, axis],
                    layer.output_size[axis], count, cells[axis],
                )
                for axis in (0, 1)
            )  # fmt: skip
            y = y * cells[1] + first[some, None, None]
            index = y[:, :, None, :, None] + x[:, None, :, None, :]
            weight = in_y[:, :, None, :, None] * in_x[:, None, :, None, :]
            rows = pooled.size(1) * len(some)
            pooled[some] = F.embedding_bag(
                index.reshape(rows, -1),
                table,
                mode='sum',
                per_sample_weights=weight.reshape(rows, -1).to(table),
            ).view(len(some), -1, channels)
        return pooled.transpose(1, 2).reshape(len(rois), channels, *layer.output_size)


def _samples(
    begin: Tensor, extent: Tensor, samples: Tensor, bins: int, count: int, cells: int
) -> tuple[Tensor, Tensor]:
    """Along one axis: the cells that each bin reads and their weights, both (n, bins, 2·count)."""
    bin_of = torch.arange(bins, device=begin.device)[None, :, None]
    sample = torch.arange(count, device=begin.device)[None, None, :]
    begin, size, samples = (v[:, None, None] for v in (begin, extent / bins, samples))
    divisor = samples.clamp(min=1)  # a RoI without extent has no sample, and its bins are 0
    place = begin + bin_of * size + (sample + 0.5) * size / divisor
    # A place further outside than one cell counts as 0.
    counts = (place >= -1) & (place <= cells) & (sample < samples)
    place = place.clamp(0, cells - 1)
    low = place.floor()
    share = place - low
    weight = counts / divisor
    cell = torch.stack([low, (low + 1).clamp(max=cells - 1)], -1).int()
    return cell.flatten(2), torch.stack([(1 - share) * weight, share * weight], -1).flatten(2)
