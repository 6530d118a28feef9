"""Cross-head distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layer_pairs import LayerPair
from ..models.chen2017 import to_float32
from ..models.heads import stage_of
from ..models.step import Step
from ..options.head_layout import log_scores
from ..recipe import Needs, number, require_one_of
from ..registry import TERMS
from .base import MapTerm, average, box_head, divergence

EPSILON = torch.finfo(torch.float32).eps
ROIS = ('rcnn', 'cls')


@TERMS.register_module()
class CrossKD(MapTerm):
    r"""The student's features through the teacher's head, against the teacher's own.

    Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, for
    dense heads; for RoI heads as in the authors' code, which no paper describes.

    .. math:: w_c \frac{\tau^2}{n + \epsilon} \sum_i \mathrm{KL}(p^t_i \,\|\, p^x_i)
        + w_r \frac{\sum_i q_i \|d^x_i - d^t_i\|_1}{4 \sum_i q_i + \epsilon}

    x and t are the teacher's head on the student's features and on its own, for the same RoIs, all
    that the student is trained on: p are softmaxes of its logits (n, C + 1) over τ, q is the
    teacher's best probability of an object, d are the deltas of that class, (n, 4), all in the
    teacher's classes and frame. ε is float32's; stages are weighted as in the student's own loss.
    At an RPN, p are the sampled anchors' sigmoids, and q and n are as in its own loss.

    Needs: the layer pair that feeds the head, one more pass of the teacher's head, with gradient.
    Parameters: none; a 1×1 convolution for each pair of different widths.
    Public code: the authors' for RoI heads is equal; it has no term for the RPN.
    Defaults: τ = 3, weights 0.5 and 1, the authors' for R50 to R18.

    Args:
        site: 'rcnn' or 'rpn', whose head.
        tau: τ, the temperature.
        cls_weight: w_c.
        reg_weight: w_r.
    """

    def __init__(
        self, site: str = 'rcnn', tau: float = 3.0, cls_weight: float = 0.5, reg_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.site = require_one_of('site', site, 'rcnn', 'rpn')
        self.tau = number('CrossKD', 'tau', tau, 1e-3)
        self.cls_weight = number('CrossKD', 'cls_weight', cls_weight, 0)
        self.reg_weight = number('CrossKD', 'reg_weight', reg_weight, 0)

    def needs(self) -> Needs:
        kinds = ('cls', 'bbox') if self.site == 'rpn' and self.reg_weight else ('cls',)
        rows = tuple((self.site, kind) for kind in kinds)
        return Needs(pairs=self.entries, rows=rows, cross=(self.site,))

    def check_networks(self, student: Any, teacher: Any) -> None:
        head = box_head(teacher)
        generator = getattr(getattr(teacher, 'rpn_head', None), 'prior_generator', None)
        extractor = getattr(getattr(teacher, 'roi_head', None), 'bbox_roi_extractor', None)
        self.strides = {
            'rpn': [float(s[0]) for s in getattr(generator, 'strides', ())],
            'rcnn': [float(s) for s in getattr(stage_of(extractor, 0), 'featmap_strides', ())],
        }[self.site]
        if self.site == 'rpn' or not self.reg_weight or head is None:
            return
        if not hasattr(head, 'loss_bbox') or not getattr(head, 'with_reg', True):
            raise ValueError(
                f"CrossKD compares deltas, and the teacher's box head ({type(head).__name__}) "
                'regresses none: give reg_weight=0'
            )

    def bind(self, pairs: Sequence[LayerPair]) -> None:
        given = [pair.strides[0] for pair in pairs if pair.strides]
        if given[: len(self.strides)] != self.strides:
            raise ValueError(
                f"CrossKD runs the teacher's {self.site} head on the student's maps, and that "
                f'reads strides {self.strides}; the pairs have {given}: name as many layers of the '
                'student, fine to coarse'
            )
        super().bind(pairs)

    def distil(self, step: Step) -> dict[str, Tensor]:
        step.rows(self.site, 'cls')  # the teacher's own answers, before its taps are paused
        features = [self.adapters[pair.name](step.features(pair)[0]) for pair in self.pairs]
        with step.teacher.taps.paused():
            return self.weighed(getattr(self, f'of_{self.site}')(step, features))

    def of_rcnn(self, step: Step, features: list[Tensor]) -> dict[str, Tensor]:
        """Both parts, of all RoIs and stages."""
        inputs, parts = step.teacher.roi_inputs(features), dict[str, Tensor]()
        weights = getattr(step.student.roi_head, 'stage_loss_weights', [1.0])
        for stage in [s for site, s, kind in step.record.loss_calls if (site, kind) == ROIS]:
            rois = step.rois(stage, len(features[0]))
            crossed = step.teacher.score_rois(inputs, rois, stage)
            layout = step.student.sites['rcnn'].layouts[stage].kinds[1]
            for name, part in self.compare_rois(crossed, step.on_rois(stage), layout).items():
                parts[name] = parts.get(name, 0) + weights[stage] * part
        return parts

    def compare_rois(self, crossed: tuple, own: tuple, kind: str) -> dict[str, Tensor]:
        """Both parts, of one stage, from the logits (n, C + 1) and deltas (n, 4·C) or (n, 4) of the
        teacher's head on the student's features and on its own; ``kind`` is that of its logits,
        'softmax', 'sigmoid' or 'seesaw'."""
        logits = [to_float32(answer[0]) for answer in (crossed, own)]
        if kind == 'seesaw':
            logits = [log_scores(each, kind) for each in logits]
        sigmoid, count = kind == 'sigmoid', len(logits[0])
        each = divergence(logits[0], logits[1], sigmoid, self.tau)
        parts = dict(cls=self.cls_weight * each.sum() / (count + EPSILON))
        if self.reg_weight:
            theirs = logits[1].detach()
            scores = theirs.sigmoid() if sigmoid else theirs.softmax(1)[:, :-1]
            weight, best = scores.max(1)
            rows = torch.arange(count, device=best.device)
            deltas = [
                d if d.size(1) == 4 else d.unflatten(1, (-1, 4))[rows, best]
                for d in (to_float32(crossed[1]), to_float32(own[1]).detach())
            ]
            total = (weight * (deltas[0] - deltas[1]).abs().sum(1)).sum()
            parts['reg'] = self.reg_weight * total / (4 * weight.sum() + EPSILON)
        return parts

    def of_rpn(self, step: Step, features: list[Tensor]) -> dict[str, Tensor]:
        """Both parts, of the sampled anchors (deltas: of the positive ones)."""
        answers, at, parts = step.teacher.score_anchors(features), step.student.sites['rpn'], {}
        for rows in at.rows('cls', step, answers):
            each = divergence(rows.student, rows.teacher, rows.sigmoid, self.tau)
            parts['cls'] = self.cls_weight * average(rows, each)
        for rows in at.rows('bbox', step, answers) if self.reg_weight else ():
            each = (to_float32(rows.student) - to_float32(rows.teacher)).abs()
            parts['reg'] = self.reg_weight * average(rows, each)
        return parts
