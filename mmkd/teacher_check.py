"""Does the teacher find anything in the images that it is to teach on? Asked before training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from torch import Tensor

from .resolution import View
from .teacher import UNTRAINED, TeacherError
from .watch import random_state, set_random

IMAGES, BOXES = 32, 30
"""At most so many images are looked at; fewer boxes than this tell nothing."""
FINDS_NOTHING = 0.1
"""Recall at IoU 0.5, whatever the class, below which a teacher is refused: what boxes at random
reach. Training images are augmented, so it is lower than that of ``tools/check_pair.py --data``."""
PIXELS = {
    'RGB, mean [123.675, 116.28, 103.53], std [58.395, 57.12, 57.375]': (
        True, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    'BGR, mean [103.53, 116.28, 123.675], std [1, 1, 1]': (
        False, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]),
    'RGB, mean [0, 0, 0], std [255, 255, 255]': (True, [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]),
}  # fmt: skip
"""The usual ways to prepare pixels: torchvision's, Caffe's, and plain [0, 1]."""
OFF = 'If it is right as it is, set distillation.check_teacher=False'


def check_teacher(model: Any, loader: Any) -> str:
    """Compare the teacher's detections on training images with their ground truth.

    The images come from the training data set and its pipeline, and reach the teacher through the
    conversion that distillation uses. Neither the data loader nor any random number of the run is
    touched, so a run with the check equals one without.

    Args:
        model: the distilling detector.
        loader: the training data loader.

    Returns:
        A line for the log: what was found, or why nothing could be asked.

    Raises:
        TeacherError: the teacher finds next to nothing, or clearly more with other pixels or
            another order of classes.
    """
    network = model.teacher.network
    if model.teacher.source == UNTRAINED:
        return "teacher check: left out, teacher_ckpt='random'"
    if getattr(network, 'test_cfg', None) is None or not hasattr(network, 'predict'):
        return 'teacher check: left out, this teacher has no test_cfg to detect by'
    indices = model.classes.indices if model.classes is not None else None
    by_class = any(name.startswith('rcnn_') for name in model.terms)
    if not by_class and indices is None:
        own, theirs = (_classes(each) for each in (model, network))
        if own != theirs:
            return f'teacher check: left out, it has {theirs} classes and the student {own}'
    with _untouched():
        batches = list(_batches(model, loader, indices))
        boxes = sum(len(b) for *_, truth in batches for b, _ in truth)
        if boxes < BOXES:
            return f'teacher check: left out, {boxes} boxes on the first images tell nothing'
        found, right = _recall(model, batches, None)
        score = right if by_class else found
        best, pixels = 0.0, ''
        for name, change in _candidates(network.data_preprocessor).items():
            value = _recall(model, batches, change)[by_class]
            if value > best:
                best, pixels = value, name
    said = f'the teacher finds {100 * found:.0f} % of {boxes} boxes of training images (IoU 0.5)'
    if by_class:
        said += f', {100 * right:.0f} % with the right class'
    # Six boxes more are no accident.
    if best >= score + max(0.1, 6 / boxes):
        raise TeacherError(
            f'{said}, and {100 * best:.0f} % with {pixels}: the data_preprocessor of '
            f'teacher_config is not the one that it was trained with. {OFF}'
        )
    confused = by_class and right < found / 3
    if found < FINDS_NOTHING or (confused and found < 2.5 * FINDS_NOTHING):
        raise TeacherError(
            f'{said}. That usually means a wrong checkpoint, a wrong normalisation (mean and std '
            'of the data_preprocessor in teacher_config), or data that it never saw: see what it '
            f'says by tools/check_pair.py --data. {OFF}'
        )
    if confused:
        raise TeacherError(
            f'{said}. That usually means another order of classes: give distillation.classes. {OFF}'
        )
    return f'teacher check: {said}'


def _classes(detector: Any) -> int | None:
    head = getattr(getattr(detector, 'roi_head', detector), 'bbox_head', None)
    head = head[0] if isinstance(head, torch.nn.ModuleList) else head
    return getattr(head, 'num_classes', None)


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    state = random_state()
    try:
        yield
    finally:
        set_random(state)


def _aside(dataset: Any) -> Any:
    """The same data behind a pipeline of its own: some transforms remember images."""
    dataset = copy.copy(dataset)
    for name in ('pipeline', 'pipeline_types'):
        if hasattr(dataset, name):
            setattr(dataset, name, copy.deepcopy(getattr(dataset, name)))
    if hasattr(dataset, 'dataset'):
        dataset.dataset = _aside(dataset.dataset)
    if hasattr(dataset, 'datasets'):
        dataset.datasets = [_aside(each) for each in dataset.datasets]
    return dataset


def _batches(model: Any, loader: Any, indices: list[int | None] | None) -> Iterator[tuple]:
    """The teacher's pixels, the samples in its frame, and (boxes, labels) of each image."""
    dataset = _aside(loader.dataset)
    preprocessor = copy.deepcopy(model.data_preprocessor)
    images, boxes = min(IMAGES, len(dataset)), 0
    for number in range(images):
        if boxes >= 2 * BOXES:
            return
        data = loader.collate_fn([dataset[number * len(dataset) // images]])
        data = preprocessor(data, True)
        samples = data['data_samples']
        pixels, view = model.pixels(data['inputs'], samples)
        truth = []
        for sample in samples:
            bounds, labels = ground_truth(sample, indices)
            if view is not None:
                bounds = _moved(bounds, view)
            boxes += len(bounds)
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
    """The boxes (n, 4) of an image and their labels (n,) in the teacher's numbers.

    Args:
        sample: with ground truth.
        indices: the teacher's class for each class of the data, boxes of a class that is None are
            left out; None where the classes are the same.
    """
    boxes = get_box_tensor(sample.gt_instances.bboxes).float().cpu()
    labels = torch.as_tensor(sample.gt_instances.labels).cpu()
    if indices is None:
        return boxes, labels
    labels = torch.tensor([-1 if i is None else i for i in indices])[labels]
    return boxes[labels >= 0], labels[labels >= 0]


def count_found(predicted: Any, boxes: Tensor, labels: Tensor) -> tuple[int, int]:
    """How many boxes are found (IoU 0.5, 100 detections), and how many with the right class."""
    predicted = predicted.cpu()
    predicted = predicted[predicted.scores.argsort(descending=True)[:100]]
    if len(boxes) == 0 or len(predicted) == 0:
        return 0, 0
    over = bbox_overlaps(boxes, get_box_tensor(predicted.bboxes).float()) >= 0.5
    right = over & (labels[:, None] == predicted.labels)
    return int(over.any(1).sum()), int(right.any(1).sum())


@torch.no_grad()
def _recall(model: Any, batches: list[tuple], change: Any) -> tuple[float, float]:
    """Recall whatever the class, and with the right one, by 100 detections an image."""
    network = model.teacher.network
    found = right = total = 0
    for pixels, samples, truth in batches:
        pixels = change(pixels, samples) if change else pixels
        results = network.predict(pixels, copy.deepcopy(samples), rescale=False)
        for result, (boxes, labels) in zip(results, truth, strict=True):
            total += len(boxes)
            hits = count_found(result.pred_instances, boxes, labels)
            found, right = found + hits[0], right + hits[1]
    return found / max(total, 1), right / max(total, 1)


def _candidates(preprocessor: Any) -> dict[str, Any]:
    """Ways to turn the teacher's pixels into those of another data_preprocessor."""
    swapped = preprocessor._channel_conversion
    normalised = getattr(preprocessor, '_enable_normalize', False)
    mean = preprocessor.mean if normalised else torch.zeros(3, 1, 1)
    std = preprocessor.std if normalised else torch.ones(3, 1, 1)

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

    return {
        'the other channel order': change(not swapped, mean, std),
        **{
            name: change(swap, *(torch.tensor(v) for v in values))
            for name, (swap, *values) in PIXELS.items()
        },
    }
