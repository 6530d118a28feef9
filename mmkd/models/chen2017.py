"""Chen, Choi, Yu, Han and Chandraker, "Learning Efficient Object Detection Models with Knowledge
Distillation", NIPS 2017: the losses of equations (2) to (6), and the terms that apply them.

The losses know tensors only; no gradient flows into what the teacher said. A user's own tensor loss
can take the place of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn

from ..options.acceleration import squared_distance
from ..recipe import number, refuse_shapes
from ..registry import TERMS
from .heads import Rows
from .terms import DistillTerm, FeatureTerm, RowTerm


@MODELS.register_module()
class WeightedSoftCELoss(nn.Module):
    r"""Class-weighted cross entropy against the teacher's distribution, equation (3).

    .. math:: L_{soft} = - \sum_c w_c P_{t,c} \log P_{s,c}

    It is the second summand of equation (2), :math:`\mu L_{hard} + (1 - \mu) L_{soft}`; the
    detector scales the first by ``hard_weight``. A softmax head has the background last, at index
    ``num_classes`` (MMDetection's order, not the paper's). In a sigmoid head each class is a
    Bernoulli variable whose other half :math:`1 - p` is the background and bears its weight.

    Args:
        hard_weight: :math:`\mu`, the weight of the student's own (hard) classification loss.
        loss_weight: weight of this loss; None means :math:`1 - \mu`.
        background_weight: :math:`w_c` of the background, 1.5 in the paper.
        class_weight: :math:`w_c` of the C foreground classes; None means 1 for each.
        temperature: T; both logits are divided by it and the loss is multiplied by T².
    """

    kind = 'cls'

    def __init__(
        self, hard_weight: float = 0.5, loss_weight: float | None = None,
        background_weight: float = 1.5, class_weight: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        owner = type(self).__name__
        self.hard_weight = number(owner, 'hard_weight', hard_weight, 0, 1)
        weight = 1 - self.hard_weight if loss_weight is None else loss_weight
        self.loss_weight = number(owner, 'loss_weight', weight, 0)
        self.background_weight = number(owner, 'background_weight', background_weight, 0)
        self.class_weight = class_weight and [
            number(owner, f'class_weight[{i}]', w, 0) for i, w in enumerate(class_weight)
        ]
        self.temperature = number(owner, 'temperature', temperature, 1e-3)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None, use_sigmoid: bool = False,
        background: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the loss, a scalar.

        Args:
            student_logits, teacher_logits: (n, C + 1) of a softmax head, (n, C) of a sigmoid head.
            weight: weight of each row, (n,).
            avg_factor: the sum over rows is divided by it (N or M of the paper); None means n.
            use_sigmoid: the kind of head the logits come from.
            background: whether the last column is the background's; None: in a softmax head alone.

        Raises:
            ValueError: if the shapes differ, or ``class_weight`` has not C entries.
        """
        if student_logits.shape != teacher_logits.shape:
            refuse_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
        if background is None:
            background = not use_sigmoid
        num_classes = student_logits.size(1) - background
        student = to_float32(student_logits) / self.temperature
        teacher = to_float32(teacher_logits.detach()) / self.temperature
        # w_c of each column, and of the other half of each column of a sigmoid head.
        of_classes = self.class_weight or [1.0] * num_classes
        if len(of_classes) != num_classes:
            raise ValueError(
                f'class_weight has {len(of_classes)} entries, the head has {num_classes} '
                'foreground classes'
            )
        foreground = student.new_tensor([*of_classes, *[self.background_weight] * background])
        outside = student.new_tensor([self.background_weight] * num_classes + [1.0] * background)
        if use_sigmoid:
            soft = foreground * teacher.sigmoid() * F.logsigmoid(student)
            soft = soft + outside * (-teacher).sigmoid() * F.logsigmoid(-student)
        else:
            soft = foreground * teacher.softmax(-1) * student.log_softmax(-1)
        rows = -soft.sum(-1) * self.temperature**2
        if weight is not None:
            rows = rows * weight
        return self.loss_weight * _average(rows.sum(), avg_factor, len(rows))


