"""Data without labels: which images, how they are loaded, and how they share batches with others.

The student's training data set stays as it is. :func:`with_unlabelled` puts it beside the images of
``distillation.unlabelled``, which pass the same pipeline, and lets each batch hold both kinds.
"""

from __future__ import annotations

import copy
import logging
import os
import os.path as osp
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import cv2
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import BaseDetDataset
from mmdet.datasets.samplers import AspectRatioBatchSampler, MultiSourceSampler
from mmdet.registry import DATA_SAMPLERS, DATASETS
from mmengine.dataset import Compose, DefaultSampler, InfiniteSampler
from mmengine.dist import get_dist_info
from mmengine.logging import print_log
from PIL import Image
from torch.utils.data import BatchSampler, Dataset, Sampler

from ..options.unlabelled import MARK, Unlabelled
from .annotations import AnnotationError, leaves, metainfo_of
from .intact_images import EXIF_ORIENTATION, ImageError, cut_short, transforms_in
from .teacher_labels import Images, Labels, LabelsError, find_images

_TAIL = 2**16
"""The end marker is first looked for in this many bytes at the end of a file."""
_KEEPS = {'keep_empty': False, 'allow_negative_crop': True, 'skip_img_without_anno': False}
"""Options by which a transform drops an image that has no box, and the value that keeps it."""


class UnlabelledImages(BaseDetDataset):
    """The images of ``distillation.unlabelled``, without a box, or with those of a labels file.

    Args:
        source: the entry, see :class:`mmkd.options.unlabelled.Unlabelled`.
        instances: the boxes of each image by its path, as MMDetection's data sets have them.

    Raises:
        ValueError: there is no image.
        ImageError: some cannot be read, and are not to be passed over.
    """

    def __init__(
        self, source: dict, instances: dict[str, list[dict]] | None = None, **kwargs: Any
    ) -> None:
        self.source, self.instances = Unlabelled(**source), instances
        self.passed_over: list[str] = []
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """Path and size of each image that can be read."""
        found, self.passed_over = list_images(self.source, loads_locally(self))
        boxes, self.instances = self.instances, None  # once: workers would copy them
        if boxes is not None:
            self.passed_over += [f'{path} (no labels)' for path, *_ in found if path not in boxes]
            found = [each for each in found if each[0] in boxes]
        return [
            dict(img_path=path, img_id=i, width=width, height=height,
                 instances=boxes[path] if boxes else [])
            for i, (path, width, height) in enumerate(found)
        ]  # fmt: skip

    def prepare_data(self, idx: int) -> Any:
        """The sample of an image; None, so another image, for one that turns out to be broken as it
        is decoded and may be passed over."""
        try:
            return super().prepare_data(idx)
        except ImageError as error:
            if not self.source.skip_unreadable:
                raise
            print_log(f'passed over: {error}', logger='current', level=logging.WARNING)
            return None


