"""What a training step offers to methods after the paper: score maps, anchors, cross-heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .anchor_match import as_columns


class StepExtras:
    """Mixed into :class:`mmkd.models.step.Step`, whose attributes and methods it uses."""

    student: Any
    teacher: Any
    record: Any
    view: Any
    samples: Any
    branches: int
    rpn_levels: Any
    rows: Any
    rois: Any
    once: Any
    on_grid: Any

    def score_maps(self) -> list[Tensor]:
        """The teacher's objectness: logits (N, A, H, W) of each level, on the student's grid."""
        return self.once('score maps', self._score_maps)

    def _score_maps(self) -> list[Tensor]:
        heads = self.student.rpn_head, self.teacher.network.rpn_head
        strides = [head.prior_generator.strides for head in heads]
        maps = []
        for level, (logits, _, size) in enumerate(self.rpn_levels):
            images = len(self.samples) * self.branches
            scores = as_columns(logits, 1).view(images, *size, -1).permute(0, 3, 1, 2)
            grid = scores.new_empty(1, 1, *self.record.map_sizes[level])
            own, theirs = (float(s[level][0]) for s in strides)
            maps.append(self.on_grid(scores, grid, (own, theirs), self.view))
        return maps

    def objectness(self) -> list[Tensor]:
        """The student's own objectness: logits (N, A, H, W) of each level, with their graph."""
        calls = self.record.loss_calls['rpn', 0, 'cls']
        images = len(self.samples) * self.branches
        return [
            as_columns(call.pred, 1).view(images, *size, -1).permute(0, 3, 1, 2)
            for call, size in zip(calls, self.record.map_sizes, strict=True)
        ]

    def anchors(self) -> list[Tensor]:
        """The student's anchors of each RPN level, (H, W, A, 4), xyxy in its pixels."""
        return self.once('anchors', self._anchors)

    def _anchors(self) -> list[Tensor]:
        sizes = self.record.map_sizes
        device = next(self.student.parameters()).device
        levels = self.student.rpn_head.prior_generator.grid_priors(sizes, device=device)
        return [a.view(*size, -1, 4) for a, size in zip(levels, sizes, strict=True)]

    def cross(self, site: str, features: list[Tensor], kind: str = 'cls') -> list:
        """As :meth:`Step.rows`, with the teacher's head on the student's features in the place of
        the student's prediction; a gradient flows through it into the features.

        Args:
            site: 'rpn' or 'rcnn'.
            features: of the student, each with the channels of the teacher's; fine to coarse.
            kind: 'cls' or 'bbox'.
        """
        self.rows(site, kind)  # before the teacher's taps are paused
        at, teacher = self.student.sites[site], self.teacher
        with teacher.taps.paused():
            if site == 'rpn':
                return at.rows(kind, self, teacher.score_anchors(features))
            inputs = teacher.roi_inputs(features)
            return at.rows(
                kind,
                self,
                lambda stage: teacher.score_rois(inputs, self.rois(stage, len(features[0])), stage),
            )
