"""Which of the teacher's classes is which of the student's, and its answers in the student's terms.

Heads differ in what their logits mean (softmax, sigmoid, Seesaw's classes times objectness) and in
their lists of classes. Where both agree the logits pass untouched.
"""

from __future__ import annotations

import copy
import difflib
import json
import mmap
import os.path as osp
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.registry import LOOPS
from mmengine.runner import TestLoop
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from ..datasets.annotations import leaves


class ClassMap:
    """The teacher's class for each class of the student, by name.

    Args:
        student: the student's class names, in the order of its head.
        teacher: the teacher's.
        names: where one class has two names: the student's name to the teacher's.

    Raises:
        ValueError: if a name in ``names`` is unknown, or the two have no class in common.
    """

    def __init__(
        self, student: Sequence[str], teacher: Sequence[str], names: dict[str, str] | None = None
    ) -> None:
        names = names or {}
        for given, known, who in (
            (names, student, 'student'),
            (names.values(), teacher, 'teacher'),
        ):
            for name in given:
                if name not in known:
                    near = difflib.get_close_matches(str(name), list(known), 3, 0)
                    raise ValueError(
                        f'distillation.classes.names: the {who} has no class {name!r}; near ones: '
                        + ', '.join(near)
                    )
        self.student, self.teacher = list(student), list(teacher)
        positions = {name: i for i, name in enumerate(self.teacher)}
        self.indices = [positions.get(names.get(name, name)) for name in self.student]
        if all(index is None for index in self.indices):
            raise ValueError(
                f'student ({_few(self.student)}) and teacher ({_few(self.teacher)}) have no class '
                "in common: name those that are the same, distillation.classes.names={'mine': "
                "'theirs'}, take another teacher, or turn off rcnn_cls and rcnn_bbox by their "
                'loss_weight=0 (and start=None)'
            )

    @property
    def same(self) -> bool:
        """Whether both have the same classes in the same order."""
        return self.indices == list(range(len(self.teacher)))

    @property
    def unknown(self) -> list[str]:
        """The student's classes that the teacher does not know."""
        return [n for n, index in zip(self.student, self.indices, strict=True) if index is None]

    def __str__(self) -> str:
        known = len(self.student) - len(self.unknown)
        text = f"{known} of the student's {len(self.student)} classes are among the teacher's "
        text += f"{len(self.teacher)}; the teacher's other {len(self.teacher) - known} count as "
        text += 'background'
        return text + (f'; it does not know {_few(self.unknown)}' if self.unknown else '')


class Answers:
    """Brings the RoI classification of both networks into one layout.

    What a head's logits mean is what MMDetection makes of them at test time: a softmax, or for
    Seesaw its classes times objectness. A student with a sigmoid loss is taught each class by
    itself.

    Args:
        student: the student's box head.
        teacher: the teacher's, of the same stage.
        classes: which class is which; None where the lists are the same.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, classes: ClassMap | None) -> None:
        self.kinds = [_kind(head) for head in (student, teacher)]
        self.classes = classes if classes is not None and not classes.same else None
        self.indices = self.classes.indices if self.classes else None

    @property
    def sigmoid(self) -> bool:
        """Whether the student's classes are taught each by itself."""
        return self.kinds[0] == 'sigmoid'

    def known(self, labels: Tensor) -> Tensor | None:
        """Of RoIs with these labels, those that the teacher can speak of; None means all."""
        if self.classes is None or not self.classes.unknown:
            return None
        table = torch.tensor([i is not None for i in self.indices or ()] + [True])
        return table.to(labels.device)[labels]

    def columns(self, labels: Tensor) -> Tensor:
        """The teacher's class for each label, of known ones."""
        if self.indices is None:
            return labels
        table = torch.tensor([-1 if i is None else i for i in self.indices])
        return table.to(labels.device)[labels]

    def student(self, logits: Tensor) -> Tensor:
        """The student's logits, (n, C + 1), background last; with its graph."""
        return _log_scores(logits, 'seesaw') if self.kinds[0] == 'seesaw' else logits

    def teacher(self, logits: Tensor) -> Tensor:
        """The teacher's logits in the layout of the student's, (n, C + 1)."""
        if self.indices is None and self.kinds[0] == self.kinds[1] != 'seesaw':
            return logits
        if self.indices is None and not self.sigmoid and self.kinds[1] != 'seesaw':
            return logits
        scores = _log_scores(logits, self.kinds[1])
        if self.indices is not None:
            taken = [i for i in self.indices if i is not None]
            others = [i for i in range(scores.size(1)) if i not in set(taken)]
            background = scores[:, others].logsumexp(1, keepdim=True)
            # A class that the teacher does not know has none of its probability.
            nothing = scores.new_full((len(scores), 1), -1e4)
            columns = [nothing if i is None else scores[:, i : i + 1] for i in self.indices]
            scores = torch.cat([*columns, background], 1)
        if self.sigmoid:
            # The logit of each probability.
            return scores - torch.log1p(-scores.exp().clamp(max=1 - 1e-6))
        return scores