def list_images(
    source: Unlabelled, local: bool = True
) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Path, width and height of each image, in the order of the source, and what was passed over.

    Args:
        source: the entry of the config.
        local: whether they are pictures on this machine; others are looked at as they are loaded.

    Raises:
        ValueError: there is none, or no such folder or file.
        ImageError: naming those that cannot be read, unless ``skip_unreadable`` says to go on.
    """
    paths = find(source).paths
    if not local:
        return [(path, 1, 1) for path in paths], []
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(_size, paths))
    found, broken = [], []
    for path, size in zip(paths, sizes, strict=True):
        if isinstance(size, str):
            broken.append(f'{path} ({size})')
        else:
            found.append((path, *size))
    if broken:
        print_log('images that cannot be read:\n' + '\n'.join(broken), 'current', logging.WARNING)
    if broken and (not source.skip_unreadable or not found):
        some = ', '.join(broken[:3]) + (', ... (the log has all)' if len(broken) > 3 else '')
        raise ImageError(
            f'distillation.unlabelled: {len(broken)} of {len(paths)} images cannot be read: {some}.'
            ' Copy them again or take them out'
            + ('' if source.skip_unreadable else ', or pass them over by skip_unreadable=True')
        )
    return found, broken


def find(source: Unlabelled) -> Images:
    """The image files, in the order of the source, by names that are those of a labels file.

    Raises:
        ValueError: there is none, or no such folder or file.
    """
    folders = [osp.expanduser(folder) for folder in source.folders or ()]
    try:
        if source.ann_file is not None:
            prefix = source.img_prefix and osp.expanduser(source.img_prefix)
            return find_images(osp.expanduser(source.ann_file), prefix)
        if len(folders) == 1:
            return find_images(folders[0])
        if folders:
            paths = [path for folder in folders for path in find_images(folder).paths]
        else:
            paths = [info['img_path'] for info in image_infos(source.dataset)]
    except (LabelsError, AnnotationError) as error:
        raise ValueError(f'distillation.unlabelled: {error}') from None
    if not paths:
        raise ValueError(
            f'distillation.unlabelled.dataset={source.dataset!r} has no image: look at its ann_file'
        )
    # One of two folders may lie in the other.
    paths = list({osp.realpath(path): path for path in reversed(paths)}.values())[::-1]
    return Images(paths, paths, list(range(1, len(paths) + 1)))


def image_infos(dataset: Any) -> Iterator[dict]:
    """What a data set, or the config of one, knows of each image; no pipeline is run, and no image
    is left out for its annotations."""
    if isinstance(dataset, dict):
        for leaf in leaves(dataset):
            yield from image_infos(DATASETS.build({**leaf, 'pipeline': [], 'test_mode': True}))
    else:
        yield from map(dataset.get_data_info, range(len(dataset)))


def _size(path: str) -> tuple[int, int] | str:
    """Width and height as MMDetection loads an image, or why it cannot."""
    try:
        with open(path, 'rb') as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            tail = file.read()
            if size > _TAIL and not (b'\xff\xd9' in tail or b'IEND' in tail):
                file.seek(0)
                tail = file.read()
        if not size:
            return 'it is an empty file'
        if cut := cut_short(tail):
            return f'it is cut short: the end of a {cut} is missing'
        with Image.open(path) as image:
            width, height = image.size
            # Of a PNG without EXIF data getexif() decodes the picture.
            known = image.format != 'PNG' or 'exif' in image.info
            turned = known and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except OSError as error:
        if error.strerror:
            return error.strerror
        return _decoded_size(path)
    except Exception:  # damaged EXIF data, or more pixels than Pillow likes
        return _decoded_size(path)
    return (height, width) if turned else (width, height)


def _decoded_size(path: str) -> tuple[int, int] | str:
    """Width and height of what OpenCV makes of a file that Pillow does not open."""
    try:
        image = cv2.imread(path) if cv2.haveImageReader(path) else None
    except cv2.error as error:
        return f'OpenCV cannot decode it: {error.err or error}'
    return 'it is no image' if image is None else (image.shape[1], image.shape[0])


# ------------------------------------------------------------------------------ both kinds


class MixedDataset(Dataset):
    """The labelled images first, then the unlabelled ones, whose samples are marked.

    Args:
        labelled: the config of the student's training data; None: the teacher alone teaches.
        unlabelled: that of :class:`UnlabelledImages`, inside the wrappers that mix images.

    Attributes:
        adapted: transforms that would have dropped images without a box, and how they were changed.
    """

    def __init__(self, labelled: dict | None, unlabelled: dict) -> None:
        self.labelled: Any = None if labelled is None else DATASETS.build(labelled)
        self.unlabelled: Any = DATASETS.build(unlabelled)
        self.datasets = [each for each in (self.labelled, self.unlabelled) if each is not None]
        self.adapted = keep_without_boxes(self.unlabelled)

    @property
    def images(self) -> UnlabelledImages:
        """The data set inside its wrappers."""
        found = self.unlabelled
        while not isinstance(found, UnlabelledImages):
            found = found.dataset
        return found

    @property
    def metainfo(self) -> dict:
        """Class names, those of the labelled data."""
        return self.datasets[0].metainfo

    @property
    def pipeline(self) -> Any:
        """That of the labelled images; setting it (PipelineSwitchHook) sets both."""
        return getattr(self.datasets[0], 'pipeline', None)

    @pipeline.setter
    def pipeline(self, pipeline: Compose) -> None:
        if self.labelled is not None:
            if not hasattr(self.labelled, 'pipeline'):
                return  # a wrapper goes on with the pipelines inside, as in MMDetection
            self.labelled.pipeline = pipeline
        own = copy.deepcopy(pipeline)
        self.adapted = keep_without_boxes(own)
        self.unlabelled.pipeline = own

    @property
    def offset(self) -> int:
        """The number of labelled images, so the index of the first unlabelled one."""
        return 0 if self.labelled is None else len(self.labelled)

    def full_init(self) -> None:
        """Does what the parts' does."""
        for each in self.datasets:
            if hasattr(each, 'full_init'):
                each.full_init()

    def get_data_info(self, index: int) -> dict:
        """What is known of an image before it is loaded."""
        own = index - self.offset
        return self.labelled.get_data_info(index) if own < 0 else self.unlabelled.get_data_info(own)

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitem__(self, index: int) -> Any:
        own = index - self.offset
        if own < 0:
            return self.labelled[index]
        sample = self.unlabelled[own]
        sample['data_samples'].set_metainfo({MARK: True})
        return sample


def labelled_part(dataset: Any) -> Any:
    """The labelled images of a training data set: all of one that is not mixed; None of none."""
    return dataset.labelled if isinstance(dataset, MixedDataset) else dataset


