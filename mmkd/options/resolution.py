"""The scales at which student and teacher see an image."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Resolution:
    """The two scales of a pair, each as MMDetection's ``Resize`` has it, (width, height).

    Args:
        student: the scale of training and testing the student.
        teacher: the scale of the teacher's images.
        reason: why the teacher sees fewer pixels than its student, if it does.

    Raises:
        ValueError: if a scale is missing, is no pair of sizes, or is larger for the student.
    """

    student: tuple[int, int]
    teacher: tuple[int, int]
    reason: str | None = None

    def __init__(self, student: Any = None, teacher: Any = None, reason: str | None = None):
        for name, scale in (('student', student), ('teacher', teacher)):
            if scale is None:
                raise ValueError(
                    f'distillation.resolution names no scale for the {name}: give both, as in '
                    'resolution=dict(student=(667, 400), teacher=(1333, 800))'
                )
            if not (
                isinstance(scale, (list, tuple))
                and len(scale) == 2
                and all(type(size) is int and size > 0 for size in scale)
            ):
                raise ValueError(
                    f'distillation.resolution.{name}={scale!r} must be a pair of sizes in pixels, '
                    'such as (1333, 800)'
                )
            object.__setattr__(self, name, tuple(scale))
        object.__setattr__(self, 'reason', reason)
        if min(self.ratios) < 1 and not reason:
            raise ValueError(
                f'distillation.resolution: the teacher sees fewer pixels {self.teacher} than its '
                f'student {self.student}. Swap the two, or say why: resolution.reason="..."'
            )

    @classmethod
    def of(cls, given: dict | None) -> Resolution | None:
        """Builds it from the entry of a config; None for None."""
        if given is None:
            return None
        if not isinstance(given, dict):
            raise ValueError(
                f'distillation.resolution={given!r} must be dict(student=(w, h), teacher=(w, h))'
            )
        names = ('student', 'teacher', 'reason')
        for key in given:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1, 0)
                raise ValueError(
                    f'distillation.resolution has no entry {key!r}; did you mean {near[0]}?'
                )
        return cls(**given)

    @property
    def ratios(self) -> tuple[float, float]:
        """Teacher over student, long and short edge."""
        return (max(self.teacher) / max(self.student), min(self.teacher) / min(self.student))

    @property
    def ratio(self) -> float:
        """Teacher over student, short edge, which limits the scale of most images."""
        return self.ratios[1]

    def enlarge(self, scale: Sequence[int] | int) -> tuple[int, int] | int:
        """The teacher's scale for one of the student's."""
        if isinstance(scale, int):
            return round(scale * self.ratio)
        large, small = (round(s * r) for s, r in zip(sorted(scale)[::-1], self.ratios, strict=True))
        return (large, small) if scale[0] >= scale[1] else (small, large)
