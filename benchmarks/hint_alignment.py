"""Where does a cell of a trained map look? The choice behind ``mmkd.models.step.resample``.

The shipped teacher reads the same images at two sizes; its map of the larger one is brought to the
grid of the smaller under a shift of the cells' middle. The shift at which the two correlate best
tells where a cell looks: 0 is the middle of its convolution's window (s · i + 0.5), 0.5 the middle
of the block of pixels that RoIAlign takes it for (s · (i + 0.5))::

    python benchmarks/hint_alignment.py     # two minutes on one core; needs data/digits
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmdet.utils import register_all_modules
from torch import Tensor

from mmkd.models.teacher import Teacher

ROOT = Path(__file__).resolve().parents[1]
SHIFTS = np.arange(-0.5, 1.001, 0.125)
STRIDES = (4, 8, 16)


@torch.no_grad()
def maps(network: torch.nn.Module, images: list[np.ndarray], size: int) -> list[Tensor]:
    """Neck outputs of the images at ``size`` pixels."""
    inputs = [torch.from_numpy(cv2.resize(i, (size, size))).permute(2, 0, 1) for i in images]
    pixels = network.data_preprocessor(dict(inputs=inputs), False)['inputs']
    return list(network.extract_feat(pixels))


def bring(large: Tensor, cells: int, ratio: float, stride: int, shift: float) -> Tensor:
    """The larger image's map on the smaller one's grid, cells at s · i + 0.5 + shift · s."""
    middle = 0.5 + shift * stride
    place = ratio * (stride * torch.arange(cells) + middle)
    index = (place - middle) / stride
    axis = (index + 0.5) * 2 / large.size(-1) - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing='ij')[::-1], -1).float()
    grid = grid.expand(len(large), -1, -1, -1)
    return F.grid_sample(large, grid, padding_mode='border', align_corners=False)


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean over channels of the Pearson correlation over images and places."""
    places = [0, 2, 3]
    a, b = (
        (t - t.mean(places, keepdim=True)) / (t.std(places, keepdim=True) + 1e-6) for t in (a, b)
    )
    return float((a * b).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=100)
    args = parser.parse_args()
    register_all_modules()
    network = Teacher(
        ROOT / 'configs/digits/teacher.py', str(ROOT / 'checkpoints/digits_teacher.pth')
    ).network
    paths = sorted((ROOT / 'data/digits/val').iterdir())[: args.images]
    images = [cv2.imread(str(path)) for path in paths]
    print('| sizes | level | shift 0 | shift 0.5 | best shift | there |')
    print('| --- | --- | --- | --- | --- | --- |')
    for small, large in ((48, 96), (96, 192), (64, 96), (96, 144)):
        both = [maps(network, images, size) for size in (small, large)]
        for level, stride in enumerate(STRIDES):
            own, other = (m[level] for m in both)
            values = [
                correlation(own, bring(other, own.size(-1), large / small, stride, shift))
                for shift in SHIFTS
            ]
            at = dict(zip(SHIFTS, values, strict=True))
            best = max(at, key=at.__getitem__)
            print(
                f'| {small}, {large} | neck[{level}] | {at[0.0]:.3f} | {at[0.5]:.3f} '
                f'| {best:.3f} | {at[best]:.3f} |'
            )


if __name__ == '__main__':
    main()
