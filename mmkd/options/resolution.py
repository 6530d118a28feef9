"""The scales at which student and teacher see an image, and how the two images overlap."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures import SampleList
from torch import Tensor

VIEW = 'teacher_view'
"""Field of a data sample: the teacher's image and where it lies over the student's."""
ONE_SCALE = {'Resize': 'scale', 'FixScaleResize': 'scale'}
MORE_SCALES = {'RandomResize': 'scale', 'RandomChoiceResize': 'scales'}
"""The transforms that resize, and the argument in which each has its scale or scales."""


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


@dataclass(frozen=True)
class View:
    """Where the teacher's images lie over the student's: x_teacher = scale · x_student + offset.

    Attributes:
        scale: (N, 2), x and y of each image.
        offset: (N, 2), in pixels of the teacher's image.
    """

    scale: Tensor
    offset: Tensor

    def repeat(self, copies: int) -> View:
        """The view of a batch that is laid down ``copies`` times, one after the other."""
        return View(self.scale.repeat(copies, 1), self.offset.repeat(copies, 1))

    def rois(self, rois: Tensor) -> Tensor:
        """The student's RoIs (n, 5), image index first, in the teacher's images."""
        image = rois[:, 0].long()
        scale, offset = (t.to(rois)[image].repeat(1, 2) for t in (self.scale, self.offset))
        return torch.cat([rois[:, :1], rois[:, 1:] * scale + offset], 1)


def images_and_view(samples: SampleList, device: torch.device) -> tuple[list[Tensor], View]:
    """The teacher's images (3, H, W) as they were decoded, and their view.

    Raises:
        RuntimeError: if a sample carries none.
    """
    views = [sample.get(VIEW) for sample in samples]
    if any(view is None for view in views):
        raise RuntimeError(
            'the training pipeline made no second view for the teacher, though '
            "distillation.resolution asks for one. mmkd.DistillationRunner (runner_type of mmkd's "
            'recipes) puts it in; without it, let mmkd.TwoViews hold what follows the loading of '
            "the image: dict(type='mmkd.TwoViews', transforms=[...], student=..., teacher=...)"
        )
    scale, offset = (
        torch.tensor([getattr(view, name) for view in views], dtype=torch.float64, device=device)
        for name in ('scale', 'offset')
    )
    return [view.img.to(device, non_blocking=True) for view in views], View(scale, offset)


def second_view(inputs: Tensor, samples: SampleList, preprocessor: Any) -> tuple[Tensor, View]:
    """The batch of the teacher's own images, and where they lie over the student's.

    Args:
        inputs: the student's batch (N, 3, H, W).
        samples: each with the teacher's image in the field ``teacher_view``.
        preprocessor: the teacher's.
    """
    images, view = images_and_view(samples, inputs.device)
    pixels = preprocessor({'inputs': images}, training=False)['inputs']
    # Over all of the student's batch, its padding included: each cell has a counterpart.
    divisor = preprocessor.pad_size_divisor
    canvas = inputs.new_tensor(inputs.shape[:1:-1], dtype=torch.float64)
    far = (view.scale * canvas + view.offset).amax(0).tolist()[::-1]
    height, width = (
        max(math.ceil(round(edge, 6) / divisor) * divisor, size)
        for edge, size in zip(far, pixels.shape[2:], strict=True)
    )
    pixels = F.pad(pixels, (0, width - pixels.size(3), 0, height - pixels.size(2)))
    return pixels.to(inputs.dtype), view


# ------------------------------------------------------------------------ scales in a config


def rescale(transform: Any, largest: tuple[int, int]) -> Any:
    """A transform's config with its largest scale set to ``largest``, the others in proportion.

    Raises:
        ValueError: if it resizes by a factor instead of to a scale, or its scales are no pairs.
    """
    key = scales_key(transform)
    if key is None:
        return transform
    scale = transform.get(key)
    if scale is None:
        raise ValueError(
            f'{transform_name(transform)} resizes by a factor, not to a scale, so '
            'distillation.resolution cannot set it: give it scale=(w, h)'
        )
    several = key == 'scales' or (not isinstance(scale, int) and not isinstance(scale[0], int))
    if not several:
        return type(transform)({**transform, key: largest})
    if any(isinstance(one, int) for one in scale):
        raise ValueError(
            f'{transform_name(transform)} has {key}={scale!r}: distillation.resolution needs each '
            'as a pair (w, h)'
        )
    long, short = (max(edge(one) for one in scale) for edge in (max, min))
    new = [
        (round(max(one) * max(largest) / long), round(min(one) * min(largest) / short))
        for one in scale
    ]
    return type(transform)({**transform, key: new})


def transform_name(transform: Any) -> str:
    """The class name of a transform or of its config, without a scope."""
    kind = transform.get('type') if isinstance(transform, dict) else type(transform)
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def scales_key(transform: Any) -> str | None:
    """The argument in which a transform that resizes has its scales; None for any other."""
    return {**ONE_SCALE, **MORE_SCALES}.get(transform_name(transform))
