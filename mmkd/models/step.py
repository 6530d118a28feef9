"""What one training step offers to the terms: each thing is computed once, when first asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures import SampleList
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from ..layer_pairs import LayerPair
from ..options.acceleration import laid_out
from ..options.resolution import View
from ..options.step_extras import StepExtras
from .heads import Rows
from .taps import Record
from .teacher import Seen


class Step(StepExtras):
    """One step of a student: the records of its taps and the teacher's, what the teacher made of
    the batch, and the ground truth."""

    def __init__(
        self, student: Any, record: Record, teacher_record: Record, seen: Seen, samples: SampleList
    ) -> None:
        self.student, self.teacher = student, student.teacher
        self.record, self.teacher_record = record, teacher_record
        self.seen, self.samples = seen, samples
        # A Trident student lays the batch down once for each branch.
        self.branches = getattr(student, 'num_branch', 1)
        self.view = seen.view and seen.view.repeat(self.branches)
        self.silent: set[str] = set()  # keys of terms with nothing to compare, as without boxes
        self._cache: dict[Any, Any] = {}
        self.known = list(student.parameters()) if student.unproven else []  # before terms run
        self.on_grid = resample

    def rows(self, site: str, kind: str) -> list[Rows]:
        """What both networks predict for the same anchors ('rpn') or RoIs ('rcnn').

        ``kind`` is 'cls' for logits or 'bbox' for deltas. An RPN has one entry, all levels
        together, a RoI head one per stage; none where the student was trained on nothing.
        """
        if site not in self.student.sites:
            raise RuntimeError(f'a term asks for rows of {site!r}, which its needs() does not name')
        return self.once((site, kind), lambda: self.student.sites[site].rows(kind, self))

    def features(self, pair: LayerPair) -> tuple[Tensor, Tensor]:
        """The student's map of a layer pair (N, C, H, W), with its graph, and the teacher's on its
        grid (N, C', H, W); or vectors (n, C), (n, C')."""
        return self.once((pair.student, pair.teacher), lambda: self._features(pair))

    def boxes(self, pair: LayerPair) -> list[Tensor] | None:
        """Ground truth of each image (n, 4), xyxy in cells of the student's map; None where the
        pair does not lie over the image."""
        if pair.strides is None:
            return None
        found = [get_box_tensor(s.gt_instances.bboxes) / pair.strides[0] for s in self.samples]
        return found * self.repeats(pair)

    def repeats(self, pair: LayerPair) -> int:
        """How often the batch is laid down in the student's map of a pair."""
        return len(self.features(pair)[0]) // len(self.samples)

    @property
    def rpn_levels(self) -> list:
        """Of each level of the teacher's RPN: logits, deltas and size; once for each branch."""
        n = self.branches
        return [
            (c.repeat(n, 1), d.repeat(n, 1), s) if n > 1 else (c, d, s) for c, d, s in self.seen.rpn
        ]

    @torch.no_grad()
    def on_rois(self, stage: int) -> tuple[Tensor, Tensor]:
        """The teacher's logits and deltas for the RoIs of one of the student's stages."""
        inputs = self.once('roi inputs', lambda: self.teacher.roi_inputs(self.seen.features))
        view = self.seen.view
        rois = self.rois(stage, len(self.samples))
        rois = rois if view is None else view.rois(rois)
        return self.once(('rois', stage), lambda: self.teacher.score_rois(inputs, rois, stage))

    def rois(self, stage: int, images: int) -> Tensor:
        """The RoIs (n, 5) that a stage of the student was trained on, in a batch of its images."""
        rois = self.record.loss_calls['rcnn', stage, 'cls'][0].rois
        if self.branches == 1:
            return rois
        return torch.cat([rois[:, :1] % images, rois[:, 1:]], 1)

    def _features(self, pair: LayerPair) -> tuple[Tensor, Tensor]:
        if pair.teacher.path.startswith('roi_head'):
            for site, stage, kind in list(self.record.loss_calls):
                if (site, kind) == ('rcnn', 'cls'):
                    self.on_rois(stage)
        guided = self.record.feature(pair.student.path, pair.student.index)
        hint = self.teacher_record.feature(pair.teacher.path, pair.teacher.index)
        view = self.seen.view
        if self.branches > 1 and len(guided) == self.branches * len(hint):
            hint, view = hint.repeat(self.branches, *[1] * (hint.dim() - 1)), self.view
        return guided, laid_out(resample(hint, guided, pair.strides, view), guided)

    def once(self, key: Any, compute: Any) -> Any:
        """``compute()``, the first time that ``key`` is asked for in this step."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def resample(
    hint: Tensor, guided: Tensor, strides: tuple[float, float] | None = None,
    view: View | None = None,
) -> Tensor:  # fmt: skip
    """Sample the teacher's map at the student's cells, bilinearly. The paper pads instead.

    Cell i of a map of stride s stands for the middle of the pixels [s · i, s · (i + 1)), as
    RoIAlign reads it, so features pooled from one RoI agree if the maps do; trained necks look
    there too (``benchmarks/hint_alignment.py``).

    Args:
        hint: (N, C, H, W).
        guided: (N, C', H', W').
        strides: pixels from cell to cell in the student's image and in the teacher's; None
            stretches maps that lie over a RoI.
        view: where the teacher's images lie over the student's; None for the same place.

    Returns:
        (N, C, H', W'); ``hint`` itself where the two grids are one.
    """
    if hint.dim() != 4:
        return hint
    same_size = hint.shape[2:] == guided.shape[2:]
    if strides is None:
        if same_size:
            return hint
        return F.interpolate(hint, guided.shape[2:], mode='bilinear', align_corners=False)
    if view is None and same_size and strides[0] == strides[1]:
        return hint
    axes = []
    for axis, cells in enumerate(guided.shape[:1:-1]):
        place = (torch.arange(cells, device=hint.device) + 0.5) * strides[0]
        place = place.expand(len(hint), -1)
        if view is not None:
            place = place * view.scale[:, axis, None] + view.offset[:, axis, None]
        # -1 and 1 are the outer edges of the first and the last cell.
        axes.append((2 * place / (strides[1] * hint.size(3 - axis)) - 1).float())
    x, y = axes[0][:, None, :], axes[1][:, :, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1)
    return F.grid_sample(
        hint.float(), grid, mode='bilinear', padding_mode='border', align_corners=False
    )
