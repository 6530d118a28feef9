"""The losses of Chen et al., "Learning Efficient Object Detection Models with Knowledge
Distillation", NIPS 2017, equations (2) to (6). They know tensors only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _number(owner: str, name: str, value: object, low: float, high: float = float('inf')) -> float:
    infinite = float('inf')
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or abs(value) == infinite:  # type: ignore
        bounds = f'at least {low}' if high == infinite else f'between {low} and {high}'
        raise ValueError(f'{owner}: {name}={value!r} must be a finite number {bounds}')
    return float(value)  # type: ignore


@MODELS.register_module()
class WeightedSoftCELoss(nn.Module):
    r"""Class-weighted cross entropy against the teacher's distribution, equation (3).

    .. math:: L_{soft} = - \sum_c w_c P_{t,c} \log P_{s,c}

    Equation (2) weighs it against the hard loss, :math:`\mu L_{hard} + (1 - \mu) L_{soft}`;
    this module is the second summand, the detector scales the first by ``hard_weight``.

    A softmax head has the background last, at index ``num_classes`` (MMDetection's order, not
    the paper's). A sigmoid head has no background logit: each class is a Bernoulli variable
    whose other half :math:`1 - p` is the background and bears its weight.

    Args:
        hard_weight: :math:`\mu`, the weight of the student's own (hard) classification loss.
        loss_weight: weight of this loss; None means :math:`1 - \mu`, as in equation (2).
        background_weight: :math:`w_c` of the background, 1.5 in the paper.
        class_weight: :math:`w_c` of the foreground classes, shape (C,); None means 1 for each.
        temperature: T; both logits are divided by it and the loss is multiplied by T².
    """

    def __init__(
        self,
        hard_weight: float = 0.5,
        loss_weight: float | None = None,
        background_weight: float = 1.5,
        class_weight: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.hard_weight = _number(owner, 'hard_weight', hard_weight, 0, 1)
        if loss_weight is None:
            loss_weight = 1 - self.hard_weight
        self.loss_weight = _number(owner, 'loss_weight', loss_weight, 0)
        self.background_weight = _number(owner, 'background_weight', background_weight, 0)
        self.class_weight = class_weight and [
            _number(owner, f'class_weight[{i}]', w, 0) for i, w in enumerate(class_weight)
        ]
        self.temperature = _number(owner, 'temperature', temperature, 1e-3)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        use_sigmoid: bool = False,
        background: bool | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student_logits: (n, C + 1) for a softmax head, (n, C) for a sigmoid head.
            teacher_logits: the same shape; no gradient flows into it.
            weight: weight of each row, (n,).
            avg_factor: the sum over rows is divided by it (N or M of the paper); None means n.
            use_sigmoid: the kind of head the logits come from.
            background: whether the last column is the background's; None means that it is in a
                softmax head and is not in a sigmoid head. MMDetection's sigmoid RoI heads have it.

        Returns:
            A scalar.

        Raises:
            ValueError: if the shapes differ, or ``class_weight`` has not C entries.
        """
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f'student logits {tuple(student_logits.shape)} and teacher logits '
                f'{tuple(teacher_logits.shape)} must have one shape: the same rows and classes'
            )
        if background is None:
            background = not use_sigmoid
        num_classes = student_logits.size(1) - background
        student = _full(student_logits) / self.temperature
        teacher = _full(teacher_logits.detach()) / self.temperature
        # w_c of each column, and of the other half of each column of a sigmoid head.
        foreground = student.new_ones(num_classes)
        if self.class_weight:
            if len(self.class_weight) != num_classes:
                raise ValueError(
                    f'class_weight has {len(self.class_weight)} entries, the head has '
                    f'{num_classes} foreground classes'
                )
            foreground = foreground.new_tensor(self.class_weight)
        outside = foreground.new_full((num_classes,), self.background_weight)
        if background:
            foreground, outside = (
                torch.cat([foreground, outside.new_tensor([self.background_weight])]),
                torch.cat([outside, outside.new_ones(1)]),
            )
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

    The norm is over the 4 deltas of one box and the bound is tested box by box. No gradient
    flows through the test or into the teacher.

    Args:
        loss_weight: :math:`\nu` of equation (5).
        margin: m, in squared deltas.
    """

    def __init__(self, loss_weight: float = 0.5, margin: float = 0.0) -> None:
        super().__init__()
        owner = type(self).__name__
        self.loss_weight = _number(owner, 'loss_weight', loss_weight, 0)
        self.margin = _number(owner, 'margin', margin, -float('inf'))

    def forward(
        self,
        student_deltas: Tensor,
        teacher_deltas: Tensor,
        targets: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss over positive boxes.

        Args:
            student_deltas: :math:`R_s`, (n, 4), encoded by the student's box coder.
            teacher_deltas: :math:`R_t`, (n, 4), in the same frame; no gradient flows into it.
            targets: y, (n, 4).
            weight: weights of the deltas, (n, 4).
            avg_factor: the sum over boxes is divided by it; None means n.

        Returns:
            A scalar.

        Raises:
            ValueError: if the shapes differ.
        """
        shapes = [tuple(t.shape) for t in (student_deltas, teacher_deltas, targets)]
        if len(set(shapes)) > 1:
            raise ValueError(
                f'student deltas, teacher deltas and targets differ in shape: {shapes}'
            )
        targets = _full(targets)
        if weight is not None:
            # Nothing is asked of a box without weight, but 0 · NaN is NaN, and so is its gradient.
            targets = targets.where(weight.amax(-1, keepdim=True) > 0, 0)
        student_error = (_full(student_deltas) - targets) ** 2
        teacher_error = (_full(teacher_deltas.detach()) - targets) ** 2
        worse = student_error.detach().sum(-1) + self.margin > teacher_error.sum(-1)
        if weight is not None:
            student_error = student_error * weight
        boxes = student_error.sum(-1) * worse
        return self.loss_weight * _average(boxes.sum(), avg_factor, len(boxes))


