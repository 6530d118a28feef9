"""The inheriting start: the student begins with its teacher's neck and heads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .class_map import ClassMap

PARTS = ('neck', 'rpn_head', 'roi_head')


@dataclass(frozen=True)
class Start:
    """Which tensors the student took from its teacher.

    Attributes:
        taken: keys copied.
        left: keys of the same parts that stay as they were, each with the reason.
        by_class: of the keys taken those whose rows belong to classes, with how many were taken.
    """

    taken: list[str]
    left: dict[str, str]
    by_class: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, classes: ClassMap | None = None) -> Start:
    """Copy neck, RPN and RoI head from teacher to student wherever names and shapes agree.

    Not in the paper. It is the start that CanKD and MasKD call inheriting. Where the two have other
    classes, the rows of the classifier and of class-specific regression are copied class by class.

    Raises:
        ValueError: if nothing agrees: the start would be none.
    """
    taken: list[str] = []
    left: dict[str, str] = {}
    by_class: dict[str, str] = {}
    theirs = teacher.state_dict()
    for key, own in student.state_dict().items():
        if key.partition('.')[0] not in PARTS:
            continue
        if key not in theirs:
            left[key] = 'the teacher has no such tensor'
        elif classes and not classes.same and (rows := _rows_of(key, own, theirs[key], classes)):
            for mine, other in rows:
                own[mine] = theirs[key][other]
            taken.append(key)
            by_class[key] = (
                f'{sum(i is not None for i in classes.indices)} of {len(classes.student)}'
            )
        elif theirs[key].shape != own.shape:
            left[key] = f'{tuple(own.shape)} here, {tuple(theirs[key].shape)} in the teacher'
        else:
            own.copy_(theirs[key])
            taken.append(key)
    if not taken:
        raise ValueError(
            "distillation.start='teacher': not one tensor of the teacher's neck, rpn_head and "
            "roi_head has the name and shape of the student's; set distillation.start=None"
        )
    return Start(taken, left, by_class)


def _rows_of(
    key: str, own: Tensor, theirs: Tensor, classes: ClassMap
) -> list[tuple[slice, slice]] | None:
    """Pairs of rows of the student's and the teacher's tensor; None where rows are not classes."""
    layer = key.split('.')[-2]
    each = {'fc_cls': 1, 'fc_reg': 4}.get(layer)
    background = layer == 'fc_cls'
    if (
        each is None
        or own.shape[1:] != theirs.shape[1:]
        or len(own) != each * (len(classes.student) + background)
        or len(theirs) != each * (len(classes.teacher) + background)
    ):
        return None
    pairs = [(mine, other) for mine, other in enumerate(classes.indices) if other is not None]
    if background:
        pairs.append((len(classes.student), len(classes.teacher)))
    return [(slice(m * each, (m + 1) * each), slice(t * each, (t + 1) * each)) for m, t in pairs]
