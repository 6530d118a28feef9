"""The two sites at which a two-stage detector is trained, RPN and RoI head.

A site taps the student's loss modules and lays the teacher's answers to the same anchors or RoIs
beside its predictions, row by row, in the student's classes and box frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..options.anchor_match import AnchorMatch, as_columns, refuse_sizes
from ..options.head_layout import HeadLayout
from .taps import ScaledLosses, Taps


@dataclass(frozen=True)
class Rows:
    """What both networks predict for the same anchors or RoIs.

    Attributes:
        student, teacher: logits, (n, C) of sigmoids or (n, C + 1) of a softmax, background last;
            or deltas (n, 4). The student's with its graph, the teacher's detached.
        target: labels (n,) or target deltas (n, 4).
        weight, avg_factor: of the head's own loss: (n,) or (n, 4), and what it divides by.
        sigmoid: whether each column of logits is a class by itself.
        background: whether the last column of logits is the background's.
        rois: (n, 5), image index first, in the student's pixels; None for anchors.
        loss_weight: λ, the weight of the head's own loss, and ``stage_weight`` of its stage: the
            base class multiplies the term by both.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor
    weight: Any
    avg_factor: Any
    sigmoid: bool = False
    background: bool = False
    rois: Tensor | None = None
    loss_weight: float = 1.0
    stage_weight: float = 1.0


class RPN:
    """The anchors that the student's RPN samples.

    Args:
        match: finds them among the teacher's; None where both RPNs have the same anchors.
    """

    def __init__(self, match: AnchorMatch | None) -> None:
        self.match = match

    def tap(self, student: Any, taps: Taps, hard_losses: ScaledLosses) -> None:
        """Attach to the student's RPN."""
        taps.tap_map_sizes(student.rpn_head)
        for kind in ('cls', 'bbox'):
            taps.tap_loss('rpn', 0, kind, getattr(student.rpn_head, f'loss_{kind}'))
        hard_losses.add('rpn', student.rpn_head.loss_cls)

    def rows(self, kind: str, step: Any, cross: list | None = None) -> list[Rows]:
        """The sampled anchors of all levels; ``cross`` is the teacher's RPN on the student's
        features, and stands on the student's side."""
        calls = step.record.loss_calls.get(('rpn', 0, kind))
        if not calls:
            return []
        head, width = step.student.rpn_head, calls[0].pred.size(1)

        def column(levels: list) -> list[Tensor]:
            found = [a[kind == 'bbox'] for a in levels]
            return [a if a.size(1) == width else as_columns(a, width) for a in found]

        own = column(cross) if cross is not None else [c.pred for c in calls]
        target, weight = (torch.cat([getattr(c, n) for c in calls]) for n in ('target', 'weight'))
        # One in a thousand anchors is sampled; the rest have no weight.
        sampled = (weight if kind == 'cls' else weight.amax(-1)).nonzero().squeeze(1)
        answers = column(step.rpn_levels)
        coders = (head.bbox_coder, step.teacher.network.rpn_head.bbox_coder)
        if cross is not None and self.match is not None:
            own = self.match.crossed(own, step, coders if kind == 'bbox' else None)
        if self.match is None:
            if [a.shape for a in own] != [a.shape for a in answers]:
                refuse_sizes(own, answers)
            answer = torch.cat(answers)[sampled]
        else:
            sizes, own_sizes = [size for *_, size in step.rpn_levels], step.record.map_sizes
            sampled, answer = self.match.look_up(
                sampled, torch.cat(answers), own_sizes, sizes, len(step.samples) * step.branches,
                step.view, coders if kind == 'bbox' else None,
            )  # fmt: skip
        return [
            Rows(
                torch.cat(own)[sampled], answer, target[sampled], weight[sampled],
                calls[0].avg_factor, sigmoid=head.use_sigmoid_cls and kind == 'cls',
                background=not head.use_sigmoid_cls and kind == 'cls',
                loss_weight=getattr(head, f'loss_{kind}').loss_weight,
            )
        ]  # fmt: skip


class RoIHead:
    """The RoIs that the student's head is trained on, stage by stage.

    Args:
        layouts: of each of the student's stages, from the teacher's predictions to the student's.
    """

    def __init__(self, layouts: Sequence[HeadLayout]) -> None:
        self.layouts = layouts

    def tap(self, student: Any, taps: Taps, hard_losses: ScaledLosses) -> None:
        """Attach to every stage of the student's RoI head."""
        for stage in range(len(self.layouts)):
            taps.tap_rois(stage, stage_of(student.roi_head.bbox_roi_extractor, stage))
            box_head = stage_of(student.roi_head.bbox_head, stage)
            for kind in ('cls', 'bbox'):
                if (loss := getattr(box_head, f'loss_{kind}', None)) is not None:
                    taps.tap_loss('rcnn', stage, kind, loss)
            hard_losses.add('rcnn', box_head.loss_cls)

    def rows(self, kind: str, step: Any, cross: Callable | None = None) -> list[Rows]:
        """The RoIs of each stage (deltas: the positive ones); ``cross`` gives the teacher's head
        on the student's features at a stage, to stand on the student's side."""
        weights = getattr(step.student.roi_head, 'stage_loss_weights', [1.0])
        make = self._logits if kind == 'cls' else self._deltas
        stages = [s for site, s, k in step.record.loss_calls if (site, k) == ('rcnn', kind)]
        return [make(step, stage, weights[stage], cross and cross(stage)) for stage in stages]

    def _logits(self, step: Any, stage: int, stage_weight: float, cross: Any) -> Rows:
        call, layout = step.record.loss_calls['rcnn', stage, 'cls'][0], self.layouts[stage]
        head = stage_of(step.student.roi_head.bbox_head, stage)
        own = layout.student(call.pred) if cross is None else layout.teacher(cross[0])
        known = layout.known(call.target)
        return Rows(
            own, layout.teacher(step.on_rois(stage)[0]), call.target,
            call.weight if known is None else call.weight * known, call.avg_factor, layout.sigmoid,
            own.size(1) > head.num_classes, call.rois, head.loss_cls.loss_weight, stage_weight,
        )  # fmt: skip

    def _deltas(self, step: Any, stage: int, stage_weight: float, cross: Any) -> Rows:
        asked, call = (step.record.loss_calls['rcnn', stage, k][0] for k in ('cls', 'bbox'))
        head, layout = stage_of(step.student.roi_head.bbox_head, stage), self.layouts[stage]
        positive = (asked.target >= 0) & (asked.target < head.num_classes)
        labels, rois = asked.target[positive], asked.rois[positive]
        weight, pred, target = call.weight, call.pred, call.target
        if (known := layout.known(labels)) is not None:
            weight = weight * known[:, None]
        answer = layout.deltas(step.on_rois(stage)[1][positive], labels, rois[:, 1:])
        if head.reg_decoded_bbox:
            pred, target = (head.bbox_coder.encode(rois[:, 1:], b) for b in (pred, target))
        if cross is not None:
            pred = layout.deltas(cross[1][positive], labels, rois[:, 1:])
        return Rows(
            pred, answer, target, weight, call.avg_factor, rois=rois,
            loss_weight=head.loss_bbox.loss_weight, stage_weight=stage_weight,
        )  # fmt: skip


def stage_of(heads: Any, stage: int) -> Any:
    """The module of one stage of a RoI head, cascade or not."""
    return heads[stage] if isinstance(heads, nn.ModuleList) else heads
