"""Images without labels: the teacher's detections stand in for their ground truth.

An unlabelled image carries a mark in its data sample. The teacher has seen it with the batch, its
heads run on these features once more and detect, and the student's heads and all terms then treat
the detections as they treat boxes of people.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from mmdet.models.dense_heads import AnchorHead
from mmdet.models.detectors import DetectionTransformer, SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.structures import DetDataSample, SampleList
from mmdet.structures.bbox import BaseBoxes, bbox_overlaps, get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from .class_map import ClassMap, first_names
from .resolution import VIEW, View

MARK = 'unlabelled'
"""Meta field of a data sample without labels."""
IGNORED = 0.5
"""A background anchor or RoI of which a larger part lies in an ignored region is left out."""
_HARD = re.compile(r'(s\d+\.)?loss_(rpn_)?(cls|bbox)')
_WHERE = 'distillation.unlabelled'


@dataclass(frozen=True)
class Unlabelled:
    """The entry ``distillation.unlabelled``.

    Args:
        images: a folder, or several, with images at any depth.
        ann_file, img_prefix: a COCO file of which the images alone are read, and their folder.
        dataset: the config of any data set of MMDetection, of which the images alone are read.
        share: the part of each batch that is unlabelled, up to 1: the teacher alone.
        hard_weight: factor on the student's own losses on unlabelled images; 0 leaves the terms.
        threshold: the lowest score of a detection that counts: a number, one for each class (a
            list, or a dict by name), or 'auto'.
        ignore: the lowest score of an ignored region; those below are background. None: no regions.
        view: whether the teacher looks at the student's view of an image, or at the clean image.
        cache: where the detections of clean images are kept.
        skip_unreadable: whether images that cannot be read are passed over.

    Raises:
        ValueError: naming the entry, its value and the way out.
    """

    images: Any = None
    ann_file: str | None = None
    img_prefix: str | None = None
    dataset: dict | None = None
    share: float = 0.5
    hard_weight: float = 1.0
    threshold: Any = 0.5
    ignore: float | None = None
    view: str = 'student'
    cache: str | None = None
    skip_unreadable: bool = False

    @classmethod
    def of(cls, given: Any) -> Unlabelled | None:
        """Builds it from the entry of a config; None for None."""
        if given is None:
            return None
        if not isinstance(given, dict):
            raise ValueError(f"{_WHERE}={given!r} must be a dict, such as dict(images='folder/')")
        known = [each.name for each in fields(cls)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1, 0)
                raise ValueError(f'{_WHERE} has no entry {key!r}; did you mean {near[0]}?')
        return cls(**given)

    def __post_init__(self) -> None:
        sources = [k for k in ('images', 'ann_file', 'dataset') if getattr(self, k) is not None]
        if len(sources) != 1:
            said = ' and '.join(sources) or 'no images'
            raise ValueError(
                f"{_WHERE} names {said}: name one of images='folder/', ann_file='images.json' "
                "(with img_prefix='folder/') and dataset=dict(type=...); set an inherited one to "
                'None'
            )
        for key, kinds in (('ann_file', str), ('img_prefix', str), ('dataset', dict),
                           ('cache', str)):  # fmt: skip
            value = getattr(self, key)
            if value is not None and not (isinstance(value, kinds) and value):
                kind = 'a path (a string)' if kinds is str else 'the config of a data set'
                raise ValueError(f'{_WHERE}.{key}={value!r} must be {kind}')
        if self.dataset is not None and 'type' not in self.dataset:
            raise ValueError(
                f"{_WHERE}.dataset={self.dataset!r} has no type, such as type='CocoDataset'; a "
                'file alone is named by ann_file, a folder by images'
            )
        folders = self.folders
        if folders is not None and not (folders and all(isinstance(f, str) and f for f in folders)):
            raise ValueError(
                f'{_WHERE}.images={self.images!r} must be a folder, or a list of several (strings)'
            )
        if self.img_prefix is not None and self.ann_file is None:
            raise ValueError(
                f'{_WHERE}.img_prefix={self.img_prefix!r} is given without ann_file, whose images '
                'it is the folder of'
            )
        _number('share', self.share, 1, above=True)
        _number('hard_weight', self.hard_weight, float('inf'))
        if self.view not in ('student', 'clean'):
            raise ValueError(f"{_WHERE}.view={self.view!r} must be 'student' or 'clean'")
        if self.cache is not None and self.view != 'clean':
            raise ValueError(
                f"{_WHERE}.cache keeps the detections of clean images: set view='clean', or leave "
                "cache out (with view='student' each augmented image is looked at anew)"
            )
        if self.cache is not None and not self.cache.endswith('.json'):
            raise ValueError(
                f'{_WHERE}.cache={self.cache!r} must be a file that ends in .json, such as '
                "'labels.json'"
            )
        if not isinstance(self.skip_unreadable, bool):
            raise ValueError(
                f'{_WHERE}.skip_unreadable={self.skip_unreadable!r} must be True or False'
            )
        thresholds = self._check_threshold()
        if self.ignore is not None:
            _number('ignore', self.ignore, 1)
            if thresholds and self.ignore >= min(thresholds):
                raise ValueError(
                    f'{_WHERE}.ignore={self.ignore} must be below the threshold '
                    f'({min(thresholds):g}): detections between the two are ignored regions'
                )

    def _check_threshold(self) -> list[float]:
        given = self.threshold
        if isinstance(given, str):
            if given != 'auto':
                raise ValueError(
                    f"{_WHERE}.threshold={given!r} must be a score, one for each class, or 'auto'"
                )
            return []
        if isinstance(given, dict):
            values = {f'threshold[{name!r}]': value for name, value in given.items()}
        elif isinstance(given, (list, tuple)):
            values = {f'threshold[{i}]': value for i, value in enumerate(given)}
        else:
            values = {'threshold': given}
        if not values:
            raise ValueError(f'{_WHERE}.threshold={given!r} has no score')
        return [_number(name, value, 1) for name, value in values.items()]

    @property
    def folders(self) -> list[str] | None:
        """The folders of ``images``."""
        if self.images is None:
            return None
        return list(self.images) if isinstance(self.images, (list, tuple)) else [self.images]

    @property
    def lowest(self) -> float | None:
        """The lowest score that is asked for; None where the threshold is not known yet."""
        regions = [] if self.ignore is None else [float(self.ignore)]
        return min([*self._check_threshold(), *regions], default=None)

    def of_batch(self, batch_size: int) -> int:
        """How many images of a batch are unlabelled.

        Raises:
            ValueError: if the batch has no room for both kinds.
        """
        count = batch_size if self.share == 1 else int(self.share * batch_size + 0.5)
        if self.share < 1 and not 0 < count < batch_size:
            kind = 'unlabelled' if count == 0 else 'labelled'
            raise ValueError(
                f'{_WHERE}.share={self.share:g} of train_dataloader.batch_size={batch_size} leaves '
                f'no {kind} image in a batch: take a larger batch, '
                + (
                    f'or a share between {0.5 / batch_size:.3g} and {1 - 0.5 / batch_size:.3g}'
                    if batch_size > 1
                    else 'of 2 or more'
                )
            )
        return count

    def by_class(self, names: Sequence[str] | None, count: int) -> list[float] | None:
        """The threshold of each of the student's classes; None where it is not known yet.

        Args:
            names: of the classes; None if not known.
            count: number of classes.

        Raises:
            ValueError: if there is another number of thresholds, or of other names.
        """
        given = self.threshold
        if isinstance(given, str):
            return None
        if isinstance(given, (list, tuple)):
            if len(given) != count:
                raise ValueError(
                    f'{_WHERE}.threshold has {len(given)} scores, and the student has {count} '
                    'classes: give one for each, in the order of its head'
                )
            return [float(value) for value in given]
        if not isinstance(given, dict):
            return [float(given)] * count
        if names is None:
            return None
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(str(name), list(names), 1, 0)
                raise ValueError(
                    f'{_WHERE}.threshold: the student has no class {name!r}; did you mean '
                    f'{near[0]!r}?'
                )
        if missing := [name for name in names if name not in given]:
            raise ValueError(
                f'{_WHERE}.threshold has no score for {first_names(missing)}: give one for each of '
                f'the {count} classes'
            )
        return [float(given[name]) for name in names]


def _number(key: str, value: Any, high: float, above: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= high or value == float('inf') or (above and value == 0):
        bounds = f'above 0 and at most {high:g}' if above else f'between 0 and {high:g}'
        bounds = 'at least 0' if high == float('inf') else bounds
        raise ValueError(f'{_WHERE}.{key}={value!r} must be a number {bounds}')
    return float(value)


@dataclass
class Tally:
    """What the teacher has found so far, in this process: images, those without a box, boxes."""

    images: int = 0
    empty: int = 0
    boxes: int = 0


class PseudoLabels:
    """Gives unlabelled images of a batch the teacher's detections, and the student what it needs
    to be trained on them.

    Args:
        settings: None: no image is unlabelled, and nothing is done.

    Attributes:
        on: whether the config has unlabelled images.
        asks: whether the teacher detects in the student's batches.
        thresholds: the lowest score that counts, of each class; None before it is known.
        unknown: the student's classes that the teacher does not know.
        tally, log: what was found so far, and in this step, for the log.
        table: rows of the table at the start.
    """

    def __init__(self, settings: Unlabelled | None = None) -> None:
        self.settings = settings
        self.on, self.asks = settings is not None, getattr(settings, 'view', '') == 'student'
        self.thresholds: list[float] | None = None
        self.classes: ClassMap | None = None
        self.unknown: list[str] = []
        self.tally, self.log = Tally(), dict[str, Tensor]()
        self.table: list[tuple[str, str]] = []
        self._weights = _RowWeights()
        self._branches = 1

    def attach(self, student: Any, teacher: Any, classes: ClassMap | None) -> None:
        """Connect to a student, its teacher (None if the images come with labels) and the class
        map.

        Raises:
            ValueError: if one of the two cannot take part, with the way out.
        """
        if self.settings is None:
            return
        if student.with_mask:
            raise ValueError(
                f'{_WHERE}: the student predicts masks, and on unlabelled images it is trained on '
                'boxes alone: leave out model.roi_head.mask_head, or unlabelled'
            )
        self._branches = getattr(student, 'num_branch', 1)
        count = head_of(student.roi_head).num_classes
        names = classes.student if classes is not None else None
        self.thresholds = self.settings.by_class(names, count)
        if self.asks and teacher is not None:
            self.classes = classes
            self.unknown = classes.unknown if classes is not None else []
            _require_detections(teacher, self.settings, classes, count)
        if self.settings.ignore is not None:
            for assigner in list(_assigners(student)):
                assigner.assign = partial(_assign, type(assigner).assign, assigner)
        if self.settings.hard_weight != 1:
            self._weights.attach(student, self.settings.hard_weight)

    def begin(self, samples: SampleList) -> bool:
        """Begin a step of training on a batch.

        Returns:
            Whether the teacher has to detect in it.
        """
        self.log = {}
        marks = [bool(sample.get(MARK)) for sample in samples]
        # A Trident student lays the batch down once for each branch.
        self._weights.marks = marks * self._branches if any(marks) else []
        if any(marks) and not self.asks:
            self._take(samples)
        return self.asks and any(marks)

    @torch.no_grad()
    def label(self, teacher: Any, seen: Any, samples: SampleList) -> SampleList:
        """Put the teacher's detections into unlabelled samples; others stay as they are.

        Args:
            teacher: the :class:`mmkd.models.teacher.Teacher`.
            seen: what it made of the batch, with its neck.
            samples: of the batch; they are not changed.
        """
        rows = [i for i, sample in enumerate(samples) if sample.get(MARK)]
        if not rows or not self.asks:
            return samples
        if self.thresholds is None:
            raise RuntimeError(
                f'{_WHERE}.threshold={self.settings.threshold!r} needs class names or data: '  # type: ignore
                'train by mmkd.DistillationRunner, or give a number'
            )
        frames = [_frame(samples[i]) for i in rows]
        found = detect(teacher, seen.features, rows, frames)
        samples = list(samples)
        for i, predicted in zip(rows, found, strict=True):
            boxes = get_box_tensor(predicted.bboxes).float()
            samples[i] = self._with_boxes(
                samples[i], _back(boxes, seen.view, i), predicted.scores.float(), predicted.labels
            )
        self._take(samples)
        return samples

    def alone(self, student: Any, inputs: Tensor, samples: SampleList) -> SampleList:
        """:meth:`label` where nothing else is asked of the teacher, so it sees the unlabelled
        images (N, 3, H, W) of a batch alone."""
        rows = [i for i, sample in enumerate(samples) if sample.get(MARK)]
        own = [samples[i] for i in rows]
        own = self.label(student.teacher, student._show(inputs[rows], own), own)
        labelled = dict(zip(rows, own, strict=True))
        return [labelled.get(i, sample) for i, sample in enumerate(samples)]

    def _with_boxes(
        self, sample: DetDataSample, boxes: Tensor, scores: Tensor, labels: Tensor
    ) -> DetDataSample:
        if self.classes is not None and not self.classes.same:
            table = labels.new_full((len(self.classes.teacher),), -1)
            for own, theirs in enumerate(self.classes.indices):
                if theirs is not None:
                    table[theirs] = own
            labels = table[labels]
        height, width = sample.img_shape[:2]
        boxes = torch.stack(
            [boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], -1
        ).flatten(1)
        there = (labels >= 0) & ((boxes[:, 2:] - boxes[:, :2]).amin(-1) >= 1)
        boxes, scores, labels = boxes[there], scores[there], labels[there]
        counts = scores >= scores.new_tensor(self.thresholds)[labels]
        ignore = self.settings.ignore  # type: ignore[union-attr]
        between = ~counts & (scores >= ignore) if ignore is not None else torch.zeros_like(counts)
        new = sample.new()
        old = sample.gt_instances.get('bboxes')
        for name, mask in (('gt_instances', counts), ('ignored_instances', between)):
            # Boxes of the class that the pipeline uses, if the preprocessor leaves them so.
            own = type(old)(boxes[mask]) if isinstance(old, BaseBoxes) else boxes[mask]
            setattr(new, name, InstanceData(bboxes=own, labels=labels[mask]))
        return new

    def end(self, losses: dict) -> dict[str, Tensor]:
        """End the step; what the log says of it: the share of empty unlabelled images, and boxes
        per image.

        Raises:
            ValueError: if the student has hard losses that ``hard_weight`` does not reach.
        """
        self._weights.marks = []
        if self.settings is not None and self.settings.hard_weight != 1:
            for key in losses:
                if 'loss' in key and not _HARD.fullmatch(key):
                    _refuse_weight(f'the student has a loss {key!r} besides those of its two heads')
        return self.log

    def _take(self, samples: SampleList) -> None:
        """Count the boxes of the unlabelled images, and mark their ignored regions."""
        own = [sample for sample in samples if sample.get(MARK)]
        boxes = [len(sample.gt_instances) for sample in own]
        for sample in own:
            if 'ignored_instances' in sample:
                sample.ignored_instances.set_metainfo({MARK: True})
        self.tally.images += len(own)
        self.tally.empty += boxes.count(0)
        self.tally.boxes += sum(boxes)
        self.log = {
            'unlabelled_empty': torch.tensor(boxes.count(0) / len(own)),
            'unlabelled_boxes': torch.tensor(sum(boxes) / len(own)),
        }


def detect(teacher: Any, features: Sequence[Tensor], rows: list[int], frames: SampleList) -> list:
    """The teacher's detections in some images of a batch, in its own pixels and classes.

    Args:
        teacher: the :class:`mmkd.models.teacher.Teacher`.
        features: of the batch, behind its neck.
        rows: the images.
        frames: a data sample of each, with its shape.
    """
    network = teacher.network
    kind = next(network.parameters()).dtype
    if len(rows) < len(features[0]):
        features = [f[rows] for f in features]
    # Detection costs little behind the features, and some of its steps need full precision.
    with torch.autocast(features[0].device.type, enabled=False):
        features = tuple(f.to(kind).contiguous() for f in features)
        if not hasattr(network, 'roi_head'):
            return network.bbox_head.predict(features, frames, rescale=False)
        proposals = network.rpn_head.predict(features, frames, rescale=False)
        with _without_masks(network.roi_head):
            return network.roi_head.predict(features, proposals, frames, rescale=False)


@contextlib.contextmanager
def _without_masks(roi_head: nn.Module) -> Iterator[None]:
    """Lets a RoI head predict boxes alone."""
    modules = roi_head._modules
    mask_head = modules.get('mask_head')
    if mask_head is not None:
        modules['mask_head'] = None
    try:
        yield
    finally:
        if mask_head is not None:
            modules['mask_head'] = mask_head


def _frame(sample: DetDataSample) -> DetDataSample:
    """A sample of the teacher's image: its shape, and nothing else."""
    view = sample.get(VIEW)
    shape = tuple(sample.img_shape[:2] if view is None else view.img.shape[-2:])
    padded = shape if view is not None else tuple(sample.get('batch_input_shape', shape))
    return DetDataSample(
        metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0), pad_shape=padded,
                      batch_input_shape=padded)
    )  # fmt: skip


