"""A run with unlabelled images: its data loader, its checks and its log."""

from __future__ import annotations

import filecmp
import functools
import hashlib
import os
import os.path as osp
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.dist import all_reduce
from mmengine.hooks import Hook, LoggerHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..datasets.annotations import leaves
from ..datasets.intact_images import is_turned, require_intact_images, turns_photographs
from ..datasets.labels import check_labels
from ..datasets.teacher_labels import Images, read_labels
from ..datasets.unlabelled import (
    MixedBatchSampler,
    MixedDataset,
    find,
    image_infos,
    instances_of,
    list_images,
    loads_locally,
    with_unlabelled,
)
from ..options.class_map import first_names
from ..options.unlabelled import PseudoLabels, Unlabelled, head_of, require_scores
from ..recipe import UNTRAINED, TeacherError
from .class_names import class_names
from .labeller import MIN_SCORE, Labeller, labeller_of
from .labeller_checks import best_thresholds, require_labeller
from .pseudo_labels import label_images
from .teacher_check import check_teacher
from .wrappers import unwrap

LOOKED = 256
"""Unlabelled images after which the teacher must have found something."""
FEWEST = 3
"""The run stops if fewer of them than this have a box."""


class LeakError(ValueError):
    """Images that the student is validated or tested on are among those it is trained on."""


def settings_of(model: nn.Module) -> Unlabelled | None:
    """What ``distillation.unlabelled`` of a detector says; None of one without."""
    return getattr(getattr(unwrap(model), 'unlabelled', None), 'settings', None)


def mixed_dataloader(
    dataloader: dict, model: nn.Module, cfg: Config | None = None, folder: str | None = None
) -> dict:
    """The config of the training data loader, with unlabelled images if the detector wants them.

    Args:
        dataloader: the config of the labelled one.
        model: the detector, wrapped or not; it learns the thresholds of its classes.
        cfg: the config of the run, from which the teacher detects before training, for
            ``view='clean'`` and ``threshold='auto'``; all processes have to call it then.
        folder: where its detections are kept, so that a resumed run does not make them again.

    Raises:
        ValueError: if the two cannot share batches, or thresholds do not fit the classes.
        LabelsError: if the teacher cannot label the images, or there are no thresholds.
    """
    settings = settings_of(model)
    if settings is None:
        return dataloader
    settings.of_batch(dataloader.get('batch_size', 1))  # before anything takes time
    detector = unwrap(model)
    set_thresholds(detector.unlabelled, class_names({'train_dataloader': dataloader}))
    auto, clean = settings.threshold == 'auto', settings.view == 'clean'
    if not (auto or clean):
        return with_unlabelled(dataloader, settings)
    if cfg is None or 'model' not in cfg:
        asked = "view='clean'" if clean else "threshold='auto'"
        raise ValueError(
            f"distillation.unlabelled.{asked} needs the run's config, since the teacher labels "
            'images before training: start from it (RUNNERS.build(cfg)), or give '
            'mmkd.mixed_dataloader(dataloader, model, cfg)'
        )

    with_unlabelled(dataloader, settings)  # raises what it would raise after hours of labelling
    pipeline = next(leaves(dataloader['dataset']), {}).get('pipeline') or []
    images, readable = _images_without_leaks(settings, pipeline, cfg)
    labeller = None
    if clean:
        labeller = _clean_labeller(detector, cfg)
        require_same_orientation(pipeline, labeller.pipeline, readable)

    @functools.cache
    def check() -> None:
        check_before_labelling(detector, dataloader['dataset'], cfg, labeller)

    if auto:
        found = best_thresholds(
            cfg, folder and osp.join(folder, 'validation_labels.json'),
            teacher=detector.teacher, clean_view=clean, check=check,
        )  # fmt: skip
        detector.unlabelled.thresholds = [each.score for each in found]
    if labeller is None:
        return with_unlabelled(dataloader, settings)
    out = osp.expanduser(settings.cache or osp.join(folder or '', 'unlabelled_labels.json'))
    label_images(
        cfg, images, out, skip_unreadable=settings.skip_unreadable, labeller=labeller,
        keep_others=True, check=check,
    )  # fmt: skip
    labels = read_labels(out, labeller.info['teacher_sha256'], labeller.classes)
    boxes = instances_of(labels, detector.unlabelled.thresholds, settings.ignore)
    paths = zip(images.names, images.paths, strict=True)
    known = {path: boxes[name] for name, path in paths if name in boxes}
    return with_unlabelled(dataloader, settings, known)


