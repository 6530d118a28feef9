"""Maps the teacher's classes to the student's, and its RoI logits to the student's layout.

Heads differ in the meaning of their logits (softmax, sigmoid, or Seesaw's classes times objectness)
and in their lists of classes. If both agree, the logits are returned unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ClassMap:
    """The teacher's class for each class of the student, by name.

    Args:
        student: the student's class names, in the order of its head.
        teacher: the teacher's.
        names: the student's name to the teacher's, for classes that both name differently.

    Raises:
        ValueError: if a name in ``names`` is unknown, or the two have no class in common.
    """

    def __init__(
        self, student: Sequence[str], teacher: Sequence[str], names: dict[str, str] | None = None
    ) -> None:
        names = names or {}
        for given, known, who in (
            (names, student, 'student'),
            (names.values(), teacher, 'teacher'),
        ):
            for name in given:
                if name not in known:
                    near = difflib.get_close_matches(str(name), list(known), 3, 0)
                    raise ValueError(
                        f'distillation.classes.names: the {who} has no class {name!r}; near ones: '
                        + ', '.join(near)
                    )
        self.student, self.teacher = list(student), list(teacher)
        positions = {name: i for i, name in enumerate(self.teacher)}
        self.indices = [positions.get(names.get(name, name)) for name in self.student]
        if all(index is None for index in self.indices):
            raise ValueError(
                f'student ({first_names(self.student)}) and teacher '
                f'({first_names(self.teacher)}) have no class '
                "in common: name those that are the same, distillation.classes.names={'mine': "
                "'theirs'}, take another teacher, or turn off rcnn_cls and rcnn_bbox by their "
                'loss_weight=0 (and start=None)'
            )

    @property
    def same(self) -> bool:
        """Whether both have the same classes in the same order."""
        return self.indices == list(range(len(self.teacher)))

    @property
    def unknown(self) -> list[str]:
        """The student's classes that the teacher does not know."""
        return [n for n, index in zip(self.student, self.indices, strict=True) if index is None]

    def __str__(self) -> str:
        known = len(self.student) - len(self.unknown)
        text = f"{known} of the student's {len(self.student)} classes are among the teacher's "
        text += f"{len(self.teacher)}; the teacher's other {len(self.teacher) - known} count as "
        text += 'background'
        return text + (f'; it does not know {first_names(self.unknown)}' if self.unknown else '')


class Answers:
    """Converts the RoI logits of both networks to one layout.

    A head's logits mean what MMDetection computes from them at test time: a softmax, or for Seesaw
    classes times objectness. A student with a sigmoid loss learns each class independently.

    Args:
        student: the student's box head.
        teacher: the teacher's, of the same stage.
        classes: maps the classes; None if both lists are the same.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, classes: ClassMap | None) -> None:
        self.kinds = [_kind(head) for head in (student, teacher)]
        self.classes = classes if classes is not None and not classes.same else None
        self.indices = self.classes.indices if self.classes else None

    @property
    def sigmoid(self) -> bool:
        """Whether the student learns each class independently."""
        return self.kinds[0] == 'sigmoid'

    def known(self, labels: Tensor) -> Tensor | None:
        """Mask of the labels that are background or a class of the teacher; None means all."""
        if self.classes is None or not self.classes.unknown:
            return None
        table = torch.tensor([i is not None for i in self.indices or ()] + [True])
        return table.to(labels.device)[labels]

    def columns(self, labels: Tensor) -> Tensor:
        """The teacher's class for each label; -1 if it has none."""
        if self.indices is None:
            return labels
        table = torch.tensor([-1 if i is None else i for i in self.indices])
        return table.to(labels.device)[labels]

    def student(self, logits: Tensor) -> Tensor:
        """The student's logits (n, C + 1), background last, with gradient."""
        return _log_scores(logits, 'seesaw') if self.kinds[0] == 'seesaw' else logits

    def teacher(self, logits: Tensor) -> Tensor:
        """The teacher's logits in the layout of the student's, (n, C + 1)."""
        if self.indices is None and self.kinds[0] == self.kinds[1] != 'seesaw':
            return logits
        if self.indices is None and not self.sigmoid and self.kinds[1] != 'seesaw':
            return logits
        scores = _log_scores(logits, self.kinds[1])
        if self.indices is not None:
            taken = [i for i in self.indices if i is not None]
            others = [i for i in range(scores.size(1)) if i not in set(taken)]
            background = scores[:, others].logsumexp(1, keepdim=True)
            # Probability 0 for a class that the teacher does not have.
            nothing = scores.new_full((len(scores), 1), -1e4)
            columns = [nothing if i is None else scores[:, i : i + 1] for i in self.indices]
            scores = torch.cat([*columns, background], 1)
        if self.sigmoid:
            # Logits of the probabilities.
            return scores - torch.log1p(-scores.exp().clamp(max=1 - 1e-6))
        return scores


def _kind(head: Any) -> str:
    if getattr(head, 'custom_activation', False):
        return 'seesaw'
    return 'sigmoid' if getattr(head.loss_cls, 'use_sigmoid', False) else 'softmax'


def _log_scores(logits: Tensor, kind: str) -> Tensor:
    """Log of the scores (n, C + 1) that MMDetection computes at test time."""
    logits = logits.float()
    if kind != 'seesaw':
        return logits.log_softmax(-1)
    classes, objectness = logits[:, :-2].log_softmax(-1), logits[:, -2:].log_softmax(-1)
    return torch.cat([classes + objectness[:, :1], objectness[:, 1:]], 1)


def first_names(names: Sequence[str]) -> str:
    """The first four names, for a message."""
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')
