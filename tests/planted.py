"""Bad input, planted one at a time: annotation files, images and recipes that users have had.

Each row is a name, what is planted, and what has to come of it: ``CLEAN`` (a step of training with
the loss of the file without what was planted), ``TRAINS`` (a step with a finite loss), or a regular
expression of the refusal. ``warns`` is one of the warning.
"""

import copy
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pairs
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from PIL import Image
from tiny import CLASSES, write_tiny_dataset

from mmkd.datasets import annotations

CLEAN, TRAINS = 'clean', 'trains'
NAN, INF = float('nan'), float('inf')


@dataclass
class Row:
    """One planted case."""

    name: str
    plant: Callable[[Any], Any]
    expected: str
    warns: str = ''


def _set(name: str, index: int, /, **values: Any) -> Callable[[dict], None]:
    return lambda coco: coco[name][index].update(values)


def _drop(name: str, index: int, key: str) -> Callable[[dict], None]:
    def plant(coco: dict) -> None:
        del coco[name][index][key]

    return plant


def _more(**values: Any) -> Callable[[dict], None]:
    """One more annotation, in the first image."""
    new = dict(id=9000, image_id=0, category_id=1, bbox=[5, 5, 20, 20], area=400, iscrowd=0)
    return lambda coco: coco['annotations'].append({**new, **values})


def _many(coco: dict) -> None:
    rng = random.Random(0)
    for i in range(2000):
        box = [rng.uniform(0, 40), rng.uniform(0, 40), 16, 16]
        _more(id=10_000 + i, bbox=box, area=256)(coco)


def _all(name: str, /, **values: Any) -> Callable[[dict], None]:
    return lambda coco: [entry.update(values) for entry in coco[name]] and None


def _string_ids(coco: dict) -> None:
    for image in coco['images']:
        image['id'] = str(image['id'])


def _all_strings(coco: dict) -> None:
    _string_ids(coco)
    for annotation in coco['annotations']:
        annotation['image_id'] = str(annotation['image_id'])


def _as_list(coco: dict) -> list:
    return coco['annotations']


def _without(name: str) -> Callable[[dict], dict]:
    return lambda coco: {key: value for key, value in coco.items() if key != name}


def _image(save: Callable[[Path], None]) -> Callable[[Any], None]:
    def plant(coco: dict) -> None:
        save(Path(coco['root']) / 'images' / coco['images'][0]['file_name'])

    return plant


