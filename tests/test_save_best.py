"""The best checkpoint: what it is chosen by is looked for before the run, not behind an epoch."""

from pathlib import Path

import pairs
import pytest
import zoo
from mmdet.evaluation import (
    CityScapesMetric,
    CocoMetric,
    CocoPanopticMetric,
    LVISMetric,
    SemSegMetric,
    VOCMetric,
)
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from tiny import tiny_config

from mmkd import DistillationRunner
from mmkd.engine.save_best import check_metrics, check_predictions


def coco(**kwargs):
    return Evaluator([CocoMetric(**kwargs)])


class Own(BaseMetric):
    def process(self, data_batch, data_samples):
        raise NotImplementedError

    compute_metrics = process


@pytest.mark.parametrize(
    ('wanted', 'evaluator', 'near'),
    [
        ('coco/bbox_map', coco(), 'coco/bbox_mAP, '),
        ('bbox_mAP', coco(), 'coco/bbox_mAP, '),
        ('coco/segm_mAP', coco(), 'coco/bbox_mAP, '),
        ('coco/bbox_mAP_75', coco(metric_items=['mAP', 'mAP_50']), 'coco/bbox_mAP'),
        ('coco/bbox_mAP', coco(metric='proposal'), 'coco/AR'),
        ('coco/AR@100', coco(metric=['bbox', 'proposal']), None),
        ('coco/AR@10', coco(metric='proposal', metric_items=['AR@300']), 'coco/AR@300'),
        ('coco/bbox_mAP', coco(prefix='val'), 'val/bbox_mAP, '),
        ('coco/bbox_mAP', Evaluator([VOCMetric()]), 'pascal_voc/...'),
        ('mAP', Evaluator([VOCMetric(), CocoMetric()]), 'coco/bbox_mAP, '),
        ('coco/bbox_mAP', coco(), None),
        ('coco/segm_mAP_s', coco(metric=['bbox', 'segm']), None),
        ('coco/seven_precision', coco(classwise=True), None),
        ('coco/bbox_mAP', coco(metric='proposal_fast'), 'coco/AR'),
        ('coco/AR@10', coco(metric='proposal_fast', proposal_nums=(10, 20)), None),
        ('pascal_voc/mAP', Evaluator([VOCMetric()]), None),
        ('anything', Evaluator([Own()]), None),
        ('anything', None, None),
    ],
)
def test_a_name_that_no_metric_gives_is_refused_with_the_nearest(wanted, evaluator, near):
    if near is None:
        check_metrics([wanted], evaluator)
        return
    with pytest.raises(ValueError, match=f'save_best={wanted} is none of') as error:
        check_metrics([wanted], evaluator)
    assert f'Nearest: {near}' in str(error.value)


MASKS = r'scores masks \(segm\), and this detector predicts none'
SCORED = {
    'boxes': (coco(metric='bbox'), None),
    'masks': (coco(metric=['bbox', 'segm']), MASKS + ".*metric=.'bbox'."),
    'masks alone': (coco(metric='segm'), MASKS + ".*metric=.'bbox'."),
    'masks of LVIS': (LVISMetric, MASKS),
    'masks of Cityscapes': (CityScapesMetric, MASKS),
    'masks among others': (Evaluator([VOCMetric(), CocoMetric(metric=['segm', 'bbox'])]), MASKS),
    'masks that are written only': (
        coco(metric='segm', format_only=True, outfile_prefix='x'), None),
    'proposals of an RPN': (coco(metric='proposal_fast'), "metric='proposal' gives"),
    'recall': (coco(metric='proposal'), None),
    'a panoptic segmentation': (CocoPanopticMetric, "take type='CocoMetric'"),
    'a semantic segmentation': (SemSegMetric, "take type='CocoMetric'"),
    'anything else': (Evaluator([Own()]), None),
    'nothing': (None, None),
}  # fmt: skip


def evaluator_of(given):
    """A metric class is made without the packages and files that its constructor wants."""
    if not isinstance(given, type):
        return given
    metric = given.__new__(given)
    metric.metrics, metric.tmp_dir = ['bbox', 'segm'], None
    return Evaluator([metric])


@pytest.mark.parametrize('what', SCORED)
def test_what_is_scored_is_predicted(what):
    given, says = SCORED[what]
    model = pairs.distil(pairs.fpn())
    if says is None:
        check_predictions(model, evaluator_of(given), 'val_evaluator')
        return
    with pytest.raises(ValueError, match='val_evaluator: .*' + says):
        check_predictions(model, evaluator_of(given), 'val_evaluator')


def test_masks_of_a_mask_head_or_of_ones_own_prediction_are_scored(monkeypatch):
    for name in ('Mask R-CNN', 'PointRend', 'HTC'):
        check_predictions(pairs.build(zoo.tiny(name)), coco(metric='segm'), 'val_evaluator')
    model = pairs.distil(pairs.fpn())

    class OwnHead(type(model.roi_head)):
        def predict(self, *args):
            raise NotImplementedError

    model.roi_head.__class__ = OwnHead
    check_predictions(model, coco(metric='segm'), 'val_evaluator')
    check_predictions(pairs.build(zoo.tiny('RetinaNet')), coco(metric='segm'), 'val_evaluator')


@pytest.mark.parametrize('who', ['val_evaluator', 'test_evaluator'])
def test_a_score_of_masks_stops_before_the_first_step(tmp_path, who):
    config = Config.fromfile(tiny_config(tmp_path, 'run'))
    config[who] = dict(config.val_evaluator, metric=['bbox', 'segm'])
    config.experiment_name = tmp_path.name
    runner = DistillationRunner.from_cfg(config)
    with pytest.raises(ValueError, match=f'{who}: CocoMetric ' + MASKS):
        runner.train() if who == 'val_evaluator' else runner.test()
    assert runner.iter == 0


def run(tmp_path, **changes):
    config = Config.fromfile(tiny_config(tmp_path, 'run'))
    config.merge_from_dict(changes)
    config.experiment_name = tmp_path.name
    runner = DistillationRunner.from_cfg(config)
    runner.train()
    (log,) = Path(config.work_dir).glob('*/*.log')
    return runner, log.read_text()


SAVE_BEST = 'default_hooks.checkpoint'


def test_a_misspelt_name_stops_before_the_first_step(tmp_path):
    kind = dict(type='CheckpointHook', save_best='coco/bbox_map')
    with pytest.raises(ValueError, match='Nearest: coco/bbox_mAP, '):
        run(tmp_path, **{SAVE_BEST: kind})
    assert not list(tmp_path.glob('**/*.pth'))


def test_a_figure_that_a_validation_does_not_give_does_not_end_the_run(tmp_path):
    changes = {
        SAVE_BEST: dict(type='CheckpointHook', save_best='coco/eight_precision', rule='greater'),
        'val_evaluator.classwise': True,
    }
    runner, log = run(tmp_path, **changes)
    assert (
        'save_best=coco/eight_precision is not among the metrics of this validation (coco/' in log
    )
    assert runner.epoch == runner.max_epochs and not list(tmp_path.glob('**/best_*'))


def test_without_a_validation_there_is_no_best(tmp_path):
    changes = {
        SAVE_BEST: dict(type='CheckpointHook', save_best='auto'),
        'val_dataloader': None, 'val_evaluator': None, 'val_cfg': None,
    }  # fmt: skip
    _, log = run(tmp_path, **changes)
    assert 'save_best=auto needs a validation, and this config has none' in log
