"""Faults that went by without a word: each is refused before the first step, or mended."""

import json
import re

import pairs
import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import RUNNERS
from PIL import Image
from test_check_pair import tool
from tiny import tiny_config

from mmkd import cli
from mmkd.datasets.annotations import check_annotations
from mmkd.datasets.labels import check_same_labels

train, new_pair = tool('train'), tool('new_pair')


@pytest.fixture
def config(tmp_path):
    made = Config.fromfile(tiny_config(tmp_path))
    made.runner_type = 'mmkd.DistillationRunner'
    made.experiment_name = tmp_path.name
    return made


# ------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    'around', [lambda d: d, lambda d: dict(type='RepeatDataset', times=2, dataset=d)]
)
def test_parts_of_one_training_set_number_the_classes_alike(config, tmp_path, around):
    """Without a validation file to compare with, too."""
    own = config.train_dataloader.dataset
    content = json.loads((tmp_path / 'data/train.json').read_text())
    joined = dict(type='ConcatDataset', datasets=[own, dict(own, ann_file='other.json')])
    other = tmp_path / 'data/other.json'
    other.write_text(json.dumps(content))
    check_same_labels(DATASETS.build(around(joined)), None)
    other.write_text(json.dumps({**content, 'categories': content['categories'][::-1]}))
    joined['datasets'][1]['metainfo'] = dict(classes=('blue', 'green', 'red'))
    said = r'train.json .* order red, green, blue, and .*other.json .* trained under two labels'
    with pytest.raises(ValueError, match=said):
        check_same_labels(DATASETS.build(around(joined)), None)


@pytest.mark.parametrize('turn', [1, 3, 5, 6, 8])
@pytest.mark.parametrize('annotated', ['unturned', 'turned'])
def test_annotations_of_unturned_photographs_are_warned_about(
    config, tmp_path, turn, annotated, monkeypatch
):
    path = tmp_path / 'data/train.json'
    content = json.loads(path.read_text())
    exif = Image.Exif()
    exif[0x0112] = turn
    size = (96, 64)
    for image in content['images']:
        image['file_name'] = image['file_name'].replace('.png', '.jpg')
        Image.new('RGB', size).save(tmp_path / 'data/images' / image['file_name'], exif=exif)
        turned = annotated == 'turned' and turn > 4
        image['width'], image['height'] = size[::-1] if turned else size
    path.write_text(json.dumps(content))
    said = []
    monkeypatch.setattr('mmkd.datasets.annotations.print_log', lambda text, **_: said.append(text))
    check_annotations(config.train_dataloader)
    assert any('EXIF' in text for text in said) == (turn > 4 and annotated == 'unturned')


# ------------------------------------------------------------------------------- the metrics


@pytest.mark.parametrize('monitor', ['bbox_mAP', 'coco/bbox_map'])
@pytest.mark.parametrize('what', ['EarlyStoppingHook', 'ReduceOnPlateauLR'])
def test_a_metric_that_is_waited_for_is_reported(config, what, monitor):
    waiting = dict(type=what, monitor=monitor, rule='greater', patience=1)
    if what == 'EarlyStoppingHook':
        config.default_hooks.early_stopping = waiting
    else:
        config.param_scheduler = [waiting]
    runner = RUNNERS.build(config)
    with pytest.raises(ValueError, match=rf'{what}.monitor={monitor} is none .*coco/bbox_mAP'):
        runner.train()
    assert runner.iter == 0


def test_a_metric_of_no_validation_is_not_waited_for(config):
    config.default_hooks.early_stopping = dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP')
    config.val_dataloader = config.val_cfg = config.val_evaluator = None
    with pytest.raises(ValueError, match='EarlyStoppingHook monitors coco/bbox_mAP.*no validation'):
        RUNNERS.build(config).train()


def test_a_metric_that_is_reported_trains(config):
    config.default_hooks.early_stopping = dict(
        type='EarlyStoppingHook', monitor='coco/bbox_mAP', rule='greater', patience=1
    )
    runner = RUNNERS.build(config)
    runner.train()
    assert runner.iter == 4


# ------------------------------------------------------------------------------- the configs


def pair(config, path, text=''):
    model = pairs.distilled(config.model, config.model, pairs.recipe())
    path.write_text(f'_base_ = {config.filename!r}\nmodel = {dict(model)!r}\n{text}')
    return path


def test_the_config_that_a_run_leaves_is_read_again(config, tmp_path):
    written = tmp_path / 'pair.py'
    recipe = tmp_path / 'recipe.py'
    recipe.write_text(f'distillation = {pairs.recipe()!r}\n')
    written.write_text(
        f'_base_ = [{config.filename!r}, {str(recipe)!r}]\n'
        "model = dict(type='mmkd.KnowledgeDistillationTwoStageDetector', teacher_ckpt='random',\n"
        f'    teacher_config={config.filename!r}, distillation=_base_.distillation)\n'
    )
    dumped = tmp_path / 'work_dirs/pair.py'
    dumped.parent.mkdir(exist_ok=True)
    Config.fromfile(written).dump(dumped)
    assert re.search('^distillation ?=', dumped.read_text(), re.MULTILINE)
    again = cli.load_config(train.parse_args([str(dumped)]))
    assert again.model.distillation == Config.fromfile(written).model.distillation
    # What a user writes beside the model of a pair is still refused.
    child = tmp_path / 'child.py'
    child.write_text(f'_base_ = {str(written)!r}\ndistillation = dict(start="teacher")\n')
    with pytest.raises(SystemExit, match='distillation stands beside the model'):
        cli.load_config(train.parse_args([str(child)]))


def test_a_teacher_config_of_2x_is_told_how_to_become_one_of_3x(config):
    model = dict(config.model)
    model.pop('data_preprocessor')
    old = dict(model=model, data=dict(samples_per_gpu=2))
    for teacher in (old, dict(model=dict(model, pretrained='torchvision://resnet18'))):
        student = pairs.distilled(config.model, config.model, pairs.recipe())
        student['teacher_config'] = teacher
        with pytest.raises(ValueError, match=r'of MMDetection 2\.x: .*data_preprocessor=dict'):
            pairs.build(student)


@pytest.mark.parametrize('term', ['hint', 'rcnn_cls', 'rpn_bbox'])
def test_an_argument_of_a_loss_that_there_is_not_gets_the_nearest(term):
    recipe = pairs.recipe()
    recipe[term]['weight'] = recipe[term].pop('loss_weight', 1.0)
    near = rf"distillation\.{term}: \w+ has no entry 'weight'; did you mean .*loss_weight"
    with pytest.raises(ValueError, match=near):
        pairs.distil(pairs.fpn(), distillation=recipe)


def test_a_student_in_the_new_style_is_told_another_way(config, tmp_path):
    parts, student = tmp_path / 'parts.py', tmp_path / 'new_style.py'
    parts.write_text(
        'from mmdet.models.detectors.faster_rcnn import FasterRCNN\n'
        f'model = {dict(config.model.to_dict(), type="X")!r}\nmodel["type"] = FasterRCNN\n'
    )
    student.write_text(
        'from mmengine.config import read_base\nwith read_base():\n    from .parts import *\n'
    )
    out = tmp_path / 'pair.py'
    arguments = ['--teacher', str(config.filename), '--teacher-ckpt', str(parts), '--student']
    with pytest.raises(SystemExit, match=r'new_style.py is in MMEngine.s new style'):
        new_pair.main([*arguments, str(student), '--out', str(out)])
    assert not out.exists()
