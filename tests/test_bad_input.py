"""Bad input trains rightly or is refused in a sentence, before the first step."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from planted import ANNOTATIONS, RECIPES, Planter, check_recipe, fuzz
from tiny import tiny_config

from mmkd.annotations import AnnotationError, check_annotations
from mmkd.runner import DistillationRunner


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
