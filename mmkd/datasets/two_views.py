"""The paper's second setting: a teacher that sees images of higher resolution than its student.

A config names the two scales, ``distillation.resolution=dict(student=(667, 400),
teacher=(1333, 800))``. :func:`apply_resolution` sets the student's scale in every pipeline, and
wraps the transforms of the training pipeline in :class:`TwoViews`, which makes two views of each
decoded image with the same random choices: the student's, as plain MMDetection makes it at that
scale, and the teacher's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_random_params
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.structures import BaseDataElement

from ..options.resolution import (
    MORE_SCALES,
    ONE_SCALE,
    VIEW,
    Resolution,
    rescale,
    scales_key,
    transform_name,
)
from ..options.unlabelled import Unlabelled
from ..recipe import pipelines, require_dict, terms_on

# They change pixels without moving them, by draws that mmcv's cache_random_params can repeat.
_COLOURS = {
    'PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'ColorTransform', 'Color', 'Brightness',
    'Contrast', 'Sharpness', 'Solarize', 'SolarizeAdd', 'Posterize', 'Equalize', 'AutoContrast',
    'Invert',
}  # fmt: skip
_NO_PIXELS = {'LoadAnnotations', 'FilterAnnotations', 'PackDetInputs', 'LoadProposals'}


@TRANSFORMS.register_module()
class TwoViews(BaseTransform):
    """Transforms one decoded image twice, with the same random choices.

    The student's view equals plain MMDetection's to the bit: the transforms run in their order,
    with their draws. The teacher's view is made from the same decoded image at its own scale: flips
    and colours repeat the draw, a drawn scale is multiplied by the ratio, and a crop is the same
    rectangle, rounded to whole pixels (:attr:`View.offset` has the remainder). It is an image
    without annotations.

    Args:
        transforms: the transforms after loading the image, ending with PackDetInputs.
        student: the student's scale, (long edge, short edge).
        teacher: the teacher's scale.

    Raises:
        ValueError: if a transform's random choices cannot be shared.
    """

    def __init__(
        self, transforms: Sequence[dict], student: tuple[int, int], teacher: tuple[int, int],
        reason: str | None = None,
    ) -> None:  # fmt: skip
        self.resolution = Resolution(student, teacher, reason)
        self.transforms = []
        known = {*ONE_SCALE, *MORE_SCALES, 'RandomFlip', 'RandomCrop', *_COLOURS, *_NO_PIXELS}
        for config in transforms:
            name = transform_name(config)
            fixed_pad = name == 'Pad' and config.get('size') is not None
            if (name not in known and name != 'Pad') or fixed_pad:
                raise ValueError(
                    f'TwoViews: the choices of {"Pad(size=...)" if fixed_pad else name} cannot be '
                    'shared between two views of an image. Those that can: '
                    + ', '.join(sorted(known | {'Pad(size_divisor=...)'}))
                )
            self.transforms.append(TRANSFORMS.build(config))

    def transform(self, results: dict) -> dict | None:
        """Makes both views; the packed sample holds the teacher's in the field ``teacher_view``."""
        large: dict = {'img': results['img'], 'img_shape': results['img'].shape[:2]}
        # x_teacher = scale · x_student + offset; y comes first, as in shapes.
        scale, offset = np.ones(2), np.zeros(2)
        for transform in self.transforms:
            before = [np.array(view['img'].shape[:2]) for view in (results, large)]
            name = type(transform).__name__
            with cache_random_params(transform):
                done = transform(results)
                if done is None:
                    return None
                if name == 'PackDetInputs':
                    view = self._view(large['img'], scale, offset)
                    done['data_samples'].set_field(view, VIEW)
                    return done
                if name == 'RandomCrop':
                    large, scale, offset = self._crop(transform, done, large, scale, offset)
                elif name in (*ONE_SCALE, *MORE_SCALES):
                    resize = copy.copy(getattr(transform, 'resize', transform))
                    resize.scale = self.resolution.enlarge(resize.scale)
                    large = resize(large)
                    sizes = [np.array(view['img'].shape[:2]) for view in (done, large)]
                    factors = [new / old for new, old in zip(sizes, before, strict=True)]
                    scale, offset = scale * factors[1] / factors[0], offset * factors[1]
                elif name not in _NO_PIXELS:
                    large = transform(large)
            if name == 'RandomFlip' and done['flip']:
                direction = done['flip_direction']
                turned = np.array([direction != 'horizontal', direction != 'vertical'])
                height_width = [np.array(view['img'].shape[:2]) for view in (done, large)]
                offset = np.where(
                    turned, height_width[1] - scale * height_width[0] - offset, offset
                )
            results = done
        raise RuntimeError('TwoViews: its transforms end without PackDetInputs')

    @staticmethod
    def _crop(
        transform: Any, small: dict, large: dict, scale: np.ndarray, offset: np.ndarray
    ) -> tuple[dict, np.ndarray, np.ndarray]:
        # Under cache_random_params this returns the student's draw.
        corner = np.array(transform._rand_offset((0, 0)))
        exact = scale * corner + offset
        start = np.maximum(np.rint(exact), 0).astype(int)
        stop = np.rint(exact + scale * small['img'].shape[:2]).astype(int)
        large['img'] = large['img'][start[0] : stop[0], start[1] : stop[1]]
        large['img_shape'] = large['img'].shape[:2]
        return large, scale, exact - start

    @staticmethod
    def _view(img: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> BaseDataElement:
        if img.ndim == 2:
            img = img[..., None]
        pixels = torch.from_numpy(np.ascontiguousarray(img.transpose(2, 0, 1)))
        view = BaseDataElement(img=pixels)
        view.set_metainfo({'scale': tuple(scale[::-1]), 'offset': tuple(offset[::-1])})
        return view

    def __repr__(self) -> str:
        inner = ', '.join(repr(t) for t in self.transforms)
        return f'{type(self).__name__}({self.resolution}, transforms=[{inner}])'


def apply_resolution(cfg: Config) -> Config:
    """Apply ``model.distillation.resolution`` to the pipelines of a config.

    Training, validation and test pipelines get the student's scale. If a term is on, the training
    pipeline also makes the teacher's view. Several scales of a pipeline keep their proportions, and
    the largest becomes the student's.

    Returns:
        The config itself if it has no resolution, else a copy. Applying it twice is the same.

    Raises:
        ValueError: if a pipeline has no resize, or a transform whose draws cannot be shared.
    """
    model = cfg.get('model') or {}
    distillation = require_dict('distillation', model.get('distillation') or {})
    resolution = Resolution.of(distillation.get('resolution'))
    if resolution is None:
        return cfg
    cfg = copy.deepcopy(cfg)
    holders = [
        (split, holder, 'pipeline')
        for split in ('train', 'val', 'test')
        for holder in pipelines(cfg.get(f'{split}_dataloader'))
    ]
    # Such as PipelineSwitchHook, by which RTMDet trains its last epochs.
    hooks = [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]
    holders += [
        ('train', hook, 'switch_pipeline')
        for hook in hooks
        if isinstance(hook, dict) and hook.get('switch_pipeline')
    ]
    for split, holder, key in holders:
        holder[key] = _at_scales(holder[key], split, resolution, needs_view(distillation))
    return cfg


def _at_scales(pipeline: list, split: str, resolution: Resolution, two: bool) -> list:
    """A pipeline at the student's scale; for training with ``two`` views, if asked."""
    views = [t for t in pipeline if transform_name(t) == 'TwoViews']
    for transform in views:
        own = Resolution(transform['student'], transform['teacher'], resolution.reason)
        if (own.student, own.teacher) != (resolution.student, resolution.teacher):
            raise ValueError(
                f'the {split} pipeline has TwoViews of {own.student} and {own.teacher}, '
                f'distillation.resolution says {resolution.student} and '
                f'{resolution.teacher}: remove one of the two'
            )
    if views:
        return pipeline
    pipeline = [rescale(t, resolution.student) for t in pipeline]
    if not any(scales_key(t) for t in pipeline):
        raise ValueError(
            f'the {split} pipeline has no transform that resizes '
            f'({", ".join(map(transform_name, pipeline))}), so distillation.resolution cannot set '
            'its scale: add Resize, RandomResize or RandomChoiceResize'
        )
    return _wrap(pipeline, resolution) if split == 'train' and two else pipeline


def at_teachers_scale(cfg: Config) -> Config:
    """A copy of the config with its pipelines at the teacher's scale, to test the teacher."""
    cfg = copy.deepcopy(cfg)
    distillation = cfg.model.get('distillation') or {}
    resolution = Resolution.of(distillation.get('resolution'))
    if resolution is not None:
        distillation['resolution']['student'] = resolution.teacher
    return apply_resolution(cfg)


def needs_view(distillation: dict) -> bool:
    """Whether a term, or a search for labels, is on, and the two scales differ."""
    resolution = Resolution.of(distillation.get('resolution'))
    if resolution is None or resolution.student == resolution.teacher:
        return False
    unlabelled = Unlabelled.of(distillation.get('unlabelled'))
    asks = unlabelled is not None and unlabelled.view == 'student'
    return asks or bool(terms_on(distillation))


def _wrap(pipeline: list, resolution: Resolution) -> list:
    loads = [
        i
        for i, t in enumerate(pipeline)
        if transform_name(t).startswith(('LoadImage', 'LoadMulti'))
    ]
    if not loads:
        raise ValueError(
            f'the train pipeline ({", ".join(map(transform_name, pipeline))}) loads no image, so '
            'there is nothing to make two views of'
        )
    first = loads[-1] + 1
    views = {
        'type': 'mmkd.TwoViews',
        'student': resolution.student,
        'teacher': resolution.teacher,
        'transforms': pipeline[first:],
    }
    if resolution.reason:
        views['reason'] = resolution.reason
    return [*pipeline[:first], views]