def _kind(head: Any) -> str:
    if getattr(head, 'custom_activation', False):
        return 'seesaw'
    return 'sigmoid' if getattr(head.loss_cls, 'use_sigmoid', False) else 'softmax'


def _log_scores(logits: Tensor, kind: str) -> Tensor:
    """Logarithm of the scores that MMDetection gives at test time, (n, C + 1)."""
    logits = logits.float()
    if kind != 'seesaw':
        return logits.log_softmax(-1)
    classes, objectness = logits[:, :-2].log_softmax(-1), logits[:, -2:].log_softmax(-1)
    return torch.cat([classes + objectness[:, :1], objectness[:, 1:]], 1)


def check_num_classes(cfg: Config) -> None:
    """Compare ``num_classes`` of the heads with the classes of the training and validation data.

    MMDetection does not: with one too few the last class is trained as background, with more a
    validation ends in an index error, hours later.

    Raises:
        ValueError: naming the head, the data set and both numbers.
    """
    for key in ('train_dataloader', 'val_dataloader'):
        for dataset in leaves((cfg.get(key) or {}).get('dataset')):
            names = _things(dataset)
            for where, count in _counts(cfg.get('model'), 'model') if names else ():
                if count != len(names or ()):
                    raise ValueError(
                        f'{where}.num_classes is {count}, and the {key.split("_")[0]} data '
                        f'({dataset.get("ann_file")}) have {len(names or ())} classes '
                        f'({_few(names or ())}): set num_classes={len(names or ())}, or '
                        f'metainfo=dict(classes=...) of every data set to the {count} names'
                    )