def _array(shape: tuple, dtype: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(np.full(shape, 99, dtype)).save(path, 'PNG')


ANNOTATIONS = [
    Row('nothing', lambda coco: None, CLEAN),
    Row('empty file', lambda coco: '', r'train annotations .*\.json are an empty file'),
    Row('not JSON', lambda coco: 'images: 1', r'\.json are not JSON \(Expecting value'),
    Row('half a file', lambda coco: json.dumps(_without('root')(coco))[:500], 'are not JSON'),
    Row('binary', lambda coco: b'\xff\xd8\xff\xe0', 'are not JSON'),
    Row('a list', _as_list, 'are no COCO file: images is no list of dicts'),
    Row('a number', lambda coco: '3', 'are no COCO file'),
    Row('no images key', _without('images'), 'images is no list of dicts'),
    Row('no annotations key', _without('annotations'), 'annotations is no list of dicts'),
    Row('no categories key', _without('categories'), 'categories is no list of dicts'),
    Row('images is a dict', lambda coco: {**coco, 'images': {}}, 'images is no list of dicts'),
    Row('no image', lambda coco: {**coco, 'images': []}, 'images is empty'),
    Row('no category', lambda coco: {**coco, 'categories': []}, "categories has no 'red'"),
    Row('a class missing', lambda coco: coco['categories'].__delitem__(1),
        r"categories has no 'green' \(1 of 3 classes.*it has red, blue"),
    Row('a category twice', _set('categories', 1, name='red'), r"categories\[1\].name='red' is ta"),
    Row('a category id twice', _set('categories', 1, id=1), r'categories\[1\].id=1 is taken twice'),
    Row('an image id twice', _set('images', 1, id=0), r'images\[1\].id=0 is taken twice'),
    Row('a box id twice', _set('annotations', 1, id=1), r'annotations\[1\].id=1 is taken twice'),
    Row('an id that is a list', _set('images', 1, id=[1]), r'images\[1\].id=\[1\] must be'),
    Row('image ids are words', _string_ids, "the first has image_id=0, the first image id='0'"),
    Row('all ids are words', _all_strings, CLEAN),
    Row('a category id is a word', _set('annotations', 0, category_id='1'), "category_id='1'"),
    Row('an unknown category', _set('annotations', 1, category_id=77),
        r'annotations\[1\] \(id 2\) has category_id=77, which is no id in categories'),
    Row('a category that is a list', _set('annotations', 1, category_id=[1]), r'category_id=\[1\]'),
    *[
        Row(f'images without {key}', _drop('images', 1, key), rf"images\[1\] has no '{key}'")
        for key in ('id', 'file_name', 'width', 'height')
    ],
    *[
        Row(f'box without {key}', _drop('annotations', 1, key), rf"annotations\[1\] has no '{key}'")
        for key in ('id', 'image_id', 'category_id', 'bbox', 'area')
    ],
    Row('category without name', _drop('categories', 0, 'name'), r"categories\[0\] has no 'name'"),
    Row('box without iscrowd', _drop('annotations', 0, 'iscrowd'), CLEAN),
    Row('width is 0', _set('images', 1, width=0), r'width and height \[0.0, 64.0\]'),
    Row('height is negative', _set('images', 1, height=-4), r'width and height \[64.0, -4.0\]'),
    Row('width is a word', _set('images', 1, width='64'), "width='64', which is no finite number"),
    Row('height is NaN', _set('images', 1, height=NAN), 'height=nan, which is no finite number'),
    Row('file name is a number', _set('images', 1, file_name=7), r'images\[1\].file_name=7'),
    *[
        Row(f'bbox {name}', _set('annotations', 1, bbox=box),
            r'annotations\[1\] \(id 2\) has bbox=.*must be four finite numbers')
        for name, box in {
            'NaN': [NAN, 0, 20, 20], 'infinite': [0, 0, INF, 20], 'of 3': [0, 0, 20], 'None': None,
            'of words': ['0', '0', '20', '20'], 'of 5': [0, 0, 20, 20, 0], 'empty': [],
            'a dict': {'x': 0}, 'with a None': [0, 0, None, 20], 'a word': '0,0,20,20',
            'with a bool': [True, 0, 20, 20],
        }.items()
    ],
    Row('area NaN', _set('annotations', 1, area=NAN), 'has area=nan'),
    Row('area None', _set('annotations', 1, area=None), 'has area=None'),
    Row('no width', _more(bbox=[5, 5, 0, 20]), CLEAN, '1 of .* have a width or height below 1'),
    Row('negative width', _more(bbox=[25, 5, -20, 20]), CLEAN, 'id 9000, bbox .*dropped|dropped'),
    Row('half a pixel', _more(bbox=[5, 5, 0.5, 20]), CLEAN, 'below 1 pixel'),
    Row('no area', _more(area=0), CLEAN, 'have no area: they are dropped'),
    Row('negative area', _more(area=-9), CLEAN, 'have no area'),
    Row('right of the image', _more(bbox=[90, 5, 20, 20]), CLEAN, 'lie outside their image'),
    Row('left of the image', _more(bbox=[-90, 5, 20, 20]), CLEAN, 'lie outside their image'),
    Row('half outside', _more(bbox=[54, 5, 20, 20]), TRAINS, 'reach out of their image'),
    Row('larger than the image', _more(bbox=[-50, -50, 500, 500]), TRAINS, 'reach out of'),
    Row('huge', _more(bbox=[0, 0, 1e30, 1e30]), TRAINS, 'reach out of their image'),
    Row('of an unknown image', _more(image_id=777), CLEAN, 'that the file does not have'),
    Row('ignored', _more(ignore=1), CLEAN),
    Row('a crowd', _more(iscrowd=1), TRAINS),
    Row('2,000 boxes', _many, TRAINS),
    Row('all corners', _all('annotations', bbox=[70, 70, 64, 64]), 'none of the .* boxes has an'),
    Row('all flat', _all('annotations', bbox=[1, 1, 0, 9]), 'so nothing would be learned'),
    Row('no boxes', lambda coco: {**coco, 'annotations': []}, TRAINS, 'annotations is empty'),
    Row('a whole batch of background', lambda coco: {**coco, 'annotations': [
        {**coco['annotations'][-1], 'image_id': 5}]}, TRAINS),
    Row('another size', _set('images', 0, width=640, height=480), TRAINS, r'\(64, 64\), the file'),
    Row('an image missing', _set('images', 1, file_name='gone.png'), '1 of .* files do not exist'),
    Row('a folder missing', _set('images', 1, file_name='x/y.png'), 'the first is .*x/y.png'),
    Row('wrong case', _set('images', 1, file_name='TRAIN_001.png'), 'the first is .*TRAIN_001.png'),
    Row('zero bytes', _image(lambda path: path.write_bytes(b'')), 'train_000.png cannot be read'),
    Row('text as an image', _image(lambda path: path.write_text('no')), 'cannot be read'),
    Row('grey', _image(_array((64, 64), np.uint8)), TRAINS),
    Row('RGBA', _image(_array((64, 64, 4), np.uint8)), TRAINS),
    Row('16 bits', _image(_array((64, 64), np.uint16)), TRAINS),
]  # fmt: skip


def _term(term: str, /, **values: Any) -> Callable[[dict], None]:
    return lambda recipe: recipe[term].update(values)


def _entry(**values: Any) -> Callable[[dict], None]:
    return lambda recipe: recipe.update(values)


def _hint(*entries: Any) -> Callable[[dict], None]:
    return _term('hint', pairs=list(entries))


_PAIR = dict(student='neck[0]', teacher='neck[0]')

RECIPES = [
    Row('nothing', lambda recipe: None, TRAINS),
    Row('an unknown term', _entry(rcn_cls={}), "no entry 'rcn_cls'; did you mean rcnn_cls"),
    Row('a term that is a word', _entry(rcnn_cls='on'), "rcnn_cls='on' must be a loss"),
    Row('an unknown loss', _term('rcnn_cls', type='SoftLoss'), 'distillation.rcnn_cls: .*SoftLoss'),
    Row('no type', lambda r: r['rcnn_cls'].__delitem__('type'), 'rcnn_cls: type=None must name'),
    Row('type is empty', _term('hint', type=''), "distillation.hint: type='' must name a loss"),
    Row('type is a number', _term('hint', type=3), 'distillation.hint: type=3 must name a loss'),
    Row('a hint loss for classes', _term('rcnn_cls', type='HintL2Loss'), 'distillation.rcnn_cls:'),
    Row('another loss for classes', lambda r: r.update(rcnn_cls=dict(type='FocalLoss')),
        'distillation.rcnn_cls: type=FocalLoss is no loss for this term: take WeightedSoftCELoss'),
    Row('a layer for a loss', lambda r: r.update(hint=dict(type='FPN')), 'distillation.hint: '),
    Row('the soft loss for hints', lambda r: r.update(hint=dict(type='WeightedSoftCELoss')),
        'distillation.hint: type=WeightedSoftCELoss is no loss for this term: take HintL2Loss'),
    Row('a key of no loss', _term('rcnn_cls', temprature=2), 'distillation.rcnn_cls: .*temprature'),
    *[
        Row(f'{term} {key}={value}', _term(term, **{key: value}),
            rf'distillation.{term}: .*{key}={re.escape(repr(value))}')
        for term, key, value in (
            ('rcnn_cls', 'loss_weight', -1), ('rcnn_cls', 'loss_weight', NAN),
            ('rcnn_cls', 'loss_weight', INF), ('rcnn_cls', 'loss_weight', '1'),
            ('rcnn_cls', 'loss_weight', True), ('rcnn_cls', 'temperature', 0),
            ('rcnn_cls', 'temperature', -1), ('rcnn_cls', 'temperature', INF),
            ('rcnn_cls', 'hard_weight', 2), ('rcnn_cls', 'hard_weight', None),
            ('rpn_cls', 'background_weight', -1), ('rcnn_bbox', 'margin', NAN),
            ('rcnn_bbox', 'margin', '0'), ('rpn_bbox', 'loss_weight', None),
            ('rpn_bbox', 'margin', INF), ('hint', 'loss_weight', [1]),
            ('hint', 'reduction', 'max'), ('hint', 'share', -1), ('hint', 'share', 'a'),
            ('hint', 'share', NAN), ('hint', 'share', 0),
        )
    ],
    *[
        Row(f'schedule {value}', _term('hint', schedule=value), rf'hint.schedule.*{say}')
        for value, say in (
            (dict(begin=5, end=2), 'end must come after begin'), (dict(begin=-1), 'begin=-1'),
            (dict(begin='5'), "begin='5' must be a whole number"), (dict(warmup=NAN), 'warmup=nan'),
            (dict(begin=1.5), 'begin=1.5'), (dict(by_epoch='no'), "by_epoch='no'"),
            (dict(start=5), "no entry 'start'"), (5, '=5 must be a dict'), (None, '=None must be'),
        )
    ],
    Row('hint at nothing', _hint('nek'), "hint at 'nek': the student has no such.*near ones: neck"),
    Row('hint beyond', _hint('neck[9]'), r"hint 'neck\[9\]': neck has 5 outputs"),
    Row('hint below 0', _hint('neck[-1]'), r"hint 'neck\[-1\]' is no path"),
    Row('hint twice', _hint('neck', 'neck'), "distillation.hint.pairs has 'neck' twice"),
    Row('hint twice by another name', _hint('neck', _PAIR), r'joins neck\[0\] and neck\[0\] twice'),
    Row('no hint', _hint(), 'distillation.hint.pairs is empty'),
    Row('hint of one side', _hint(dict(student='neck')), 'hint pair .*must be a path, or dict'),
    Row('hint is a number', _hint(3), 'hint pair 3 must be a path'),
    Row('hint is None', _hint(None), 'hint pair None must be a path'),
    Row('hint path is a number', _hint(dict(student=3, teacher='neck')), 'hint 3 is no path'),
    Row('pairs is a word', _term('hint', pairs='neck'), "hint.pairs='neck' must be a list"),
    Row('an adapter of no kind', _hint({**_PAIR, 'adapter': 'mlp'}), "adapter 'mlp' must be one"),
    Row('an adapter that is a list', _hint({**_PAIR, 'adapter': []}), r'adapter \[\] must be one'),
    Row('start', _entry(start='student'), "distillation.start='student' must be"),
    Row('accelerate is a switch', _entry(accelerate=True), 'accelerate=True must be a dict'),
    Row('accelerate key', _entry(accelerate=dict(half=True)), "accelerate has no entry 'half'"),
    Row('accelerate dtype', _entry(accelerate=dict(dtype='int8')), "dtype='int8' must be None"),
    Row('accelerate list', _entry(accelerate=dict(dtype=[])), r'dtype=\[\] must be None'),
    Row('resolution of one', _entry(resolution=dict(student=(9, 9))), 'no scale for the teacher'),
    Row('resolution is a pair', _entry(resolution=(9, 9)), r'resolution=\(9, 9\) must be dict'),
    Row('resolution of words', _entry(resolution=dict(student='a', teacher='b')), "student='a'"),
    Row('resolution below 0', _entry(resolution=dict(student=(-1, 2), teacher=(2, 2))), 'student='),
    Row('resolution upside down', _entry(resolution=dict(student=(64, 64), teacher=(32, 32))),
        'the teacher sees fewer pixels'),
    Row('classes is a list', _entry(classes=['red']), r"classes=\['red'\] must be a dict"),
    Row('classes of the teacher', _entry(classes=dict(teacher=['a', 'b', 'c'])), 'teacher alone'),
    Row('classes too few', _entry(classes=dict(student=['a'], teacher=['a', 'b', 'c'])),
        'distillation.classes.student has 1 names, the student 3 classes'),
    Row('a class twice', _entry(classes=dict(student=['a', 'a'], teacher=['a'])), "'a' twice"),
    Row('classes of numbers', _entry(classes=dict(student=[1], teacher=['a'])), 'list of names'),
    Row('no class in common', _entry(classes=dict(student=list('abc'), teacher=list('xyz'))),
        'have no class in common'),
    Row('names of nobody', _entry(classes=dict(student=list('abc'), teacher=list('xyz'),
        names=dict(d='x'))), "the student has no class 'd'"),
    Row('names is a list', _entry(classes=dict(names=['a'])), 'classes.names=.* must be a dict'),
]  # fmt: skip


class Planter:
    """Plants rows of ANNOTATIONS below a directory, and trains one step of one small pair on it."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.root = write_tiny_dataset(self.directory / 'whole', train=6, val=1)
        self.coco = json.loads((self.root / 'train.json').read_text())
        self.model = pairs.distil(pairs.fpn())
        self.clean: float | None = None

    def check(self, row: Row) -> str | None:
        """What did not go as the row says; None if it did."""
        root = self.root
        if row.name in IMAGE_ROWS:
            root = self.directory / row.name
            shutil.copytree(self.root, root)
        coco = {**copy.deepcopy(self.coco), 'root': str(root)}
        planted = row.plant(coco)
        planted = coco if planted is None else planted
        if not isinstance(planted, (str, bytes)):
            planted = json.dumps(planted)
        path = root / 'planted.json'
        path.write_bytes(planted if isinstance(planted, bytes) else planted.encode())
        dataset = dict(
            type='CocoDataset', data_root=str(root), ann_file=path.name,
            data_prefix=dict(img='images/'), metainfo=dict(classes=CLASSES),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                      dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs')],
        )  # fmt: skip
        texts: list[str] = []
        with patch.object(annotations, 'print_log', lambda text, **_: texts.append(text)):
            try:
                annotations.check_annotations(dict(dataset=dataset))
            except ValueError as error:
                return _differs(row, str(error))
        if row.expected not in (CLEAN, TRAINS):
            return 'it was not refused'
        if bool(row.warns) != bool(texts) or not all(re.search(row.warns, t) for t in texts):
            return f'warned {texts}'
        loss = self.step(dataset)
        if row.name == 'nothing':
            self.clean = loss
        if row.expected == CLEAN and loss != self.clean:
            return f'the loss is {loss}, of the clean file {self.clean}'
        return None if math.isfinite(loss) else f'the loss is {loss}'

    def step(self, dataset: dict) -> float:
        """The loss of one step on the first four images, with its backward."""
        built = DATASETS.build(dataset)
        batch = pseudo_collate([built[i] for i in range(4)])
        total = pairs.total(self.model, pairs.losses(self.model, batch))
        self.model.zero_grad()
        total.backward()
        if not all(p.grad.isfinite().all() for p in self.model.parameters() if p.grad is not None):
            return math.nan
        return total.item()


IMAGE_ROWS = {'zero bytes', 'text as an image', 'grey', 'RGBA', '16 bits'}


def _differs(row: Row, message: str) -> str | None:
    if row.expected in (CLEAN, TRAINS) or not re.search(row.expected, message):
        return f'it was refused: {message}'
    return None


def check_recipe(row: Row) -> str | None:
    """What did not go as a row of RECIPES says; None if it did."""
    recipe = pairs.recipe()
    row.plant(recipe)
    try:
        model = pairs.distil(pairs.fpn(), distillation=recipe)
    except ValueError as error:
        return _differs(row, str(error))
    if row.expected != TRAINS:
        return 'it was not refused'
    loss = pairs.total(model, pairs.losses(model)).item()
    return None if math.isfinite(loss) else f'the loss is {loss}'


_VALUES = [None, True, 0, 1, -1, 0.5, NAN, INF, '', 'neck', [], ['neck'], {}, {'a': 1}, (1, 2), 3]


def mutate(seed: int) -> dict:
    """A recipe with one to three entries, at any depth, replaced, removed, renamed or added."""
    rng = random.Random(seed)
    recipe = pairs.recipe()
    recipe['hint']['pairs'] = [dict(student='neck[1]', teacher='neck[1]', adapter='conv1x1')]
    recipe['rcnn_cls']['schedule'] = dict(begin=0, warmup=0)
    recipe['accelerate'] = dict(dtype=None)
    recipe['classes'] = dict(student=list(CLASSES), teacher=list(CLASSES), names={})
    for _ in range(rng.randint(1, 3)):
        place: Any = recipe
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = rng.choice(keys) if keys else 0
            below = place[key] if keys else None
            if not isinstance(below, (dict, list)) or not below or rng.random() < 0.3:
                break
            place = below
        value = copy.deepcopy(rng.choice(_VALUES))
        if isinstance(place, list):
            place[key : key + 1] = [[value], [], [value, value]][rng.randrange(3)]
        elif (how := rng.randrange(4)) == 0:
            place.pop(key, None)
        elif how == 1:
            place[f'{key}x'] = place.pop(key, value)
        else:
            place[key] = value
    return recipe


def fuzz(seed: int) -> str | None:
    """What went wrong with ``mutate(seed)``; None if it builds or is refused in words."""
    recipe = mutate(seed)
    try:
        pairs.distil(pairs.fpn(), distillation=recipe)
    except ValueError as error:
        if not re.search('distillation|hint|adapter', str(error)):
            return f'seed {seed}: it names no key: {error}'
    except Exception as error:  # what is looked for
        return f'seed {seed}: {type(error).__name__}: {error}'
    return None