def keep_without_boxes(node: Any) -> list[str]:
    """Let the transforms of a data set or pipeline keep images without a box, in place.

    Returns:
        What was changed, for people.
    """
    changed = []
    for transform in transforms_in(node):
        for name, value in _KEEPS.items():
            if getattr(transform, name, value) != value:
                setattr(transform, name, value)
                changed.append(f'{type(transform).__name__}({name}={value})')
        for name in ('with_mask', 'with_seg'):
            if getattr(transform, name, False) is True:
                setattr(transform, name, False)
    return changed


def instances_of(labels: Labels, thresholds: Sequence[float], ignore: float | None) -> dict:
    """The boxes of each image in a labels file by the image's name, as data sets have them.

    Args:
        labels: of a labels file.
        thresholds: the lowest score of a detection that counts, of each class.
        ignore: the lowest score of an ignored region; None: there are none.
    """
    found: dict[str, list[dict]] = {}
    for name, image in labels.images.items():
        found[name] = []
        for box, label, score in zip(image.boxes, image.labels, image.scores, strict=True):
            doubtful = bool(score < thresholds[label])
            if not doubtful or (ignore is not None and score >= ignore):
                found[name].append(
                    dict(bbox=box.tolist(), bbox_label=int(label), ignore_flag=int(doubtful))
                )
    return found


@dataclass
class _Parts:
    """The data set and the sampler of its labelled part, on their way to the batch sampler. No
    tuple: a config would copy it."""

    dataset: MixedDataset
    sampler: Any


def _sampler_of_labelled(dataset: MixedDataset, sampler: dict, seed: int | None) -> _Parts:
    own = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset.labelled, seed=seed))
    return _Parts(dataset, own)


class MixedBatchSampler(Sampler):
    """Adds unlabelled images to each batch of labelled ones.

    An epoch is one pass over the labelled images. The unlabelled ones follow in an order of their
    own, which goes on from epoch to epoch: one permutation after another. It is fixed by the
    labelled sampler's seed and epoch, so a resumed run finds its place. Each process has its part.

    Args:
        sampler: of the labelled images, with the data set.
        batch_size: of both kinds together.
        unlabelled: how many of them are unlabelled.
        batches: the config of the sampler that makes batches of labelled images; None for a plain
            one. AspectRatioBatchSampler: the unlabelled images of a batch are of the same group.
        drop_last: whether a plain one drops a last batch that is not full.
    """

    def __init__(
        self, sampler: _Parts, batch_size: int, unlabelled: int, batches: dict | None,
        drop_last: bool = False,
    ) -> None:  # fmt: skip
        self.dataset, self.sampler = sampler.dataset, sampler.sampler
        self.batch_size, self.unlabelled = batch_size, unlabelled
        given = dict(sampler=self.sampler, batch_size=batch_size - unlabelled)
        if batches is None:
            self.labelled: Any = BatchSampler(**given, drop_last=drop_last)
        else:
            self.labelled = DATA_SAMPLERS.build(batches, default_args=given)
        self.rank, self.world_size = get_dist_info()
        self.groups = [list(range(len(self.dataset.unlabelled)))]
        if isinstance(self.labelled, AspectRatioBatchSampler):
            tall = [self._is_tall(self.dataset.offset + i) for i in self.groups[0]]
            groups = [[i for i in self.groups[0] if tall[i] == kind] for kind in (False, True)]
            # If either part has images of one shape only, grouping would leave images out.
            labelled = map(self._is_tall, range(self.dataset.offset))
            if all(groups) and any(a != b for a, b in pairwise(labelled)):
                self.groups = groups
        self._passes = 0

    def __len__(self) -> int:
        return len(self.labelled)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = getattr(self.sampler, 'epoch', self._passes)
        self._passes += 1
        seed = int(getattr(self.sampler, 'seed', 0) or 0)
        first = epoch * len(self) * self.unlabelled * self.world_size + self.rank
        streams = [
            _order(len(group), seed, first, self.world_size, kind)
            for kind, group in enumerate(self.groups)
        ]
        for batch in self.labelled:
            kind = len(self.groups) > 1 and self._is_tall(batch[0])
            group, stream = self.groups[kind], streams[kind]
            own = [group[next(stream)] for _ in range(self.unlabelled)]
            yield [*batch, *(self.dataset.offset + i for i in own)]

    def _is_tall(self, index: int) -> bool:
        info = self.dataset.get_data_info(index)
        return info['width'] < info['height']


def _order(count: int, seed: int, first: int, step: int, kind: int) -> Iterator[int]:
    """Each ``step``-th of an endless order of ``count`` things, from place ``first`` on."""
    place, known, order = first, -1, []
    while True:
        turn = place // count
        if turn != known:
            generator = torch.Generator().manual_seed((seed + 7919 * turn + kind) % 2**63)
            known, order = turn, torch.randperm(count, generator=generator).tolist()
        yield order[place % count]
        place += step


