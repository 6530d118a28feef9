"""The inheriting start: the student begins with its teacher's neck and heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

PARTS = ('neck', 'rpn_head', 'roi_head')


@dataclass(frozen=True)
class Start:
    """Which tensors the student took from its teacher.

    Attributes:
        taken: keys copied.
        left: keys of the same parts that stay as they were, each with the reason.
    """

    taken: list[str]
    left: dict[str, str]


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module) -> Start:
    """Copy neck, RPN and RoI head from teacher to student wherever names and shapes agree.

    Not in the paper. It is the start that CanKD and MasKD call inheriting.

    Raises:
        ValueError: if nothing agrees: the start would be none.
    """
    taken, left = [], {}
    theirs = teacher.state_dict()
    for key, own in student.state_dict().items():
        if key.partition('.')[0] not in PARTS:
            continue
        if key not in theirs:
            left[key] = 'the teacher has no such tensor'
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
    return Start(taken, left)