def _images_without_leaks(
    settings: Unlabelled, pipeline: list, cfg: Config
) -> tuple[Images, list[str]]:
    """The unlabelled images, and the paths of those that can be read.

    Raises:
        ValueError: some are validation or test images, or cannot be read.
    """
    images = find(settings)
    sizes, _ = list_images(settings, loads_locally(Compose(pipeline)))
    held_out = {'validation': 'val_dataloader', 'test': 'test_dataloader'}
    refuse_leaks(
        images.paths, {w: (cfg.get(key) or {}).get('dataset') for w, key in held_out.items()}
    )
    return images, [path for path, *_ in sizes]


def _clean_labeller(detector: Any, cfg: Config) -> Labeller:
    """What labels clean images with the detector's teacher, for the student's classes."""
    settings = detector.unlabelled.settings
    lowest = MIN_SCORE if settings.lowest is None else min(MIN_SCORE, settings.lowest)
    labeller = labeller_of(cfg, teacher=detector.teacher, min_score=lowest)
    require_scores(labeller.network, settings)
    require_same_classes(detector, labeller.classes)
    detector.unlabelled.unknown = labeller.unknown
    return labeller


def require_same_classes(detector: Any, names: list[str]) -> None:
    """Check that labels of clean images are of the student's classes.

    Raises:
        ValueError: if there are more or fewer, or the thresholds are of others.
    """
    count = head_of(detector.roi_head).num_classes
    if len(names) != count:
        raise ValueError(
            f'distillation.unlabelled: the images would be labelled with {len(names)} classes '
            f'({first_names(names)}), and the student has {count}, whose names are not known: set '
            'metainfo=dict(classes=[...]) of train_dataloader.dataset'
        )
    set_thresholds(detector.unlabelled, names)


def require_same_orientation(student: list, labeller: list, paths: Sequence[str]) -> None:
    """Check that a pipeline turns photographs as that of their labels does.

    Raises:
        ValueError: naming an image that one of the two turns as its EXIF data say.
    """
    turns = [turns_photographs(pipeline) for pipeline in (student, labeller)]
    if turns[0] != turns[1] and (turned := next(filter(is_turned, paths), None)):
        loads = ["the student's training pipeline", "the teacher's test pipeline"]
        one, other = loads if turns[0] else loads[::-1]
        raise ValueError(
            f'distillation.unlabelled: {one} turns photographs as their EXIF data say, {other} '
            f'does not, so boxes would lie elsewhere on {turned}: set color_type of '
            "LoadImageFromFile alike in both ('color', or 'color_ignore_orientation')"
        )


def check_before_labelling(
    detector: Any, data: dict, cfg: Config, labeller: Labeller | None
) -> None:
    """Run the checks of the first step before the teacher spends hours labelling.

    Args:
        detector: the distilling detector.
        data: the config of its labelled images.
        cfg: of the run.
        labeller: the teacher as it labels clean images, if it does.

    Raises:
        ValueError: if a file numbers its classes in another order than their names.
        TeacherError: if the teacher does not detect.
    """
    alone = detector.unlabelled.settings.share == 1
    given = (cfg.get('val_dataloader') or {}).get('dataset') if alone else data
    dataset = DATASETS.build(given) if given is not None else None
    check_labels(dataset)
    if alone or not detector.check_teacher:
        return
    if detector.kd_terms or detector.unlabelled.asks:
        if not detector.teacher.prepared:
            detector.teacher.follow(next(detector.parameters()))
            require_intact_images(dataset)
            loader = SimpleNamespace(dataset=dataset, collate_fn=pseudo_collate)
            MMLogger.get_current_instance().info(check_teacher(detector, loader))
    elif labeller is not None and labeller.source != UNTRAINED:
        # The teacher sees clean images alone, so it is tried on those.
        require_labeller(cfg, labeller, list(image_infos(dataset)))


