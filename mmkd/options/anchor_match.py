"""Which anchor of the teacher's RPN is an anchor of the student's, where the generators differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .head_layout import same_coder
from .resolution import View

SAME = 0.9
"""IoU in the teacher's image from which two anchors count as one."""


class AnchorMatch:
    """Finds the student's anchors among the teacher's, by place and size in the teacher's image.

    Enlarged ``ratio`` times, the student's box of side s is one of side ratio · s, which the
    teacher has if its generator makes that side on some level: with FPN and ratio 2 on the next
    one, with ratio 1 and one generator on the same. Anchors without a counterpart are left out.

    Args:
        student: the student's anchor generator.
        teacher: the teacher's.
        ratio: how many pixels of the teacher's image make one of the student's.
    """

    def __init__(self, student: Any, teacher: Any, ratio: float = 1.0) -> None:
        self.ratio = ratio
        self.boxes = [[base.float() for base in g.base_anchors] for g in (student, teacher)]
        self.strides = [[torch.tensor(s) for s in g.strides] for g in (student, teacher)]
        # For each base anchor of the student: level and number of the teacher's, -1 for none.
        self.kinds = [self._counterparts(level) for level in range(len(self.boxes[0]))]

    @property
    def share(self) -> float:
        """Share of the student's anchors that have a counterpart, the edges of images aside."""
        found = total = 0.0
        for kinds, stride in zip(self.kinds, self.strides[0], strict=True):
            cells = 1 / float(stride.prod())
            found += cells * int((kinds[:, 0] >= 0).sum())
            total += cells * len(kinds)
        return found / total

    @property
    def levels(self) -> str:
        """Which of the teacher's levels answers which of the student's, for a table."""
        pairs = [
            (level, int(other))
            for level, kinds in enumerate(self.kinds)
            for other in kinds[:, 0].unique()
            if other >= 0
        ]
        return ', '.join(f'{level} -> {other}' for level, other in pairs)

    def __call__(
        self, level: int, rows: Tensor, size: tuple[int, int], sizes: Sequence[tuple[int, int]],
        images: int, view: View | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Look up some anchors of one level.

        Args:
            level: the student's.
            rows: their rows (n,) in the order image, y, x, anchor.
            size: height and width of the student's map.
            sizes: of each of the teacher's.
            images: how many the batch has.
            view: where the teacher's images lie; None for the same place.

        Returns:
            Whether each has a counterpart, (n,); the counterpart's row in the teacher's
            concatenated levels, (n,), 0 where there is none; and both anchors as boxes (n, 4) in
            the teacher's image.
        """
        boxes, strides = self.boxes[0][level].to(rows.device), self.strides[0][level].to(rows)
        kind = rows % len(boxes)
        cell = torch.stack([rows // len(boxes) % size[1], rows // len(boxes) // size[1] % size[0]])
        image = rows // (len(boxes) * size[0] * size[1])
        own = boxes[kind] + (cell.T * strides).repeat(1, 2)
        if view is not None:
            scale, offset = (t.to(own)[image].repeat(1, 2) for t in (view.scale, view.offset))
            own = own * scale + offset
        other, number = self.kinds[level].to(rows.device)[kind].unbind(1)
        answer, theirs = torch.zeros_like(rows), torch.zeros_like(own)
        found = torch.zeros_like(rows, dtype=torch.bool)
        first = 0
        for candidate, (height, width) in enumerate(sizes):
            bases = self.boxes[1][candidate].to(rows.device)
            stride = self.strides[1][candidate].to(own)
            here = (other == candidate).nonzero().squeeze(1)
            base = bases[number[here]]
            middle = (own[here, :2] + own[here, 2:] - base[:, :2] - base[:, 2:]) / 2
            x, y = (middle / stride).round().long().unbind(1)
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            theirs[here] = base + (torch.stack([x, y], 1) * stride).repeat(1, 2)
            found[here] = inside & (_iou(own[here], theirs[here]) >= SAME)
            row = ((image[here] * height + y) * width + x) * len(bases) + number[here]
            answer[here] = torch.where(found[here], first + row, 0)
            first += images * height * width * len(bases)
        return found, answer, own, theirs

    def look_up(
        self, sampled: Tensor, answers: Tensor, own_sizes: Sequence, sizes: Sequence, images: int,
        view: View | None, coders: tuple[Any, Any] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sampled anchors that the teacher has too, and its answers to them.

        Args:
            sampled: rows of the student's concatenated levels.
            answers: of the teacher's.
            own_sizes: height and width of the student's maps.
            sizes: of the teacher's.
            images: how many the batch has.
            view: where the teacher's images lie; None for the same place.
            coders: of the student's boxes and the teacher's, where answers are deltas, which are
                brought into the student's frame; None for logits.
        """
        kept, found_answers = [], []
        first = 0
        for level, size in enumerate(own_sizes):
            count = images * size[0] * size[1] * len(self.boxes[0][level])
            rows = sampled[(sampled >= first) & (sampled < first + count)]
            found, row, own, theirs = self(level, rows - first, size, sizes, images, view)
            answer = answers[row[found]]
            if coders is not None:
                own, theirs = own[found], theirs[found]
                moved = coders[0].encode(own, coders[1].decode(theirs, answer))
                same = (own == theirs).all(1, keepdim=True) & same_coder(*coders)
                answer = torch.where(same, answer, moved)
            kept.append(rows[found])
            found_answers.append(answer)
            first += count
        return torch.cat(kept), torch.cat(found_answers)

    def crossed(self, levels: Sequence[Tensor], step: Any, coders: tuple | None) -> list[Tensor]:
        """The rows of the student's anchors in what the teacher's head says of the student's maps.

        Rows of anchors without a counterpart are another anchor's. Deltas, for which ``coders`` of
        student and teacher are given, are brought into the student's frame.
        """
        own = [
            rows.view(-1, len(bases), rows.size(1))[:, kinds[:, 1]].flatten(0, 1)
            for rows, kinds, bases in zip(levels, self.kinds, self.boxes[1], strict=True)
        ]
        if coders is None or same_coder(*coders):
            return own
        images = len(step.samples) * step.branches
        anchors = [level.reshape(-1, 4).repeat(images, 1) for level in step.anchors()]
        return [
            coders[0].encode(boxes, coders[1].decode(boxes, rows))
            for boxes, rows in zip(anchors, own, strict=True)
        ]

    def _counterparts(self, level: int) -> Tensor:
        """The teacher's nearest level with an anchor of the same size, for each base anchor."""
        sides = _sides(self.boxes[0][level]) * self.ratio
        stride = self.strides[0][level].float() * self.ratio
        best = torch.full((len(sides), 2), -1)
        for row, side in enumerate(sides):
            distance = float('inf')
            for other, bases in enumerate(self.boxes[1]):
                common = torch.minimum(_sides(bases), side).prod(1)
                iou = common / (_sides(bases).prod(1) + side.prod() - common)
                step = float((self.strides[1][other] / stride).log().abs().sum())
                number = int(iou.argmax())
                if (
                    iou[number] >= SAME
                    and step < distance
                    and self._meet(level, row, other, number)
                ):
                    distance, best[row] = step, torch.tensor([other, number])
        return best

    def _meet(self, level: int, row: int, other: int, number: int) -> bool:
        """Whether two anchors of one size ever coincide; with two views the offsets decide."""
        if self.ratio != 1:
            return True
        cells = torch.arange(16.0)
        steps = torch.cartesian_prod(cells, cells)
        own = self.boxes[0][level][row] + (steps * self.strides[0][level]).repeat(1, 2)
        base, stride = self.boxes[1][other][number], self.strides[1][other]
        middle = (own[:, :2] + own[:, 2:] - base[:2] - base[2:]) / 2
        theirs = base + ((middle / stride).round() * stride).repeat(1, 2)
        return bool((_iou(own, theirs) >= SAME).any())


def _sides(boxes: Tensor) -> Tensor:
    return boxes[:, 2:] - boxes[:, :2]


def _iou(own: Tensor, theirs: Tensor) -> Tensor:
    common = torch.minimum(own[:, 2:], theirs[:, 2:]) - torch.maximum(own[:, :2], theirs[:, :2])
    overlap = common.clamp(min=0).prod(1)
    return overlap / (_sides(own).prod(1) + _sides(theirs).prod(1) - overlap)


def as_columns(logits: Tensor, columns: int) -> Tensor:
    """An RPN's logits, (n, 1) of a sigmoid or (n, 2) of a softmax, as ``columns`` of them."""
    if logits.size(1) == columns:
        return logits
    # Of a softmax RPN the foreground is column 0; the difference is its sigmoid logit.
    if columns == 1:
        return logits[:, :1] - logits[:, 1:]
    return torch.cat([logits, torch.zeros_like(logits)], 1)


def refuse_sizes(own: list[Tensor], theirs: list[Tensor]) -> NoReturn:
    """Refuse the rows of two RPNs whose maps differ in size: they are of other places."""
    shapes = [[tuple(t.shape) for t in rows] for rows in (own, theirs)]
    raise RuntimeError(
        f'the student scored anchors {shapes[0]}, the teacher {shapes[1]} (level by level): '
        'their feature maps differ in size; turn the terms of the RPN off by loss_weight=0'
    )