def _back(boxes: Tensor, view: View | None, image: int) -> Tensor:
    """Boxes (n, 4) of the teacher's image in the student's."""
    if view is None:
        return boxes
    scale, offset = (t[image].to(boxes).repeat(2) for t in (view.scale, view.offset))
    return (boxes - offset) / scale


def _require_detections(
    teacher: Any, settings: Unlabelled, classes: ClassMap | None, count: int
) -> None:
    two, one = isinstance(teacher, TwoStageDetector), isinstance(teacher, SingleStageDetector)
    head = teacher.roi_head if two and teacher.with_rpn else getattr(teacher, 'bbox_head', None)
    if not (two or one) or head is None or isinstance(teacher, DetectionTransformer):
        raise ValueError(
            f'{_WHERE}: the teacher ({type(teacher).__name__}) does not detect by heads behind its '
            "features: set view='clean', with which it detects beforehand, in its own way"
        )
    theirs = head_of(head).num_classes if two else head.num_classes
    if classes is None and theirs != count:
        raise ValueError(
            f'{_WHERE}: the teacher has {theirs} classes, the student {count}, and their names are '
            'not known: give distillation.classes=dict(student=[...], teacher=[...])'
        )
    for who, names, own in (
        (('student', classes.student, count), ('teacher', classes.teacher, theirs))
        if classes is not None
        else ()
    ):
        if len(names) != own:
            raise ValueError(
                f'distillation.classes.{who} has {len(names)} names, the {who} {own} classes '
                '(num_classes of its box head)'
            )
    if classes is not None and (twice := classes.twice):
        raise ValueError(f'{_WHERE}: {twice}')
    if not _test_cfg(teacher):
        raise ValueError(f'{_WHERE}: teacher_config has no model.test_cfg, by which it detects')
    require_scores(teacher, settings)