def set_thresholds(labels: PseudoLabels, names: list[str] | None) -> None:
    """Tell a detector's pseudo-labels the names of the classes, if they need them.

    Raises:
        ValueError: if the thresholds do not fit.
    """
    settings = labels.settings
    if settings is not None and labels.thresholds is None and names:
        labels.thresholds = settings.by_class(names, len(names))


def check_data(labels: PseudoLabels, loader: DataLoader) -> MixedDataset:
    """Check that a training data loader has the unlabelled images, and describe them for the table.

    Raises:
        ValueError: if it does not.
    """
    settings: Any = labels.settings
    dataset: Any = loader.dataset
    if not isinstance(dataset, MixedDataset):
        raise ValueError(
            'the detector has distillation.unlabelled, and the training data loader was built '
            'without those images: give DistillationRunner the config of train_dataloader, or '
            'build the loader from mmkd.mixed_dataloader(cfg.train_dataloader, model)'
        )
    images = dataset.images
    batches: Any = loader.batch_sampler
    own = 'no labelled ones: the teacher alone teaches'
    if isinstance(batches, MixedBatchSampler):
        own = f'{batches.unlabelled} of {batches.batch_size} in each batch'
    labels.table = [('unlabelled', f'{len(images)} images; {own}')]
    if dataset.labelled is not None:
        labels.table.append(('  labelled', f'{len(dataset.labelled)} images'))
    given = labels.thresholds or []
    scores = f'{given[0]:g}' if len(set(given)) == 1 else ', '.join(f'{t:.3g}' for t in given)
    scores += ' (auto)' if settings.threshold == 'auto' else ''
    if settings.ignore is not None:
        scores += f'; from {settings.ignore:g} on ignored regions'
    labels.table.append(('  threshold', scores))
    view = "the student's view" if settings.view == 'student' else 'the clean image'
    weight = '' if settings.hard_weight == 1 else f'; hard losses times {settings.hard_weight:g}'
    labels.table.append(('  teacher', f'detects in {view}{weight}'))
    if labels.unknown:
        unknown = first_names(labels.unknown)
        labels.table.append(('  classes', f'{unknown}: never found, so background there'))
    if images.passed_over:
        first = '; '.join(images.passed_over[:3])
        labels.table.append(('  passed over', f'{len(images.passed_over)}: {first}'))
    for change in dict.fromkeys(dataset.adapted):
        labels.table.append(('  pipeline', f'{change}, so that no unlabelled image is dropped'))
    return dataset