@MODELS.register_module()
class TeacherBoundedL2Loss(nn.Module):
    r"""L2 regression that stops where the student is better than its teacher, equation (4).

    .. math:: L_b = \|R_s - y\|^2 \text{ if } \|R_s - y\|^2 + m > \|R_t - y\|^2 \text{, else } 0

    The norm is over the 4 deltas of one box and the bound is tested box by box, without gradient.

    Args:
        loss_weight: :math:`\nu` of equation (5).
        margin: m, in squared deltas.
    """

    kind = 'bbox'

    def __init__(self, loss_weight: float = 0.5, margin: float = 0.0) -> None:
        super().__init__()
        owner = type(self).__name__
        self.loss_weight = number(owner, 'loss_weight', loss_weight, 0)
        self.margin = number(owner, 'margin', margin, -float('inf'))

    def forward(
        self, student_deltas: Tensor, teacher_deltas: Tensor, targets: Tensor,
        weight: Tensor | None = None, avg_factor: float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        r"""Compute the loss over positive boxes, a scalar.

        Args:
            student_deltas, teacher_deltas, targets: :math:`R_s`, :math:`R_t` and y, each (n, 4),
                encoded by the student's box coder.
            weight: weights of the deltas, (n, 4).
            avg_factor: the sum over boxes is divided by it; None means n.

        Raises:
            ValueError: if the shapes differ.
        """
        if not student_deltas.shape == teacher_deltas.shape == targets.shape:
            refuse_shapes(student=student_deltas, teacher=teacher_deltas, targets=targets)
        targets = to_float32(targets)
        if weight is not None:
            # Nothing is asked of a box without weight, but 0 · NaN is NaN, and so is its gradient.
            targets = targets.where(weight.amax(-1, keepdim=True) > 0, 0)
        student_error = (to_float32(student_deltas) - targets) ** 2
        teacher_error = (to_float32(teacher_deltas.detach()) - targets) ** 2
        worse = student_error.detach().sum(-1) + self.margin > teacher_error.sum(-1)
        if weight is not None:
            student_error = student_error * weight
        boxes = student_error.sum(-1) * worse
        return self.loss_weight * _average(boxes.sum(), avg_factor, len(boxes))


@MODELS.register_module()
class HintL2Loss(nn.Module):
    r"""Squared distance of guided and hint layer, equation (6): :math:`L_{hint} = \|V - Z\|^2`.

    Args:
        loss_weight: :math:`\gamma` of equation (1).
        normalize: False compares raw features, as the paper does. True standardises both maps per
            channel over images and places first (Cao et al., "PKD", NeurIPS 2022), so that each
            channel counts alike: 2 · (1 - Pearson correlation), averaged over the channels.
        reduction: 'mean' over all elements and images, or 'sum'.
    """

    kind = 'features'
    distance: Callable[..., Tensor] = staticmethod(squared_distance)

    def __init__(
        self, loss_weight: float = 0.5, normalize: bool = False, reduction: str = 'mean'
    ) -> None:
        super().__init__()
        self.loss_weight = number(type(self).__name__, 'loss_weight', loss_weight, 0)
        if reduction not in ('mean', 'sum'):
            raise ValueError(f"HintL2Loss: reduction={reduction!r} must be 'mean' or 'sum'")
        self.normalize, self.reduction = normalize, reduction

    def forward(self, guided: Tensor, hint: Tensor) -> Tensor:
        """Compute the loss, a scalar, from V and Z, both (N, C, H, W) or (n, C).

        Raises:
            ValueError: if the shapes differ.
        """
        if guided.shape != hint.shape:
            refuse_shapes(guided_layer=guided, hint_layer=hint)
        guided, hint = to_float32(guided), to_float32(hint.detach())
        if self.normalize:
            guided, hint = _standardise(guided), _standardise(hint)
        return self.loss_weight * self.distance(guided, hint, reduction=self.reduction)


@MODELS.register_module()
class HintL1Loss(HintL2Loss):
    r"""The L1 variant of equation (6) in section 3.4, :math:`\|V - Z\|_1`."""

    distance = staticmethod(F.l1_loss)


class _LossTerm(DistillTerm):
    """Applies a tensor loss, which weighs itself by its own ``loss_weight``."""

    def __init__(self, loss: nn.Module, **where: Any) -> None:
        super().__init__(**where)
        self.loss, self.loss_weight = loss, loss.loss_weight
        self.hard_weight = getattr(loss, 'hard_weight', 1.0)

    def weighed(self, value: Any) -> dict[str, Tensor]:
        return self.parts_of(value)


@TERMS.register_module()
class SoftTargetTerm(_LossTerm, RowTerm):
    """Classification towards the teacher's, equations (2) and (3)."""

    def compare(self, rows: Rows) -> Tensor:
        given = (rows.student, rows.teacher, rows.weight, rows.avg_factor, rows.sigmoid)
        return self.loss(*given) if self.site == 'rpn' else self.loss(*given, rows.background)


@TERMS.register_module()
class RegressionTerm(_LossTerm, RowTerm):
    """Box regression towards the teacher's, equations (4) and (5)."""

    def compare(self, rows: Rows) -> Tensor:
        return self.loss(rows.student, rows.teacher, rows.target, rows.weight, rows.avg_factor)


@TERMS.register_module()
class HintTerm(_LossTerm, FeatureTerm):
    """Features towards the teacher's behind an adaptation layer, equation (6), over all pairs."""

    def compare(self, student: Tensor, teacher: Tensor, layers: Any, boxes: Any) -> Tensor:
        return self.loss(student, teacher)


def to_float32(tensor: Tensor) -> Tensor:
    """Half precision cannot hold a sum of logarithms or squares; autocast would run these in it."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _standardise(feature: Tensor) -> Tensor:
    places = [d for d in range(feature.dim()) if d != 1]
    mean = feature.mean(places, keepdim=True)
    # The square root has no finite slope at 0, where a channel is constant.
    deviation = (feature.var(places, keepdim=True, correction=0) + 1e-6).sqrt()
    return (feature - mean) / deviation


def _average(total: Tensor, avg_factor: float | Tensor | None, rows: int) -> Tensor:
    return total / max(rows, 1) if avg_factor is None else total / avg_factor
