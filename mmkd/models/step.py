"""What one training step offers to the terms: each thing is computed once, when first asked for."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures import SampleList
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from ..layer_pairs import LayerPair
from .alignment import resample
from .heads import Rows, as_columns
from .taps import Record
from .teacher import Seen


class Step:
    """One step of a student and its teacher.

    Args:
        student: the distilling detector.
        record: of its taps, in this step.
        teacher_record: of the teacher's.
        seen: what the teacher made of the batch.
        samples: the ground truth of the batch.
    """

    def __init__(
        self, student: Any, record: Record, teacher_record: Record, seen: Seen, samples: SampleList
    ) -> None:
        self.student, self.teacher = student, student.teacher
        self.record, self.teacher_record = record, teacher_record
        self.seen, self.samples = seen, samples
        # A Trident student lays the batch down once for each branch.
        self.branches = getattr(student, 'num_branch', 1)
        self.view = seen.view and seen.view.repeat(self.branches)
        # Keys of the terms that had nothing to compare, in a batch without boxes, say.
        self.silent: set[str] = set()
        self._cache: dict[Any, Any] = {}

    def rows(self, site: str, kind: str) -> list[Rows]:
        """What both networks predict for the same anchors ('rpn') or RoIs ('rcnn').

        Args:
            site: 'rpn' or 'rcnn'.
            kind: 'cls' for logits, 'bbox' for deltas.

        Returns:
            For an RPN one entry, all levels together; for a RoI head one per stage; none where the
            student was trained on nothing.
        """
        return self._once((site, kind), lambda: self.student.sites[site].rows(kind, self))

    def features(self, pair: LayerPair) -> tuple[Tensor, Tensor]:
        """The student's map of a layer pair (N, C, H, W), with its graph, and the teacher's on its
        grid (N, C', H, W); or vectors (n, C), (n, C')."""
        return self._once((pair.student, pair.teacher), lambda: self._features(pair))

    def boxes(self, pair: LayerPair) -> list[Tensor] | None:
        """Ground truth of each image (n, 4), xyxy in cells of the student's map; None where the
        pair does not lie over the image."""
        if pair.strides is None:
            return None
        found = [get_box_tensor(s.gt_instances.bboxes) / pair.strides[0] for s in self.samples]
        return found * (len(self.features(pair)[0]) // len(found))

    def score_maps(self) -> list[Tensor]:
        """The teacher's objectness: logits (N, A, H, W) of each level, on the student's grid."""
        return self._once('score maps', self._score_maps)

    def anchors(self) -> list[Tensor]:
        """The student's anchors of each RPN level, (H, W, A, 4), xyxy in its pixels."""
        sizes = self.record.map_sizes
        device = next(self.student.parameters()).device
        levels = self.student.rpn_head.prior_generator.grid_priors(sizes, device=device)
        return [a.view(*size, -1, 4) for a, size in zip(levels, sizes, strict=True)]

    def cross(self, site: str, features: list[Tensor], kind: str = 'cls') -> list[Rows]:
        """As :meth:`rows`, with the teacher's head on the student's features in the place of the
        student's prediction; a gradient flows through it into the features.

        Args:
            site: 'rpn' or 'rcnn'.
            features: of the student, each with the channels of the teacher's; fine to coarse.
            kind: 'cls' or 'bbox'.
        """
        self.rows(site, kind)  # before the teacher's taps are paused
        with self.teacher.taps.paused():
            if site == 'rpn':
                levels = self.teacher.score_anchors(features)
                return self.student.sites[site].rows(kind, self, levels)
            inputs = self.teacher.roi_inputs(features)
            return self.student.sites[site].rows(
                kind, self, lambda stage: self.teacher.score_rois(inputs, self._rois(stage), stage)
            )

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
        inputs = self._once('roi inputs', lambda: self.teacher.roi_inputs(self.seen.features))
        view = self.seen.view
        rois = self._rois(stage) if view is None else view.rois(self._rois(stage))
        return self._once(('rois', stage), lambda: self.teacher.score_rois(inputs, rois, stage))

    def _rois(self, stage: int) -> Tensor:
        rois = self.record.loss_calls['rcnn', stage, 'cls'][0].rois
        if self.branches == 1:
            return rois
        return torch.cat([rois[:, :1] % len(self.samples), rois[:, 1:]], 1)

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
        return guided, resample(hint, guided, pair.strides, view)

    def _score_maps(self) -> list[Tensor]:
        strides = [g.strides for g in (self.student.rpn_head.prior_generator,
                                       self.teacher.network.rpn_head.prior_generator)]  # fmt: skip
        maps = []
        for level, (logits, _, size) in enumerate(self.rpn_levels):
            images = len(self.samples) * self.branches
            scores = as_columns(logits, 1).view(images, *size, -1).permute(0, 3, 1, 2)
            grid = scores.new_empty(1, 1, *self.record.map_sizes[level])
            maps.append(resample(scores, grid, tuple(s[level][0] for s in strides), self.view))
        return maps

    def _once(self, key: Any, compute: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]
