"""Bad input trains rightly or is refused in a sentence, before the first step."""

import json
from pathlib import Path
from unittest.mock import patch

import pairs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.config import Config
from planted import ANNOTATIONS, RECIPES, Planter, check_recipe, fuzz
from tiny import tiny_config

from mmkd.datasets import annotations
from mmkd.datasets.annotations import AnnotationError, check_annotations, check_evaluator
from mmkd.engine.runner import DistillationRunner


@pytest.fixture(scope='module')
def planter(tmp_path_factory):
    planter = Planter(tmp_path_factory.mktemp('planted'))
    assert planter.check(ANNOTATIONS[0]) is None
    return planter


@pytest.mark.parametrize('row', ANNOTATIONS, ids=lambda row: row.name)
def test_an_annotation_file(planter, row):
    assert planter.check(row) is None


@pytest.mark.parametrize('row', RECIPES, ids=lambda row: row.name)
def test_a_recipe(row):
    assert check_recipe(row) is None


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_any_recipe_builds_or_is_refused_by_its_key(seed):
    assert fuzz(seed) is None


def test_a_file_that_does_not_exist_is_named_behind_every_wrapper(tmp_path):
    leaf = dict(type='CocoDataset', data_root=str(tmp_path), ann_file='gone.json')
    for dataset in (
        leaf,
        dict(type='RepeatDataset', times=2, dataset=leaf),
        dict(type='ConcatDataset', datasets=[leaf]),
        dict(type='ClassBalancedDataset', dataset=dict(type='ConcatDataset', datasets=[leaf])),
        dict(type='MultiImageMixDataset', pipeline=[], dataset=leaf),
    ):
        with pytest.raises(AnnotationError, match='val annotations .*gone.json do not exist'):
            check_annotations(dict(dataset=dataset), 'val')
    with pytest.raises(AnnotationError, match='is a directory'):
        check_annotations(dict(dataset={**leaf, 'ann_file': ''}))


@pytest.mark.parametrize(
    ('key', 'near'), [('distilation', r'distillation\?'), ('teacher_chkpt', 'teacher_ckpt or ')]
)
def test_a_misspelt_key_of_the_model_is_answered_with_the_nearest(key, near):
    model = dict(pairs.distilled(pairs.fpn(), pairs.fpn(), pairs.off()), **{key: None})
    with pytest.raises(ValueError, match=f"model has no entry '{key}'; did you mean {near}"):
        MODELS.build(model)


def test_a_one_stage_student_is_named():
    model = pairs.distilled(pairs.fpn(), pairs.fpn(), pairs.off())
    model['bbox_head'] = model.pop('roi_head')
    with pytest.raises(ValueError, match='the student is a one-stage detector.* the teacher'):
        MODELS.build(model)


def test_an_evaluator_has_the_annotations_of_the_images(tmp_path):
    config = Config.fromfile(tiny_config(tmp_path))
    loader, metric = config.val_dataloader, config.val_evaluator
    check_evaluator(metric, loader, 'val')
    copy = tmp_path / 'copy.json'
    content = json.loads(Path(metric.ann_file).read_text())
    content['images'].append({'id': 99, 'file_name': 'more.png', 'width': 64, 'height': 64})
    copy.write_text(json.dumps(content))
    check_evaluator([dict(metric, ann_file=str(copy))], loader, 'val')
    # Labels that were mended.
    content['annotations'][0]['bbox'][0] += 1
    copy.write_text(json.dumps(content))
    with patch.object(annotations, '_warn') as warn:
        check_evaluator(dict(metric, ann_file=str(copy)), loader, 'val')
    assert 'in 1 of 8 images, first in val_000.png' in warn.call_args.args[0]
    # The same names and numbers, as those of another split can be; boxes that differ.
    for entry in content['annotations']:
        entry['bbox'][0] += 1
    copy.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match='8 of 8 are not in it, or with other boxes'):
        check_evaluator(dict(metric, ann_file=str(copy)), loader, 'val')
    with pytest.raises(AnnotationError, match='val_evaluator.ann_file=.*gone.json does not exist'):
        check_evaluator(dict(metric, ann_file=str(tmp_path / 'gone.json')), loader, 'val')
    config.val_evaluator.ann_file = str(copy)
    runner = DistillationRunner.from_cfg(config)
    with pytest.raises(AnnotationError, match='val_evaluator.ann_file=.*Name one file in both'):
        runner.train()


def test_a_test_names_the_file_that_it_lacks(tmp_path):
    config = Config.fromfile(tiny_config(tmp_path))
    config.test_dataloader.dataset.ann_file = 'gone.json'
    runner = DistillationRunner.from_cfg(config)
    with pytest.raises(AnnotationError, match='test annotations .*gone.json do not exist'):
        runner.test()


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        ({'train_dataloader.dataset.filter_cfg': dict(min_size=1000)}, 'a data set is empty'),
        (
            {'train_dataloader.batch_size': 64, 'train_dataloader.drop_last': True,
             'train_dataloader.batch_sampler': None},
            'of 16 images is too small for a batch: batch_size=64, drop_last=True',
        ),
    ],
)  # fmt: skip
def test_data_that_give_no_batch(tmp_path, options, says):
    config = Config.fromfile(tiny_config(tmp_path))
    config.merge_from_dict(options)
    config.experiment_name = f'empty_{tmp_path.name}'
    with pytest.raises(ValueError, match=says):
        DistillationRunner.from_cfg(config).train()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_run_stops_before_its_first_step(tmp_path, split):
    """The validation file too: it is read for the first time after a whole epoch."""
    config = Config.fromfile(tiny_config(tmp_path))
    config.experiment_name = f'bad_{tmp_path.name}'
    path = tmp_path / 'data' / f'{split}.json'
    coco = json.loads(path.read_text())
    coco['annotations'][0]['bbox'][2] = float('nan')
    path.write_text(json.dumps(coco))
    runner = DistillationRunner.from_cfg(config)
    with pytest.raises(AnnotationError, match=rf'{split} annotations .*bbox=.*nan'):
        runner.train()
    assert runner.iter == 0