class UnlabelledHook(Hook):
    """Checks the unlabelled images before training, and what the teacher finds there after some.

    Raises:
        LeakError: validation or test images are among them.
        TeacherError: the teacher finds next to nothing.
    """

    priority = 'HIGHEST'

    def __init__(self) -> None:
        self.looks = False

    def before_train(self, runner: Runner) -> None:
        """Checks the images, and lets the log average what the teacher finds over its interval."""
        model = unwrap(runner.model)
        if settings_of(model) is None:
            return
        labels = model.unlabelled
        data = check_data(labels, runner.train_dataloader)
        paths = [info['img_path'] for info in image_infos(data.images)]
        held_out = {
            'validation': getattr(getattr(runner.val_loop, 'dataloader', None), 'dataset', None),
            'test': _dataset_of(runner, '_test_dataloader'),
        }
        known = refuse_leaks(paths, held_out)
        if data.labelled is not None:
            twice = list(known.found(_paths_of(data.labelled, 'training')))
            if twice:
                labels.table.append(
                    ('  twice', f'{len(twice)} labelled images are among the unlabelled ones')
                )
        interval = next((h.interval for h in runner.hooks if isinstance(h, LoggerHook)), 10)
        for name in ('unlabelled_empty', 'unlabelled_boxes'):
            own = dict(data_src=name, method_name='mean', window_size=interval)
            if all(each.get('data_src') != name for each in runner.log_processor.custom_cfg):
                runner.log_processor.custom_cfg.append(own)
        source = getattr(model.teacher, 'source', None)
        self.looks = model.check_teacher and source != UNTRAINED

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Stops the run once, if the teacher has found next to nothing so far."""
        model: Any = unwrap(runner.model) if self.looks else None
        if model is None or model.unlabelled.tally.images < LOOKED:
            return
        self.looks = False
        tally = model.unlabelled.tally
        counts = torch.tensor([tally.images, tally.empty], dtype=torch.float)
        counts = counts.to(next(model.parameters()).device)
        all_reduce(counts)
        images, empty = (int(count) for count in counts)
        if images - empty < FEWEST:
            name = f' {model.teacher.name}' if model.teacher is not None else ''
            raise TeacherError(
                f'the teacher{name} has found an object on {images - empty} of the '
                f'first {images} unlabelled images, at threshold '
                f'{_range(model.unlabelled.thresholds)}: look at what it says there (`mmkd '
                'pseudo-label --gallery`), lower distillation.unlabelled.threshold, or take images '
                'like those it was trained on. If they are so empty, set '
                'distillation.check_teacher=False'
            )


def _range(scores: list[float]) -> str:
    low, high = min(scores), max(scores)
    return f'{low:.3g}' if low == high else f'{low:.3g} to {high:.3g}'


def _dataset_of(runner: Any, name: str) -> Any:
    loader = getattr(runner, name, None)
    return loader.dataset if isinstance(loader, DataLoader) else (loader or {}).get('dataset')


def _paths_of(dataset: Any, who: str) -> list[str]:
    try:
        return [info['img_path'] for info in image_infos(dataset) if 'img_path' in info]
    except Exception as error:  # test data may be on another machine
        MMLogger.get_current_instance().warning(
            f'the unlabelled images ARE NOT COMPARED with the {who} images, which cannot be '
            f'listed: {error}'
        )
        return []


def refuse_leaks(paths: Iterable[str], held_out: dict[str, Any]) -> _Files:
    """Check that no image that is kept for validation or tests is among the unlabelled ones.

    Args:
        paths: of the unlabelled images.
        held_out: data sets, or their configs, by what they are for; None for none.

    Returns:
        The unlabelled images, to look for others.

    Raises:
        LeakError: naming the first of them.
    """
    known = _Files(paths)
    for who, dataset in held_out.items():
        same = list(known.found(_paths_of(dataset, who))) if dataset is not None else []
        if same:
            some = ', '.join(f'{own} is {other}' for own, other in same[:3])
            raise LeakError(
                f'{len(same)} {who} images are among the unlabelled ones, so the student would be '
                f'trained on what it is scored on: {some}{", ..." if len(same) > 3 else ""}. Take '
                'them out of distillation.unlabelled: where all images lie in one folder, list the '
                'others in a COCO file (ann_file, img_prefix)'
            )
    return known


class _Files:
    """Files that can be found again by their place or their bytes."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.places = {osp.realpath(path): path for path in paths}
        self.by_size: dict[int, list[str]] = defaultdict(list)
        for path in self.places:
            if osp.isfile(path):
                self.by_size[os.stat(path).st_size].append(path)
        self.heads: dict[int, dict[str, list[str]]] = {}

    def found(self, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Each of ``paths`` that is one of the files: that file, and the path."""
        for path in dict.fromkeys(map(osp.realpath, paths)):
            if path in self.places:
                yield self.places[path], path
            elif osp.isfile(path) and (size := os.stat(path).st_size) in self.by_size:
                if size not in self.heads:
                    self.heads[size] = defaultdict(list)
                    for own in self.by_size[size]:
                        self.heads[size][_head(own)].append(own)
                for own in self.heads[size].get(_head(path), ()):
                    if filecmp.cmp(own, path, shallow=False):
                        yield self.places[own], path
                        break


def _head(path: str) -> str:
    """SHA-256 of the beginning of a file: images without compression are all of one size."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read(2**16)).hexdigest()