def require_scores(teacher: Any, settings: Unlabelled) -> None:
    """Check that a detector keeps detections of the lowest score that is asked for.

    Raises:
        ValueError: if it does not, with both scores.
    """
    kept = float(_test_cfg(teacher).get('score_thr') or 0)
    if settings.lowest is not None and settings.lowest < kept:
        raise ValueError(
            f'{_WHERE}: the teacher keeps no detection below {kept:g} (score_thr of its test_cfg), '
            f'and {settings.lowest:g} is asked for: raise threshold and ignore, or lower score_thr '
            'in teacher_config'
        )


def _test_cfg(detector: Any) -> dict:
    cfg = getattr(detector, 'test_cfg', None) or {}
    return (cfg.get('rcnn') if hasattr(detector, 'roi_head') else cfg) or {}


def head_of(roi_head: Any) -> Any:
    """The box head of a RoI head, of its first stage."""
    head = roi_head.bbox_head
    return head[0] if isinstance(head, nn.ModuleList) else head


def _assigners(student: Any) -> Iterator[Any]:
    """Those that assign ground truth to the student's anchors and RoIs.

    Raises:
        ValueError: if one knows no ignored regions.
    """
    for head, name in ((student.rpn_head, 'assigner'), (student.roi_head, 'bbox_assigner')):
        found = getattr(head, name, None)
        for assigner in found if isinstance(found, (list, tuple)) else [found]:
            if not hasattr(assigner, 'ignore_iof_thr'):
                kind = type(assigner).__name__ if assigner is not None else 'none'
                raise ValueError(
                    f"{_WHERE}.ignore: the assigner of the student's {type(head).__name__} ({kind})"
                    ' knows no ignored regions (ignore_iof_thr): leave ignore out'
                )
            yield assigner


