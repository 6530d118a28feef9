"""The teacher's own pixels: its normalisation, its channel order, its scale."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.structures import SampleList
from torch import Tensor

from .resolution import Resolution, View, second_view


class TeacherInputs:
    """Turns the student's batch into the teacher's: its normalisation, channel order and scale.

    Args:
        student: the student's data preprocessor, which makes the batch.
        teacher: the teacher's.
        channels: of the images that the student's backbone takes, and the teacher's.
        resolution: the two scales, where they differ: the images are then those that the training
            pipeline made for the teacher.

    Raises:
        ValueError: if the numbers of channels differ; if an order of channels that only three have
            is asked for; if the student's batch is changed behind the pipeline
            (``batch_augments``).
    """

    def __init__(
        self, student: Any, teacher: Any, channels: tuple[int, int] = (3, 3),
        resolution: Resolution | None = None,
    ) -> None:  # fmt: skip
        self.swapped = student._channel_conversion != teacher._channel_conversion
        if channels[0] != channels[1]:
            raise ValueError(
                f"the student's images have {channels[0]} channel(s) by its backbone, the "
                f"teacher's {channels[1]}: mmkd converts normalisation and channel order, not the "
                'number of channels. Distil from a teacher trained on the same images'
            )
        for who, preprocessor in (('student', student), ('teacher', teacher)):
            mean = getattr(preprocessor, 'mean', ())
            if channels[0] != 3 and (preprocessor._channel_conversion or len(mean) == 3):
                raise ValueError(
                    f"the {who}'s backbone takes images of {channels[0]} channel(s), and its "
                    'data_preprocessor is for three (bgr_to_rgb, rgb_to_bgr, or a mean of three '
                    'values): set bgr_to_rgb=False, and mean and std to one value each or None, '
                    'and normalise in the pipeline'
                )
        self.normalised = [_normalisation(each, channels[0]) for each in (student, teacher)]
        same = all(torch.equal(a, b) for a, b in zip(*self.normalised, strict=True))
        self.same = same and not self.swapped and resolution is None
        self.second_view = resolution is not None
        self.preprocessor = teacher
        for augment in getattr(student, 'batch_augments', None) or ():
            if self.second_view and type(augment).__name__ != 'BatchFixedSizePad':
                raise ValueError(
                    f"the student's data_preprocessor changes the batch by "
                    f'{type(augment).__name__}, after the two views were made, so the teacher '
                    'would see another place: resize in the pipeline (RandomChoiceResize) instead'
                )

    def __call__(self, inputs: Tensor, samples: SampleList) -> tuple[Tensor, View | None]:
        """The teacher's batch (N, 3, H', W'), ``inputs`` itself where both agree, and its view."""
        if self.second_view:
            return second_view(inputs, samples, self.preprocessor)
        if self.same:
            return inputs, None
        (mean_s, std_s), (mean_t, std_t) = [
            [value.to(inputs.device).view(-1, 1, 1) for value in pair] for pair in self.normalised
        ]
        pixels = inputs * std_s + mean_s
        if self.swapped:
            pixels = pixels.flip(1)
        pixels = (pixels - mean_t) / std_t
        # Padding is 0 behind the normalisation, in both.
        inside = torch.zeros_like(pixels[:, :1])
        for mask, sample in zip(inside, samples, strict=True):
            height, width = sample.img_shape[:2]
            mask[:, :height, :width] = 1
        return (pixels * inside).to(inputs.dtype), None


def _normalisation(preprocessor: Any, channels: int) -> tuple[Tensor, Tensor]:
    if not getattr(preprocessor, '_enable_normalize', False):
        return torch.zeros(channels), torch.ones(channels)
    # One value is for all channels.
    mean, std = (v.flatten().cpu().expand(channels) for v in (preprocessor.mean, preprocessor.std))
    return mean, std
