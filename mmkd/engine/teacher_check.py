"""Checks before training that the teacher detects the objects in the training images.

The teacher sees each image as its config preprocesses it and as other common configs would. Swapped
channels cost a detector at most a tenth of its recall, so recall alone detects them late; the
check compares the score of the best detection of each ground-truth box, image by image.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from mmengine.logging import MMLogger
from scipy.optimize import linear_sum_assignment
from scipy.stats import wilcoxon
from torch import Tensor

from ..datasets.unlabelled import labelled_part
from ..options.acceleration import input_channels
from ..options.resolution import View
from ..recipe import UNTRAINED, TeacherError
from ..shipped import command
from .random_state import random_state_kept

IMAGE_COUNTS = (32, 64, 128, 256, 512)
"""Numbers of images after which preprocessings are compared; the last one is the limit."""
SECONDS = 20.0
"""Time limit; twice as long while there are fewer than ``BOXES`` boxes."""
BOXES = 30
"""Fewest boxes from which anything is concluded."""
CERTAIN, SUSPICIOUS = 1e-4, 1e-2
"""p-values, corrected for all comparisons of the check, below which another preprocessing counts as
better: the teacher is refused, or a warning is logged."""
CLEARLY_WORSE = 1e-2
"""A preprocessing that is worse at this p-value is not tried on further images."""
MIN_RECALL = 0.25
"""Class-agnostic recall at IoU 0.5 with 100 detections below which a teacher counts as broken, and
neither preprocessing nor the order of classes is blamed. Random boxes reach 0.1."""
MIN_TRAIN_RECALL = 0.15
"""The same on training images, which are augmented."""
CLASS_RATIO = 6
"""At least one of so many found boxes must have the right class; guessing among ten classes gives
fewer."""
PREPROCESSINGS = {
    'RGB, mean [123.675, 116.28, 103.53], std [58.395, 57.12, 57.375]': (
        True, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    'BGR, mean [103.53, 116.28, 123.675], std [1, 1, 1]': (
        False, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]),
    'RGB, mean [0, 0, 0], std [255, 255, 255]': (True, [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]),
}  # fmt: skip
"""Common preprocessings, as (RGB, mean, std): torchvision's, Caffe's, and the range [0, 1]."""
OFF = 'If it is right as it is, set distillation.check_teacher=False'


def check_teacher(model: Any, loader: Any) -> str:
    """Compare the teacher's detections on training images with their ground truth.

    The images pass the training pipeline and the conversion that distillation uses. The check
    changes neither the data loader nor the random state, so a run with it equals one without.

    Args:
        model: the distilling detector.
        loader: the training data loader.

    Returns:
        A line for the log: the result, or why the check was skipped.

    Raises:
        TeacherError: the teacher finds next to nothing, or clearly more with another
            preprocessing or another order of classes.
    """
    network = model.teacher.network
    if model.teacher.source == UNTRAINED:
        return "teacher check: skipped, teacher_ckpt='random'"
    if getattr(network, 'test_cfg', None) is None or not hasattr(network, 'predict'):
        return 'teacher check: skipped, this teacher has no test_cfg'
    if labelled_part(loader.dataset) is None:
        return 'teacher check: skipped, there are no labelled images'
    indices = model.classes.indices if model.classes is not None else None
    by_class = 'rcnn' in model.sites or model.unlabelled.on
    if not by_class and indices is None:
        ours, theirs = (_classes(each) for each in (model, network))
        if ours != theirs:
            return f'teacher check: skipped, it has {theirs} classes and the student {ours}'
    with random_state_kept():
        own, others = _look(model, loader, indices, by_class)
    boxes = sum(map(len, own))
    if _few(own):
        return f'teacher check: skipped, {boxes} boxes on the first images are too few'
    found, right, _ = means(own)
    said = f'the teacher finds {100 * found:.0f} % of {boxes} boxes of training images (IoU 0.5)'
    if by_class:
        said += f', {100 * right:.0f} % with the right class'
    chance, pixels = best_preprocessing(own, others, len(IMAGE_COUNTS))
    better = ''
    if chance < SUSPICIOUS:
        better = f'{said}, but {_compared(own, others[pixels], pixels, chance)}'
    mended = False
    if better:
        found_then, right_then, _ = means(others[pixels])
        # An untrained network may find more with another preprocessing, but knows no class.
        mended = found_then >= MIN_RECALL and not (
            by_class and right_then < found_then / CLASS_RATIO
        )
    if chance < CERTAIN and mended:
        raise TeacherError(
            f'{better}: the data_preprocessor of teacher_config is not the one that it was '
            f'trained with. {OFF}'
        )
    renamed = best_class_recall(own)
    if by_class and found >= MIN_RECALL and renamed > max(2 * right, found / 3):
        raise TeacherError(
            f'{said}, and {100 * renamed:.0f} % if its classes stood in another order: give '
            f'distillation.classes. {OFF}'
        )
    if found < MIN_TRAIN_RECALL or (by_class and right < found / CLASS_RATIO) or chance < CERTAIN:
        raise TeacherError(
            f'{better or said}. That usually means a wrong checkpoint, a wrong normalisation (mean '
            'and std of the data_preprocessor in teacher_config), or data unlike its training '
            f'data: see `{command("check")} --data`. {OFF}'
        )
    if better:
        MMLogger.get_current_instance().warning(
            f'{better}: this is unlikely to be chance, so check that the data_preprocessor of '
            f'teacher_config is the one that it was trained with (`{command("check")} --data`)'
        )
    return f'teacher check: {said}'


def require_channels(model: Any, batch: Any) -> None:
    """Check that images have as many channels as the student's backbone takes.

    Args:
        model: the distilling detector.
        batch: as the data loader gives it; one of another form is not checked.

    Raises:
        ValueError: with both numbers.
    """
    images = batch.get('inputs') if isinstance(batch, dict) else None
    image = images[0] if isinstance(images, (list, tuple, Tensor)) else None
    takes = input_channels(model)
    if not isinstance(image, Tensor) or image.dim() != 3 or len(image) == takes:
        return
    with contextlib.suppress(Exception):  # one of a user's own may make them fit
        few = dict(inputs=[image], data_samples=batch['data_samples'][:1])
        if copy.deepcopy(model.data_preprocessor)(few, True)['inputs'].size(1) == takes:
            return
    raise ValueError(
        f"the training pipeline loads images of {len(image)} channel(s), the student's backbone "
        f'takes {takes}: let the loader give {takes} (color_type of LoadImageFromFile: '
        "'color' gives 3, 'grayscale' 1, 'unchanged' what the file has), or set "
        f'model.backbone.in_channels={len(image)}'
    )


def _look(
    model: Any, loader: Any, indices: list[int | None] | None, by_class: bool
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Run the teacher until its own preprocessing is clearly the best or not, or time is up.

    Returns:
        :func:`match_boxes` of each image with boxes: with the teacher's own preprocessing, and with
        each of the others, which may cover only the first of these images.
    """
    own: list[Tensor] = []
    network = model.teacher.network
    # The common ones are of three channels.
    open_ = _candidates(network.data_preprocessor) if input_channels(network) == 3 else {}
    others: dict[str, list[Tensor]] = {name: [] for name in open_}
    start = time.perf_counter()
    batches = _batches(model, loader, indices)
    images = 0
    # Its own preprocessing first, in case a slow machine has no time for the others.
    while (open_ or _few(own)) and (batch := list(itertools.islice(batches, IMAGE_COUNTS[0] // 2))):
        for each in batch:
            own += _ask(model, each, None, by_class)
            if _late(start, own):
                return own, others
        for each in batch:
            for name, change in open_.items():
                others[name] += _ask(model, each, change, by_class)
            if _late(start, own):
                return own, others
        images += len(batch)
        if images not in IMAGE_COUNTS or _few(own):
            continue
        if best_preprocessing(own, others, len(IMAGE_COUNTS))[0] < CERTAIN:
            return own, others
        open_ = {n: c for n, c in open_.items() if p_value(others[n], own) > CLEARLY_WORSE}
    return own, others


def _few(own: list[Tensor]) -> bool:
    return sum(map(len, own)) < BOXES


def _late(start: float, own: list[Tensor]) -> bool:
    return time.perf_counter() - start > SECONDS * (2 if _few(own) else 1)


def p_value(one: list[Tensor], other: list[Tensor]) -> float:
    """One-sided Wilcoxon signed-rank test that ``other`` has higher scores than ``one``.

    Args:
        one: :func:`match_boxes` of each image.
        other: the same for the same images, or for the first of them.

    Returns:
        p over images, not boxes: the boxes of one image are not independent.
    """
    gains = [
        float((b - a)[:, 2].mean()) for a, b in zip(one, other, strict=False) if not a.equal(b)
    ]
    return float(wilcoxon(gains, alternative='greater').pvalue) if any(gains) else 1.0


def best_preprocessing(
    own: list[Tensor], others: dict[str, list[Tensor]], looks: int = 1
) -> tuple[float, str]:
    """The best of the preprocessings that are clearly better than the teacher's own.

    Args:
        own: :func:`match_boxes` of each image with the teacher's own preprocessing.
        others: the same with each of the others, for the same images or the first of them.
        looks: how often they are compared.

    Returns:
        The p-value, with Bonferroni's correction, and the name; '' if none is clearly better.
    """
    chances = {
        name: p_value(own, other) * len(others) * looks for name, other in others.items() if other
    }
    below = ([n for n in chances if chances[n] < limit] for limit in (CERTAIN, SUSPICIOUS))
    clear = next((names for names in below if names), None)
    if clear is None:
        return min(chances.values(), default=1.0), ''
    name = max(clear, key=lambda n: means(others[n])[2])
    return chances[name], name


def _compared(own: list[Tensor], other: list[Tensor], pixels: str, chance: float) -> str:
    """Recall and score on the images that both preprocessings were tried on, for a message."""
    found, _, score = means(own[: len(other)])
    better, _, best = means(other)
    return (
        f'with {pixels} it finds {100 * better:.0f} % instead of {100 * found:.0f} %, and its '
        f'best detection of a box scores {best:.3f} instead of {score:.3f} (times IoU; '
        f'p = {chance:.0e})'
    )


def _classes(detector: Any) -> int | None:
    head = getattr(getattr(detector, 'roi_head', detector), 'bbox_head', None)
    head = head[0] if isinstance(head, torch.nn.ModuleList) else head
    return getattr(head, 'num_classes', None)


def _with_own_pipeline(dataset: Any) -> Any:
    """A data set with a copy of the pipeline, since some transforms cache images."""
    dataset = copy.copy(dataset)
    for name in ('pipeline', 'pipeline_types'):
        if hasattr(dataset, name):
            setattr(dataset, name, copy.deepcopy(getattr(dataset, name)))
    if hasattr(dataset, 'dataset'):
        dataset.dataset = _with_own_pipeline(dataset.dataset)
    if hasattr(dataset, 'datasets'):
        dataset.datasets = [_with_own_pipeline(each) for each in dataset.datasets]
    return dataset


def _batches(model: Any, loader: Any, indices: list[int | None] | None) -> Iterator[tuple]:
    """The teacher's inputs, the samples in its frame, and (boxes, labels) of each image."""
    dataset = _with_own_pipeline(labelled_part(loader.dataset))
    preprocessor = copy.deepcopy(model.data_preprocessor)
    # In random order, since files may be sorted by class.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for number in order[: IMAGE_COUNTS[-1]].tolist():
        data = loader.collate_fn([dataset[number]])
        require_channels(model, data)
        data = preprocessor(data, True)
        samples = data['data_samples']
        pixels, view = model.teacher_inputs(data['inputs'], samples)
        truth = []
        for sample in samples:
            bounds, labels = ground_truth(sample, indices)
            if view is not None:
                bounds = _moved(bounds, view)
            truth.append((bounds, labels))
        frames = [copy.copy(sample) for sample in samples]
        if view is not None:
            for frame in frames:
                shape = tuple(pixels.shape[2:])
                frame.set_metainfo({'img_shape': shape, 'batch_input_shape': shape})
        yield pixels, frames, truth


def _moved(boxes: Tensor, view: View) -> Tensor:
    here = View(view.scale[:1].cpu(), view.offset[:1].cpu())
    return here.rois(torch.cat([boxes.new_zeros(len(boxes), 1), boxes], 1))[:, 1:]


def ground_truth(sample: Any, indices: list[int | None] | None) -> tuple[Tensor, Tensor]:
    """The boxes (n, 4) of an image and their labels (n,) in the teacher's numbering.

    Args:
        sample: with ground truth.
        indices: the teacher's class for each class of the data; boxes of a class with None are
            left out. None if the classes are the same.
    """
    boxes = get_box_tensor(sample.gt_instances.bboxes).float().cpu()
    labels = torch.as_tensor(sample.gt_instances.labels).cpu()
    if indices is None:
        return boxes, labels
    labels = torch.tensor([-1 if i is None else i for i in indices])[labels]
    return boxes[labels >= 0], labels[labels >= 0]


def match_boxes(predicted: Any, boxes: Tensor, labels: Tensor, by_class: bool = True) -> Tensor:
    """Match the ground-truth boxes of an image with the 100 detections of highest score.

    Args:
        predicted: the detections.
        boxes: ground truth (n, 4).
        labels: (n,), in the detector's numbering.
        by_class: whether the class counts in the score.

    Returns:
        (n, 5), the columns: 1 if a detection overlaps the box with IoU 0.5 or more, else 0; 1 if
        the one with the highest score has the right class; the largest product of score and IoU
        (with ``by_class`` the mean of that and of the largest with the right class); the label;
        the class of the detection with the highest score, -1 without one.
    """
    predicted = predicted.cpu()
    predicted = predicted[predicted.scores.argsort(descending=True)[:100]]
    if len(boxes) == 0 or len(predicted) == 0:
        nothing = boxes.new_zeros(len(boxes))
        return torch.stack([nothing, nothing, nothing, labels.float(), nothing - 1], 1)
    overlaps = bbox_overlaps(boxes, get_box_tensor(predicted.bboxes).float())
    over = overlaps >= 0.5
    same = labels[:, None] == predicted.labels
    scores = overlaps * predicted.scores.float()
    best = scores.amax(1)
    if by_class:
        best = (best + (scores * same).amax(1)) / 2
    found = over.any(1)
    # Detections are sorted by score, so the first that overlaps has the highest.
    named = torch.where(found, predicted.labels[over.float().argmax(1)], -1)
    return torch.stack([found.float(), (named == labels).float(), best, labels, named], 1)


def means(seen: list[Tensor]) -> tuple[float, float, float]:
    """Mean recall, recall with the right class, and score, over all boxes."""
    found, right, score = torch.cat(seen)[:, :3].mean(0).tolist()
    return found, right, score


def best_class_recall(seen: list[Tensor]) -> float:
    """Recall with the right class under the best permutation of the classes.

    A permutation gives each class another name, so a teacher that detects one class everywhere
    gains nothing.
    """
    every = torch.cat(seen)
    labels, named = every[every[:, 0] > 0, 3:].long().unbind(1)
    if len(labels) == 0:
        return 0.0
    size = int(torch.cat([labels, named]).max()) + 1
    counts = torch.bincount(labels * size + named, minlength=size**2).view(size, size)
    return float(counts[linear_sum_assignment(counts.numpy(), maximize=True)].sum()) / len(every)


@torch.no_grad()
def _ask(model: Any, batch: tuple, change: Any, by_class: bool) -> list[Tensor]:
    """:func:`match_boxes` of each image of a batch that has boxes."""
    pixels, samples, truth = batch
    pixels = change(pixels, samples) if change else pixels
    results = model.teacher.network.predict(pixels, copy.deepcopy(samples), rescale=False)
    return [
        match_boxes(result.pred_instances, boxes, labels, by_class)
        for result, (boxes, labels) in zip(results, truth, strict=True)
        if len(boxes)
    ]


def _candidates(preprocessor: Any) -> dict[str, Any]:
    """Functions that convert the teacher's inputs to those of another data_preprocessor."""
    swapped = preprocessor._channel_conversion
    normalised = getattr(preprocessor, '_enable_normalize', False)
    mean = preprocessor.mean.expand(3, 1, 1) if normalised else torch.zeros(3, 1, 1)
    std = preprocessor.std.expand(3, 1, 1) if normalised else torch.ones(3, 1, 1)

    def change(swap: bool, new_mean: Tensor, new_std: Tensor) -> Any:
        def call(pixels: Tensor, samples: list) -> Tensor:
            old, new = [
                [v.to(pixels).view(-1, 1, 1) for v in pair]
                for pair in ((mean, std), (new_mean, new_std))
            ]
            raw = pixels * old[1] + old[0]
            raw = raw.flip(1) if swap != swapped else raw
            inside = torch.zeros_like(raw[:, :1])
            for mask, sample in zip(inside, samples, strict=True):
                height, width = sample.img_shape[:2]
                mask[:, :height, :width] = 1
            return (raw - new[0]) / new[1] * inside

        return call

    ways = {
        'the other channel order': (not swapped, mean, std),
        **{
            name: (swap, *(torch.tensor(v).view(-1, 1, 1) for v in values))
            for name, (swap, *values) in PREPROCESSINGS.items()
        },
    }
    tried: list[tuple] = [(swapped, mean, std)]
    candidates = {}
    for name, way in ways.items():
        if not any(_same(way, other) for other in tried):
            tried.append(way)
            candidates[name] = change(*way)
    return candidates


def _same(one: tuple, other: tuple) -> bool:
    return one[0] == other[0] and all(
        torch.allclose(a.cpu(), b.cpu()) for a, b in zip(one[1:], other[1:], strict=True)
    )