def with_unlabelled(
    dataloader: dict, settings: Unlabelled, instances: dict[str, list[dict]] | None = None
) -> dict:
    """The config of the data loader of both kinds of images.

    Args:
        dataloader: the config of the labelled one, with MMDetection's data set.
        settings: what ``distillation.unlabelled`` says.
        instances: the boxes of unlabelled images by path, where they are known beforehand.

    Raises:
        ValueError: if the batch has no room for both kinds, or the pipeline is not known.
    """
    loader = dict(dataloader)
    if loader.get('num_batch_per_epoch'):
        raise ValueError(
            'distillation.unlabelled and train_dataloader.num_batch_per_epoch exclude each other: '
            'shorten train_cfg, or take fewer labelled images by dataset.indices'
        )
    count = settings.of_batch(loader.get('batch_size', 1))
    leaf: Any = loader['dataset']
    if not isinstance(leaf, dict):
        raise ValueError(
            'distillation.unlabelled: train_dataloader.dataset must be the config of a data set, '
            f'not a {type(leaf).__name__}: its pipeline is that of the unlabelled images too'
        )
    images = dict(type=UnlabelledImages, source=asdict(settings), instances=instances)
    unlabelled = _in_its_place(leaf, images)
    mixed = dict(type=MixedDataset, labelled=leaf, unlabelled=unlabelled)
    if settings.share == 1:
        mixed['labelled'] = None
        kind = loader.get('sampler', {}).get('type')
        kind = DATA_SAMPLERS.get(kind) if isinstance(kind, str) else kind
        if kind not in (DefaultSampler, InfiniteSampler):
            # One that asks for labels, or for several data sets, has nothing to go by.
            endless = kind is not None and issubclass(kind, MultiSourceSampler)
            own = InfiniteSampler if endless else DefaultSampler
            loader['sampler'] = dict(type=own, shuffle=True)
            print_log(
                f'without labelled images {getattr(kind, "__name__", kind)} has no labels to '
                f'sample by: {own.__name__} is used instead',
                logger='current',
                level=logging.WARNING,
            )
        return {**loader, 'dataset': mixed}
    sampler = dict(loader.get('sampler') or dict(type=DefaultSampler, shuffle=True))
    if 'batch_size' in sampler:  # of MultiSourceSampler
        sampler['batch_size'] = loader['batch_size'] - count
        _require_each_source(sampler)
    batches = dict(
        type=MixedBatchSampler, unlabelled=count, batches=loader.get('batch_sampler'),
        drop_last=bool(loader.pop('drop_last', False)),
    )  # fmt: skip
    return {
        **loader,
        'dataset': mixed,
        'sampler': dict(type=_sampler_of_labelled, sampler=sampler),
        'batch_sampler': batches,
    }


def _require_each_source(sampler: dict) -> None:
    """MultiSourceSampler loops forever over a source of which it has to take no image."""
    size, ratio = sampler['batch_size'], list(sampler.get('source_ratio') or [1])
    counts = [int(size * part / sum(ratio)) for part in ratio]
    counts[0] = size - sum(counts[1:])
    if min(counts) < 1:
        raise ValueError(
            f'distillation.unlabelled leaves {size} labelled images in a batch, of which the '
            f'sampler would take {counts} from its sources (source_ratio={ratio}), and it needs '
            'one of each: take a larger train_dataloader.batch_size, or a smaller share'
        )


def _in_its_place(dataset: Any, images: dict) -> dict:
    """The config of a data set with ``images`` in the place of its own: its pipeline, and the
    wrappers that have pipelines (Mosaic), but none that repeats or joins data sets."""
    if 'datasets' in dataset:
        return _in_its_place(dataset['datasets'][0], images)
    if 'dataset' in dataset:
        inside = _in_its_place(dataset['dataset'], images)
        return {**dataset, 'dataset': inside} if dataset.get('pipeline') else inside
    if not dataset.get('pipeline'):
        raise ValueError(
            'distillation.unlabelled: train_dataloader.dataset has no pipeline, which the '
            'unlabelled images pass too'
        )
    return {**images, 'pipeline': dataset['pipeline'], 'metainfo': metainfo_of(dataset)}


def loads_locally(dataset: Any) -> bool:
    """Whether the pipeline of a data set reads pictures on this machine; a loader of one's own may
    read other files."""
    loads = [t for t in transforms_in(dataset) if isinstance(t, LoadImageFromFile)]
    return bool(loads) and not any(
        load.backend_args
        or load.imdecode_backend == 'tifffile'
        or type(load).transform is not LoadImageFromFile.transform
        for load in loads
    )