def _things(dataset: Any) -> list[str] | None:
    """The classes of a data set's config that have boxes; None where only the data know them."""
    kind = dataset.get('type')
    known = DATASETS.get(kind) if isinstance(kind, str) else kind
    info = {**getattr(known, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
    names = info.get('thing_classes', info.get('classes'))
    if isinstance(names, str):
        return list_from_file(names) if osp.isfile(names) else None
    return None if names is None else list(names)


def _counts(node: Any, where: str) -> Iterator[tuple[str, int]]:
    """The place and ``num_classes`` of every head for boxes or masks in a model's config."""
    if isinstance(node, (list, tuple)):
        for i, each in enumerate(node):
            yield from _counts(each, f'{where}[{i}]')
    elif isinstance(node, dict):
        name = where.rsplit('.', 1)[-1].split('[')[0]
        if name in ('bbox_head', 'mask_head') and 'num_classes' in node:
            if not node.get('class_agnostic'):
                yield where, node['num_classes']
            return
        for key, value in node.items():
            yield from _counts(value, f'{where}.{key}')


def apply_classes(cfg: Config) -> Config:
    """Put the class names of both networks into ``model.distillation.classes``, if they differ.

    The student's are those of its training data; the teacher's those of its config's, or of its
    checkpoint's meta. Where either is not to be found the numbers of classes have to agree.

    Returns:
        The config itself, or a copy with the names.

    Raises:
        ValueError: the student's head and its data have different numbers of classes.
    """
    from ..models.teacher import load_config

    model = cfg.get('model') or {}
    distillation = model.get('distillation')
    if not distillation or 'teacher_config' not in model:
        return cfg
    check_num_classes(cfg)
    given = dict(distillation.get('classes') or {})
    student = given.get('student') or class_names(cfg)
    if student is None:
        return cfg
    teacher = given.get('teacher')
    if teacher is None:
        teacher_cfg = load_config(model['teacher_config'])
        count = head_classes(teacher_cfg.model)
        teacher = _fitting(class_names(teacher_cfg), count)
        if teacher is None:
            teacher = _fitting(_names_in(model.get('teacher_ckpt')), count)
    if teacher is None or list(teacher) == list(student):
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.model.distillation.classes = dict(given, student=list(student), teacher=list(teacher))
    return cfg


def class_names(cfg: Config) -> list[str] | None:
    """The classes of a config's training data (or test data, for a config that only tests)."""
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = (cfg.get(key) or {}).get('dataset')
        while isinstance(dataset, dict) and 'pipeline' not in dataset and 'dataset' in dataset:
            dataset = dataset['dataset']
        if not isinstance(dataset, dict):
            continue
        if 'classes' in (dataset.get('metainfo') or {}):
            return _list(dataset['metainfo']['classes'])
        kind = dataset.get('type')
        known = DATASETS.get(kind) if isinstance(kind, str) else kind
        if known is not None and 'classes' in getattr(known, 'METAINFO', {}):
            return _list(known.METAINFO['classes'])
    return None


def _fitting(names: list[str] | None, count: int | None) -> list[str] | None:
    # A config that leaves the names to its data set's default may train on others.
    return names if names is not None and count in (None, len(names)) else None


def _names_in(checkpoint: str | None) -> list[str] | None:
    if checkpoint is None or checkpoint == 'random':
        return None
    meta = CheckpointLoader.load_checkpoint(checkpoint, 'cpu').get('meta') or {}
    names = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
    return _list(names) if names else None


def head_classes(model: Any) -> int | None:
    """``num_classes`` of a model config's box head; None where it has none."""
    head = (model.get('roi_head') or {}).get('bbox_head')
    head = head[0] if isinstance(head, (list, tuple)) else head
    return (head or {}).get('num_classes')


def _list(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _few(names: Sequence[str]) -> str:
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')


def check_labels(dataset: Any) -> None:
    """Insist that a data set of COCO form numbers its classes in the order of their names.

    MMDetection numbers them in the order of the annotation file's categories, whatever the order in
    ``metainfo['classes']``; then every name stands for another class, and so would a class map.

    Args:
        dataset: a data set, or a wrapper round one or several.

    Raises:
        ValueError: with the order to write.
    """
    for path, named, numbered in _numbered(dataset):
        if numbered in (named, []):
            continue
        missing = [name for name in named if name not in numbered]
        raise ValueError(
            f'metainfo=dict(classes=({_few(named)})) does not fit {path}: '
            + (
                f'it has no category {_few(missing)}, so the classes behind it are numbered wrongly'
                if missing
                else 'MMDetection numbers classes in the order of the file'
            )
            + f'. Write classes=({", ".join(map(repr, numbered))})'
            + (' and as many num_classes' if missing else '')
        )


def check_same_labels(train: Any, val: Any) -> None:
    """Insist that validation numbers the classes as training does.

    Each data set of COCO form numbers them in the order of its own file's categories. Where the two
    files differ in that, detections of one class are scored as another's.

    Args:
        train: the data set that is trained on, or a wrapper round one or several.
        val: the one that is validated on; None where there is none.

    Raises:
        ValueError: naming both files and their orders.
    """
    for path, _, ours in _numbered(train):
        for other, _, theirs in _numbered(val):
            few, many = sorted((ours, theirs), key=len)
            if set(few) <= set(many) and few != many[: len(few)]:
                raise ValueError(
                    f'{path} has its categories in the order {_few(ours)}, and {other} in the '
                    f'order {_few(theirs)}: MMDetection numbers classes in the order of each file, '
                    'so what is trained as one class would be validated as another. Write both '
                    'files with the same categories in the same order'
                )


def _numbered(dataset: Any) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of each data set below wrappers: its file, its names, and those in the file's order."""
    for part in getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]:
        if part is not None:
            yield from _numbered(part)
    # Some subclasses bring the categories in an order of their own.
    own = getattr(type(dataset), 'load_data_list', None) is CocoDataset.load_data_list
    if own and osp.isfile(dataset.ann_file):
        named = list(dataset.metainfo['classes'])
        yield dataset.ann_file, named, [n for n in _categories(dataset.ann_file) if n in named]


def _categories(path: str) -> list[str]:
    """The names of a COCO file's categories; the file, half a gigabyte of COCO's, is not parsed."""
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(b'"categories"')
        start = content.find(b'[', at)
        if at < 0 or start < 0:
            return []
        text = content[start : start + 2**22].decode('utf-8', 'ignore')
    return [category['name'] for category in json.JSONDecoder().raw_decode(text)[0]]


@LOOPS.register_module()
class RelabelledTestLoop(TestLoop):
    """Tests a teacher among the student's classes: its other detections do not count.

    Args:
        labels: the teacher's class for each class of the student, None where it has none.
    """

    def __init__(self, *args: Any, labels: Sequence[int | None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.labels = {theirs: own for own, theirs in enumerate(labels) if theirs is not None}
        step = self.runner.model.test_step
        self.runner.model.test_step = lambda data: [self.relabel(s) for s in step(data)]

    def relabel(self, sample: Any) -> Any:
        """One image's detections, those of known classes, under the student's labels."""
        found = sample.pred_instances
        labels = torch.tensor([self.labels.get(i, -1) for i in found.labels.tolist()])
        labels = labels.to(found.labels).view(-1)
        sample.pred_instances = found[labels >= 0]
        sample.pred_instances.labels = labels[labels >= 0]
        return sample