class _SquaredDistance(torch.autograd.Function):
    """:func:`F.mse_loss` to the bit, but it keeps V - Z alone for its backward; 0 of nothing."""

    @staticmethod
    def forward(ctx: Any, guided: Tensor, hint: Tensor, reduction: str) -> Tensor:
        difference = guided - hint
        ctx.save_for_backward(difference)
        ctx.count = max(guided.numel(), 1) if reduction == 'mean' else 1
        return difference.square().sum() / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (2 / ctx.count)).mul_(grad), None, None


def _squared_distance(guided: Tensor, hint: Tensor, reduction: str) -> Tensor:
    return _SquaredDistance.apply(guided, hint, reduction)


@MODELS.register_module()
class HintL2Loss(nn.Module):
    r"""Squared distance between guided layer and hint layer, equation (6).

    .. math:: L_{hint}(V, Z) = \|V - Z\|^2

    Args:
        loss_weight: :math:`\gamma` of equation (1).
        normalize: False compares the raw features, as the paper does. True standardises both
            maps per channel over images and places first (zero mean, unit deviation), as in Cao
            et al., "PKD", NeurIPS 2022, so that the loss weighs each channel alike, whatever its
            scale; it is then 2 · (1 - Pearson correlation), averaged over the channels.
        reduction: 'mean' over all elements and images, or 'sum'.
    """

    distance: Callable[..., Tensor] = staticmethod(_squared_distance)

    def __init__(
        self, loss_weight: float = 0.5, normalize: bool = False, reduction: str = 'mean'
    ) -> None:
        super().__init__()
        self.loss_weight = _number(type(self).__name__, 'loss_weight', loss_weight, 0)
        if reduction not in ('mean', 'sum'):
            raise ValueError(
                f"{type(self).__name__}: reduction={reduction!r} must be 'mean' or 'sum'"
            )
        self.normalize = normalize
        self.reduction = reduction

    def forward(self, guided: Tensor, hint: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            guided: V, the student's feature behind its adaptation layer, (N, C, H, W) or (n, C).
            hint: Z, the teacher's feature, the same shape; no gradient flows into it.

        Returns:
            A scalar.

        Raises:
            ValueError: if the shapes differ.
        """
        if guided.shape != hint.shape:
            raise ValueError(
                f'guided layer {tuple(guided.shape)} and hint layer {tuple(hint.shape)} must have '
                'one shape: an adaptation layer has to map one to the other'
            )
        guided, hint = _full(guided), _full(hint.detach())
        if self.normalize:
            guided, hint = _standardise(guided), _standardise(hint)
        return self.loss_weight * self.distance(guided, hint, reduction=self.reduction)


@MODELS.register_module()
class HintL1Loss(HintL2Loss):
    r"""The L1 variant of equation (6), :math:`\|V - Z\|_1`, of section 3.4.

    Args:
        loss_weight: :math:`\gamma` of equation (1).
        normalize: as of :class:`HintL2Loss`.
        reduction: 'mean' or 'sum'.
    """

    distance = staticmethod(F.l1_loss)


def _full(tensor: Tensor) -> Tensor:
    # Half precision cannot hold a sum of logarithms or squares: autocast runs these ops in it.
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _standardise(feature: Tensor) -> Tensor:
    places = [d for d in range(feature.dim()) if d != 1]
    mean = feature.mean(places, keepdim=True)
    # The square root has no finite slope at 0, where a channel is constant.
    deviation = (feature.var(places, keepdim=True, correction=0) + 1e-6).sqrt()
    return (feature - mean) / deviation


def _average(total: Tensor, avg_factor: float | Tensor | None, rows: int) -> Tensor:
    return total / max(rows, 1) if avg_factor is None else total / avg_factor