def _assign(assign: Any, assigner: Any, *args: Any, **kwargs: Any) -> Any:
    """An assigner's ``assign`` that leaves background in ignored regions of unlabelled images out.

    MMDetection's own way (``ignore_iof_thr``) also takes positive anchors out, those of a small
    object before a doubtful large one, and does nothing in an image without a box.
    """
    result = assign(assigner, *args, **kwargs)
    given = (*args, *kwargs.values())
    ignored = next((x for x in given if isinstance(x, InstanceData) and x.get(MARK)), None)
    if ignored is not None and len(ignored) and len(result.gt_inds):
        boxes = get_box_tensor(ignored.bboxes)
        priors = get_box_tensor(given[0].priors).to(boxes)
        inside = bbox_overlaps(priors, boxes, mode='iof').amax(1) > IGNORED
        result.gt_inds[inside & (result.gt_inds == 0)] = -1
    return result


class _RowWeights:
    """Multiplies the weights of those rows of the student's losses that belong to unlabelled
    images.

    Attributes:
        marks: of each image of the student's batch whether it is unlabelled; [] weighs nothing.
    """

    def __init__(self) -> None:
        self.marks: list[bool] = []
        self._images: dict[int, Tensor] = {}
        self._positive: dict[int, Tensor] = {}
        self._factor = 1.0

    def attach(self, student: Any, factor: float) -> None:
        """Hook the loss modules.

        Raises:
            ValueError: if rows of a loss cannot be told apart by image.
        """
        self._factor = factor
        rpn, roi_head = student.rpn_head, student.roi_head
        own = getattr(type(rpn), 'loss_by_feat_single', None)
        if own is not AnchorHead.loss_by_feat_single:
            _refuse_weight(f"the student's RPN ({type(rpn).__name__}) has a loss of its own")
        for kind in ('cls', 'bbox'):
            self._hook(getattr(rpn, f'loss_{kind}'), self._of_anchors)
        heads = roi_head.bbox_head
        heads = heads if isinstance(heads, nn.ModuleList) else [heads]
        extractors = roi_head.bbox_roi_extractor
        for stage, head in enumerate(heads):
            if type(head).loss is not BBoxHead.loss:
                _refuse_weight(f"the student's box head ({type(head).__name__}) has its own loss")
            extractor = extractors[stage] if isinstance(extractors, nn.ModuleList) else extractors
            extractor.register_forward_pre_hook(partial(self._on_rois, stage), with_kwargs=True)
            classes = head.num_classes
            self._hook(head.loss_cls, partial(self._of_rois, stage, classes))
            self._hook(head.loss_bbox, partial(self._of_positives, stage))

    def _hook(self, loss: nn.Module, rows: Any) -> None:
        loss.register_forward_pre_hook(partial(self._weigh, rows), with_kwargs=True)

    def _on_rois(self, stage: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.marks:
            rois = kwargs['rois'] if 'rois' in kwargs else args[1]
            self._images[stage] = rois[:, 0].long()

    def _weigh(self, rows: Any, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        # Samplers call the same module first, with a reduction of their own.
        if not self.marks or kwargs.get('reduction_override') is not None:
            return None
        pred, target = args[0], args[1]
        marks = torch.tensor(self.marks, device=pred.device)[rows(pred, target)]
        factor = torch.where(marks, self._factor, 1.0)
        weight = args[2] if len(args) > 2 else kwargs.get('weight')
        if weight is not None:
            factor = weight * (factor if weight.dim() == 1 else factor[:, None])
        if len(args) > 2:
            return (*args[:2], factor, *args[3:]), kwargs
        return args, {**kwargs, 'weight': factor}

    def _of_anchors(self, pred: Tensor, target: Tensor) -> Tensor:
        # Of one level of the RPN: image, y, x, anchor.
        each = len(pred) // len(self.marks)
        return torch.arange(len(pred), device=pred.device) // max(each, 1)

    def _of_rois(self, stage: int, classes: int, pred: Tensor, target: Tensor) -> Tensor:
        images = self._images[stage]
        self._positive[stage] = images[(target >= 0) & (target < classes)]
        return images

    def _of_positives(self, stage: int, pred: Tensor, target: Tensor) -> Tensor:
        return self._positive[stage]


def _refuse_weight(why: str) -> None:
    raise ValueError(
        f'{_WHERE}.hard_weight: {why}, so the weight would not reach all of its losses: set '
        'hard_weight=1'
    )
