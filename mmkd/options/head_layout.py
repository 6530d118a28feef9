"""What a teacher's RoI head predicts, in the classes and the box frame of its student's.

Heads differ in what their logits mean (softmax, sigmoid, Seesaw's classes times objectness), in
their lists of classes, and in how they encode boxes. Where two agree, predictions pass untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .class_map import ClassMap


class HeadLayout:
    """Converts between the box heads of one stage, the student's and the teacher's.

    Logits mean what MMDetection makes of them at test time: a softmax, or for Seesaw its classes
    times objectness. A student with a sigmoid loss is taught each class by itself.

    Args:
        student: the student's box head.
        teacher: the teacher's, of the same stage.
        classes: which class is which; None where the lists are the same.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, classes: ClassMap | None) -> None:
        self.kinds = [_kind(head) for head in (student, teacher)]
        self.classes = classes if classes is not None and not classes.same else None
        self.indices = self.classes.indices if self.classes else None
        self.coders: list[Any] = [getattr(head, 'bbox_coder', None) for head in (student, teacher)]
        self.class_agnostic = getattr(teacher, 'reg_class_agnostic', False)

    @property
    def sigmoid(self) -> bool:
        """Whether the student's classes are taught each by itself."""
        return self.kinds[0] == 'sigmoid'

    def known(self, labels: Tensor) -> Tensor | None:
        """Of RoIs with these labels, those whose class the teacher knows; None: all."""
        if self.classes is None or not self.classes.unknown:
            return None
        table = torch.tensor([i is not None for i in self.indices or ()] + [True])
        return table.to(labels.device)[labels]

    def columns(self, labels: Tensor) -> Tensor:
        """The teacher's class for each label, of known ones."""
        if self.indices is None:
            return labels
        table = torch.tensor([-1 if i is None else i for i in self.indices])
        return table.to(labels.device)[labels]

    def student(self, logits: Tensor) -> Tensor:
        """The student's logits, (n, C + 1), background last; with its graph."""
        return log_scores(logits, 'seesaw') if self.kinds[0] == 'seesaw' else logits

    def teacher(self, logits: Tensor) -> Tensor:
        """The teacher's logits in the layout of the student's, (n, C + 1)."""
        if self.indices is None and self.kinds[0] == self.kinds[1] != 'seesaw':
            return logits
        if self.indices is None and not self.sigmoid and self.kinds[1] != 'seesaw':
            return logits
        scores = log_scores(logits, self.kinds[1])
        if self.indices is not None:
            taken = [i for i in self.indices if i is not None]
            others = [i for i in range(scores.size(1)) if i not in set(taken)]
            background = scores[:, others].logsumexp(1, keepdim=True)
            # A class that the teacher does not know has none of its probability.
            nothing = scores.new_full((len(scores), 1), -1e4)
            columns = [nothing if i is None else scores[:, i : i + 1] for i in self.indices]
            scores = torch.cat([*columns, background], 1)
        if self.sigmoid:
            # The logit of each probability.
            return scores - torch.log1p(-scores.exp().clamp(max=1 - 1e-6))
        return scores

    def deltas(self, deltas: Tensor, labels: Tensor, rois: Tensor) -> Tensor:
        """The teacher's deltas (n, 4) or (n, 4·C) in the student's frame, (n, 4).

        Args:
            deltas: of positive RoIs.
            labels: their true classes (n,), which pick the columns.
            rois: (n, 4) in the student's image.
        """
        if not self.class_agnostic:
            rows = torch.arange(len(labels), device=labels.device)
            deltas = deltas.unflatten(1, (-1, 4))[rows, self.columns(labels)]
        own, theirs = self.coders
        return deltas if same_coder(own, theirs) else own.encode(rois, theirs.decode(rois, deltas))


def roi_context(roi_head: Any, features: Any) -> dict[str, Tensor]:
    """What a RoI head adds to every RoI, from the whole image: HTC and SCNet do; else nothing."""
    context = {}
    if getattr(roi_head, 'with_semantic', False):
        context['semantic_feat'] = roi_head.semantic_head(features)[1]
    if getattr(roi_head, 'with_glbctx', False):
        context['glbctx_feat'] = roi_head.glbctx_head(features)[1]
    return context


def same_coder(own: Any, theirs: Any) -> bool:
    """Whether two box coders give one box the same deltas."""
    # A list in one config is a tuple in another's defaults.
    frames = [
        (type(c), *(list(getattr(c, n, None) or ()) for n in ('means', 'stds')))
        for c in (own, theirs)
    ]
    return frames[0] == frames[1]


def _kind(head: Any) -> str:
    if getattr(head, 'custom_activation', False):
        return 'seesaw'
    return 'sigmoid' if getattr(head.loss_cls, 'use_sigmoid', False) else 'softmax'


def log_scores(logits: Tensor, kind: str) -> Tensor:
    """Logarithm of the scores that MMDetection gives at test time, (n, C + 1)."""
    logits = logits.float()
    if kind != 'seesaw':
        return logits.log_softmax(-1)
    classes, objectness = logits[:, :-2].log_softmax(-1), logits[:, -2:].log_softmax(-1)
    return torch.cat([classes + objectness[:, :1], objectness[:, 1:]], 1)
