"""The geometry between the student's images and the teacher's, if their resolutions differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mmdet.structures import SampleList
from torch import Tensor

VIEW = 'teacher_view'
"""Field of a data sample that holds the teacher's image and its scale and offset."""


@dataclass(frozen=True)
class View:
    """Maps the student's coordinates to the teacher's: x_teacher = scale · x_student + offset.

    Attributes:
        scale: (N, 2), x and y of each image.
        offset: (N, 2), in pixels of the teacher's image.
    """

    scale: Tensor
    offset: Tensor

    def repeat(self, copies: int) -> View:
        """The view of a batch that is repeated ``copies`` times."""
        return View(self.scale.repeat(copies, 1), self.offset.repeat(copies, 1))

    def rois(self, rois: Tensor) -> Tensor:
        """Maps the student's RoIs (n, 5), image index first, to the teacher's images."""
        image = rois[:, 0].long()
        scale, offset = (t.to(rois)[image].repeat(1, 2) for t in (self.scale, self.offset))
        return torch.cat([rois[:, :1], rois[:, 1:] * scale + offset], 1)


def images_and_view(samples: SampleList, device: torch.device) -> tuple[list[Tensor], View]:
    """The teacher's images (3, H, W), not normalised, and their view.

    Raises:
        RuntimeError: if a sample has none.
    """
    views = [sample.get(VIEW) for sample in samples]
    if any(view is None for view in views):
        raise RuntimeError(
            'the training pipeline made no second view for the teacher, though '
            "distillation.resolution asks for one. mmkd.DistillationRunner (runner_type of mmkd's "
            'recipes) puts it in; without it, let mmkd.TwoViews hold what follows the loading of '
            "the image: dict(type='mmkd.TwoViews', transforms=[...], student=..., teacher=...)"
        )
    scale, offset = (
        torch.tensor([getattr(view, name) for view in views], dtype=torch.float64, device=device)
        for name in ('scale', 'offset')
    )
    return [view.img.to(device, non_blocking=True) for view in views], View(scale, offset)
