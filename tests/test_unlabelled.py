"""Images without labels: batches of both kinds, and the teacher's detections as ground truth."""

import copy
import json
import re
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pairs
import pytest
import torch
import zoo
from mmcv.ops import RoIAlign, batched_nms
from mmcv.transforms import LoadImageFromFile
from mmdet.models.dense_heads import rpn_head
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from mmengine.dataset import Compose, DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from PIL import Image
from test_checkpoint import same
from test_silent_faults import grey, one_channel
from test_tools import cpu_only, finish, free_port, start, warmed
from tiny import CLASSES, tiny_config

import mmkd
from mmkd.commands import replay
from mmkd.datasets import unlabelled as datasets
from mmkd.datasets.intact_images import ImageError, require_intact_images
from mmkd.datasets.teacher_labels import read_labels
from mmkd.datasets.unlabelled import MixedDataset, with_unlabelled
from mmkd.engine import unlabelled as engine
from mmkd.engine.exact_resume import latest_checkpoint
from mmkd.io.checkpoint import from_plain, read_checkpoint
from mmkd.methods import METHODS
from mmkd.options import unlabelled as options
from mmkd.options.unlabelled import MARK, Unlabelled
from mmkd.recipe import TeacherError, read_recipe

# ------------------------------------------------------------------------------ the two networks


def recipe(*terms, entry=None, **unlabelled):
    given = dict(images='folder', threshold=0.2, **unlabelled)
    return dict(entry or pairs.recipe(*terms), unlabelled=given)


def marked(data, *images):
    for i in images:
        data['data_samples'][i].set_metainfo({MARK: True})
    return data


def emptied(data, *images):
    """Unlabelled images, as the pipeline makes them."""
    for i in images:
        data['data_samples'][i].gt_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
    return marked(data, *images)


def found(monkeypatch, *images, scores=0.9):
    """Let the teacher find these boxes, (x1, y1, x2, y2, class[, score])."""

    def detect(teacher, features, rows, frames):
        return [
            InstanceData(
                bboxes=torch.tensor([box[:4] for box in boxes]).float().reshape(-1, 4),
                labels=torch.tensor([box[4] for box in boxes], dtype=torch.long),
                scores=torch.tensor([(*box, scores)[5] for box in boxes]).float(),
            )
            for boxes in images[: len(rows)]
        ]

    monkeypatch.setattr(options, 'detect', detect)


def labels_of(model, data, seen=None):
    samples = model.data_preprocessor(copy.deepcopy(data), True)['data_samples']
    seen = seen or SimpleNamespace(features=(torch.zeros(len(samples), 1, 1, 1),), view=None)
    return model.unlabelled.label(model.teacher, seen, samples)


def trident(**unlabelled):
    given = recipe(entry=zoo.recipe_for('Trident', 'Trident'), **unlabelled)
    model = pairs.build(dict(zoo.config('Trident', 'Trident'), distillation=given))
    zoo.settle(model)
    zoo.settle(model.teacher.network)
    return model


def seen_and_labelled(model, data):
    ready = model.data_preprocessor(copy.deepcopy(data), True)
    with model.teacher.taps:
        seen = model._show(ready['inputs'], ready['data_samples'])
        return model.unlabelled.label(model.teacher, seen, ready['data_samples'])


STUDENTS = {
    'paper': lambda: pairs.distil(pairs.fpn(), pairs.fpn(8), recipe()),
    'a teacher with masks': lambda: pairs.distil(pairs.fpn(), masked(), recipe()),
    'cascade': lambda: pairs.distil(pairs.cascade(), None, recipe()),
    'trident': trident,
    'a share of the gradient': lambda: pairs.distil(pairs.fpn(), pairs.fpn(8), recipe(entry=dict(
        fgd=dict(type='FGD'), share=dict(type='DKD', share=0.5)))),
    'teacher alone, hard': lambda: pairs.distil(
        pairs.fpn(), pairs.fpn(8), recipe(entry=pairs.off(start=None))),
    'same start': lambda: pairs.distil(
        pairs.fpn(), pairs.fpn(), recipe(entry=pairs.off(start='teacher'))),
}  # fmt: skip


RECIPES = {path.stem: path for path in sorted((pairs.ROOT / 'configs/_base_').glob('*.py'))}
"""Every published method has one."""
STUDENTS |= {
    name: lambda path=path: pairs.distil(
        pairs.fpn(), pairs.fpn(8, 16),
        recipe(entry=dict(Config.fromfile(path).distillation.to_dict(), start=None)))
    for name, path in RECIPES.items()
}  # fmt: skip


def test_every_method_is_among_the_students():
    used = ' '.join(path.read_text() for path in RECIPES.values())
    assert [m.__name__ for m in METHODS if f"type='{m.__name__}'" not in used] == []


@pytest.fixture
def late():
    """Schedules are over: some recipes begin late."""
    MessageHub.get_current_instance().update_info('iter', 1000)
    yield
    MessageHub.get_current_instance().pop_info('iter')


def plainly(losses):
    return {k: [t.detach() for t in (v if isinstance(v, list) else [v])] for k, v in losses.items()}


@pytest.mark.parametrize('case', STUDENTS)
def test_the_teachers_boxes_are_ground_truth_like_any(case, late):
    """An unlabelled image costs what it costs with the teacher's boxes written by hand."""
    model = STUDENTS[case]()
    data = emptied(pairs.batch((2, 0, 1)), 1)
    values = pairs.losses(model, data)
    by_hand = seen_and_labelled(model, data)[1]
    assert len(by_hand.gt_instances) > 1
    written = pairs.batch((2, 0, 1))
    written['data_samples'][1].gt_instances = by_hand.gt_instances
    expected = pairs.losses(model, written)
    assert float(values.pop('unlabelled_empty')) == 0
    assert float(values.pop('unlabelled_boxes')) == len(by_hand.gt_instances)
    assert set(values) == set(expected)
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert case not in RECIPES or all(values[n] > 0 for n in values if n.startswith('loss_kd'))
    pairs.total(model, values).backward()
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert pairs.total(model, pairs.losses(model, data)).isfinite()


def other_pixels(model):
    """Another order of channels and another normalisation."""
    model = copy.deepcopy(model)
    model.data_preprocessor.update(mean=[90.0, 110.0, 130.0], std=[1.0, 1.0, 1.0])
    model.data_preprocessor.bgr_to_rgb = False
    return model


PIXELS = {
    'the same': lambda: (pairs.fpn(), pairs.fpn(8)),
    'another normalisation': lambda: (pairs.fpn(), other_pixels(pairs.fpn(8))),
    'one channel': lambda: (one_channel(pairs.fpn()), one_channel(pairs.fpn(8))),
    'a cascade': lambda: (pairs.fpn(), pairs.cascade()),
}


@pytest.mark.parametrize('case', PIXELS)
def test_what_is_found_is_what_the_teacher_predicts(case):
    """By MMDetection's own inference, in an image that is smaller than the batch."""
    student, teacher = PIXELS[case]()
    model = pairs.distil(student, teacher, recipe(entry=pairs.off()))
    data = pairs.batch((2, 0), (64, 96))
    small = pairs.batch((0,), (48, 64), seed=1)
    data['inputs'][1], data['data_samples'][1] = small['inputs'][0], small['data_samples'][0]
    data = emptied(grey(data) if case == 'one channel' else data, 1)
    network = model.teacher.network
    torch.nn.init.normal_(fc_of(network).weight, std=2.0)  # scores and boxes that differ
    mine = seen_and_labelled(model, data)[1].gt_instances
    ready = network.data_preprocessor(copy.deepcopy(data), True)
    with torch.no_grad():
        theirs = network.predict(*ready.values(), rescale=False)[1].pred_instances
    counted = (theirs.scores >= 0.2) & (theirs.bboxes[:, 2:] - theirs.bboxes[:, :2] >= 1).all(1)
    theirs = theirs[counted]
    assert len(theirs) > 5 and len(mine) == pytest.approx(len(theirs), rel=0.1)
    same_class = mine.labels[:, None] == theirs.labels
    near = (bbox_overlaps(mine.bboxes, theirs.bboxes) > 0.95) & same_class
    assert near.any(0).float().mean() > 0.9 and near.any(1).float().mean() > 0.9


def fc_of(network):
    head = network.roi_head.bbox_head
    return (head[-1] if isinstance(head, torch.nn.ModuleList) else head).fc_cls


@pytest.mark.parametrize('weight', [1, 0.3])
def test_a_step_under_autocast(monkeypatch, weight):
    """Where mmcv's operators for a CPU take float32 alone."""
    pool = RoIAlign.forward
    monkeypatch.setattr(
        RoIAlign, 'forward', lambda self, x, rois: pool(self, x.float(), rois.float()).to(x.dtype)
    )
    monkeypatch.setattr(
        rpn_head, 'batched_nms', lambda boxes, scores, *a: batched_nms(
            boxes.float(), scores.float(), *a)
    )  # fmt: skip
    model = pairs.distil(pairs.fpn(), pairs.fpn(8), recipe(ignore=0.15, hard_weight=weight))
    weights = []
    model.roi_head.bbox_head.loss_cls.register_forward_pre_hook(
        lambda module, args: weights.append(args[2].unique().tolist())
    )
    with torch.autocast('cpu', torch.bfloat16):
        values = pairs.losses(model, emptied(pairs.batch((2, 0)), 1))
    assert float(values['unlabelled_boxes']) > 1
    # To the precision of the weights, not of the scores.
    assert weights[0] == pytest.approx(sorted({weight, 1}), rel=1e-6)
    pairs.total(model, values).backward()
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())


def test_a_batch_without_unlabelled_images_is_what_it_was():
    plain = pairs.distil(pairs.fpn(), pairs.fpn(8), pairs.recipe())
    model = STUDENTS['paper']()
    expected, values = pairs.losses(plain), pairs.losses(model)
    assert set(values) == set(expected)
    assert same(plainly(values), plainly(expected))
    # Hard labels alone: the teacher is not asked about it.
    model = STUDENTS['teacher alone, hard']()
    model.teacher.see = None
    assert set(pairs.losses(model)) == {n for n in expected if not n.startswith('loss_kd')}


@pytest.mark.parametrize('option', [
    dict(channels_last=True), dict(roi_align=True), dict(fuse_conv_bn=True),
    dict(dtype='bfloat16'), dict()])  # fmt: skip
def test_an_accelerated_teacher_and_half_precision_find_boxes_too(option):
    exact, model = (
        pairs.distil(pairs.fpn(), pairs.fpn(8), dict(recipe(), accelerate=each))
        for each in ({}, option)
    )
    data = emptied(pairs.batch((2, 0)), 1)
    count = len(seen_and_labelled(exact, data)[1].gt_instances)
    with torch.autocast('cpu', torch.bfloat16, enabled=not option):  # mixed precision of the run
        found_ = seen_and_labelled(model, data)[1].gt_instances
    near = 0 if option and 'dtype' not in option else 0.2
    assert count > 5 and len(found_) == pytest.approx(count, rel=near)
    assert found_.bboxes.dtype == torch.float32 and found_.bboxes.isfinite().all()
    if option:
        pairs.losses(model, data)


@pytest.mark.parametrize('teacher', zoo.ONE_STAGE)
def test_a_one_stage_teacher_detects_too(teacher, monkeypatch):
    """In its own way; one whose heads need more than features is asked for clean images alone."""
    given = recipe(entry=zoo.recipe_for('Faster R-CNN', teacher, ('hint',)))
    given['unlabelled']['threshold'] = 0.05
    student, other = zoo.tiny('Faster R-CNN'), zoo.tiny(teacher)
    if 'DETR' in teacher:
        with pytest.raises(ValueError, match="does not detect by heads .*: set view='clean'"):
            pairs.distil(student, other, given)
        return
    other.test_cfg.score_thr = 0.005
    given['unlabelled']['threshold'] = 0.005
    model = pairs.distil(student, other, given)
    data = emptied(pairs.batch((2, 0), 160), 1)
    assert float(pairs.losses(model, data)['unlabelled_boxes']) > 1


@pytest.mark.parametrize('images', [(0,), (0, 1)])
def test_a_teacher_that_finds_nothing_leaves_background(monkeypatch, images):
    model = STUDENTS['paper']()
    found(monkeypatch, *[[]] * len(images))
    values = pairs.losses(model, emptied(pairs.batch((2, 2)), *images))
    assert float(values['unlabelled_empty']) == 1 and float(values['unlabelled_boxes']) == 0
    pairs.total(model, values).backward()
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())
    tally = model.unlabelled.tally
    assert (tally.images, tally.empty, tally.boxes) == (len(images), len(images), 0)


def test_boxes_at_the_border_are_clipped_and_empty_ones_dropped(monkeypatch):
    model = STUDENTS['paper']()
    boxes = [(-9, 50, 20, 90, 0), (60, 60, 80, 80, 1), (64, 0, 90, 30, 2), (9, 9, 9.5, 30, 2)]
    found(monkeypatch, boxes)
    mine = labels_of(model, emptied(pairs.batch((1, 1)), 1))[1].gt_instances
    assert mine.bboxes.tolist() == [[0, 50, 20, 64], [60, 60, 64, 64]]
    assert mine.labels.tolist() == [0, 1]


@pytest.mark.parametrize('threshold', [[0.5, 0.3, 0.9], dict(b=0.3, c=0.9, a=0.5)])
def test_each_class_has_its_threshold_and_its_name(monkeypatch, threshold):
    """A teacher of five classes, a student of three, of which it knows two."""
    given = recipe(ignore=0.2)
    given['unlabelled']['threshold'] = threshold
    given['classes'] = dict(student=['a', 'b', 'c'], teacher=['x', 'b', 'y', 'a', 'z'])
    model = pairs.distil(pairs.fpn(), pairs.fpn(classes=5), given)
    place = (5, 5, 25, 25)
    boxes = [(*place, c, s) for c in range(5) for s in (0.6, 0.4, 0.25, 0.1)]
    found(monkeypatch, boxes)
    sample = labels_of(model, emptied(pairs.batch((1, 1)), 0))[0]
    assert Counter(sample.gt_instances.labels.tolist()) == {0: 1, 1: 2}
    assert Counter(sample.ignored_instances.labels.tolist()) == {0: 2, 1: 1}
    assert model.classes.unknown == ['c']


def test_boxes_of_a_larger_view_come_back():
    """The teacher sees twice the pixels, and what it finds there lies at half the place."""
    given = recipe()
    given['resolution'] = dict(student=(64, 64), teacher=(128, 128))
    model = pairs.distil(pairs.fpn(), pairs.fpn(8), given)
    data = emptied(pairs.batch((2, 0)), 1)
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        large = torch.nn.functional.interpolate(image[None].float(), scale_factor=2)[0].byte()
        pairs.second_view(sample, large, offset=(0.0, 4.0))
    ready = model.data_preprocessor(copy.deepcopy(data), True)
    with model.teacher.taps:
        seen = model._show(ready['inputs'], ready['data_samples'])
        mine = model.unlabelled.label(model.teacher, seen, ready['data_samples'])[1].gt_instances
        frames = [options._frame(ready['data_samples'][1])]
        theirs = options.detect(model.teacher, seen.features, [1], frames)[0]
    expected = (theirs.bboxes - torch.tensor([0.0, 4.0, 0.0, 4.0])) / 2
    expected = expected.clamp(0, 64)
    kept = (theirs.scores >= 0.2) & ((expected[:, 2:] - expected[:, :2]).amin(-1) >= 1)
    assert len(mine) > 1 and theirs.bboxes.max() > 64
    torch.testing.assert_close(mine.bboxes, expected[kept])
    pairs.losses(model, data)


def assigned(model, data):
    """What the student's RPN assigns to its anchors, image by image: (anchors, gt_inds)."""
    calls, head = [], model.rpn_head
    assign = head.assigner.assign

    def spy(priors, *args, **kwargs):
        result = assign(priors, *args, **kwargs)
        calls.append((priors.priors, result.gt_inds))
        return result

    head.assigner.assign = spy
    values = pairs.losses(model, data)
    head.assigner.assign = assign
    pairs.total(model, values).backward()
    return calls


@pytest.mark.parametrize('student', [pairs.fpn, pairs.cascade])
def test_ignored_regions_are_no_background(monkeypatch, student):
    model = pairs.distil(student(), None, recipe(ignore=0.1))
    doubtful, sure = (0, 0, 40, 40, 1, 0.15), (8, 8, 28, 28, 0, 0.9)
    crowd = InstanceData(bboxes=torch.tensor([[0.0, 0.0, 40.0, 40.0]]), labels=torch.tensor([0]))
    data = emptied(pairs.batch((1, 1, 1)), 1, 2)
    data['data_samples'][0].ignored_instances = crowd
    found(monkeypatch, [doubtful, sure], [doubtful])
    labelled, both, none = assigned(model, data)
    region = torch.tensor([doubtful[:4]]).float()
    for anchors, given in (both, none):
        inside = bbox_overlaps(anchors, region, mode='iof')[:, 0] > 0.5
        assert inside.any() and (~inside).any()
        assert not (given[inside] == 0).any() and (given[~inside] == 0).any()
    # A sure object before a doubtful one is still found; MMDetection's own way would drop it.
    assert (both[1] > 0).any() and not (none[1] > 0).any()
    # A labelled image stays as MMDetection has it: its assigners do not use crowds.
    assert not (labelled[1] == -1)[bbox_overlaps(labelled[0], region, mode='iof')[:, 0] > 0.5].all()
    copied = copy.deepcopy(model)
    assert copied.rpn_head.assigner.assign.args[1] is copied.rpn_head.assigner


def test_the_roi_head_has_ignored_regions_too(monkeypatch):
    model = pairs.distil(pairs.fpn(), None, recipe(ignore=0.1))
    found(monkeypatch, [(0, 0, 64, 64, 1, 0.15)])  # all proposals lie there
    regions = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    background, head = [], model.roi_head
    assign = head.bbox_assigner.assign

    def spy(priors, *args, **kwargs):
        result = assign(priors, *args, **kwargs)
        inside = bbox_overlaps(priors.priors, regions, mode='iof')[:, 0] > 0.5
        background.append((inside.sum(), (result.gt_inds[inside] == 0).sum()))
        return result

    head.bbox_assigner.assign = spy
    pairs.losses(model, emptied(pairs.batch((0,)), 0))
    ((inside, trained),) = background
    assert inside > 0 and trained == 0  # an untrained RPN proposes something


class Positional:
    """As ATSSAssigner has it, a number of anchors per level stands before the ground truth."""

    ignore_iof_thr = -1

    def assign(self, pred_instances, num_level_priors, gt_instances, gt_instances_ignore=None):
        gt_inds = torch.zeros(len(pred_instances), dtype=torch.long)
        return SimpleNamespace(gt_inds=gt_inds, levels=num_level_priors)


def test_an_assigner_may_take_more_arguments():
    priors = InstanceData(priors=torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]))
    ignored = InstanceData(bboxes=torch.tensor([[0.0, 0.0, 20.0, 20.0]]))
    ignored.set_metainfo({MARK: True})
    result = options._assign(Positional.assign, Positional(), priors, [2], InstanceData(), ignored)
    assert result.gt_inds.tolist() == [-1, 0] and result.levels == [2]


@pytest.mark.parametrize('images, terms', [((1,), 'off'), ((1,), 'on'), ((), 'off')])
def test_the_teacher_looks_at_no_more_than_it_has_to(monkeypatch, images, terms):
    """Once at a batch; with no term in force only at the images without labels."""
    entry = None if terms == 'on' else pairs.off()
    model = pairs.distil(pairs.fpn(), pairs.fpn(8), recipe(entry=entry))
    looks, extract = [], model.teacher.network.extract_feat

    def spy(pixels):
        looks.append(len(pixels))
        return extract(pixels)

    monkeypatch.setattr(model.teacher.network, 'extract_feat', spy)
    pairs.losses(model, emptied(pairs.batch((2, 0, 1)), *images))
    assert looks == ([] if not images else [3] if terms == 'on' else [1])


def test_the_masks_of_a_teacher_are_not_made(monkeypatch):
    model = pairs.distil(pairs.fpn(), masked(), recipe())
    head = model.teacher.network.roi_head
    monkeypatch.setattr(head, 'predict_mask', None)
    pairs.losses(model, emptied(pairs.batch((2, 0)), 1))
    assert head.with_mask


@pytest.mark.parametrize('student', ['fpn', 'cascade', 'giou', 'Trident'])
def test_the_hard_losses_of_unlabelled_images_have_a_weight(monkeypatch, student):
    """Losses are linear in it; terms do not change; at 0 nothing of such an image is left."""
    box = (10, 10, 30, 36, 1)
    found(monkeypatch, [box], [(20, 8, 44, 30, 2)], [box])

    def losses(weight, *images):
        if student == 'Trident':
            torch.manual_seed(0)
            model = trident(hard_weight=weight)
        else:
            model = pairs.distil(getattr(pairs, student)(), None, recipe(hard_weight=weight))
        values = pairs.losses(model, emptied(pairs.batch((2, 0, 1)), *images))
        return {k: v for k, v in values.items() if 'loss' in k}

    def number(value):
        return float(sum(v.sum() for v in value) if isinstance(value, list) else value.sum())

    none, half, whole = (losses(weight, 1) for weight in (0, 0.5, 1))
    for name in whole:
        a, b, c = (number(values[name]) for values in (none, half, whole))
        if name.startswith('loss_kd'):
            assert a == b == c, name
        else:
            assert b == pytest.approx((a + c) / 2, rel=1e-4, abs=1e-6), name
    hard = [name for name in whole if not name.startswith('loss_kd')]
    assert any(number(none[name]) < number(whole[name]) for name in hard if 'rpn' in name)
    assert any(number(none[name]) < number(whole[name]) for name in hard if 'rpn' not in name)
    assert all(number(v) == 0 for n, v in losses(0, 0, 1, 2).items() if n in hard)


def test_a_copy_of_the_student_weighs_its_own_losses(monkeypatch):
    """As an average over steps (EMA) makes one."""
    found(monkeypatch, [(10, 10, 30, 36, 1)])
    model = pairs.distil(pairs.fpn(), None, recipe(hard_weight=0))
    values = pairs.losses(copy.deepcopy(model), emptied(pairs.batch((1,)), 0))
    assert float(values['loss_cls']) == 0


def test_a_student_with_another_hard_loss_has_no_such_weight(monkeypatch):
    model = pairs.distil(pairs.fpn(), None, recipe(hard_weight=0.5))
    with pytest.raises(ValueError, match="hard_weight: the student has a loss 'loss_iou'"):
        model.unlabelled.end({'loss_cls': 0, 's0.loss_bbox': 0, 'loss_rpn_cls': 0, 'loss_iou': 0})


def masked():
    model = pairs.zoo('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    pairs._narrow(model, 4, 8)
    pairs._box_head(model.roi_head.bbox_head, 8, 3)
    model.roi_head.mask_head.update(in_channels=8, conv_out_channels=8, num_classes=3)
    model.roi_head.mask_roi_extractor.update(out_channels=8)
    return model


def low(model, score):
    model = copy.deepcopy(model)
    model.test_cfg.rcnn.score_thr = score
    return model


REFUSED = {
    'masks': (dict(), masked, None, 'predicts masks'),
    'class counts': (dict(), pairs.fpn, lambda: pairs.fpn(classes=5), 'has 5 classes'),
    'threshold per class': (dict(threshold=[0.5]), pairs.fpn, None, 'has 1 scores, and the'),
    'lower than the teacher keeps': (
        dict(ignore=0.1), pairs.fpn, lambda: low(pairs.fpn(), 0.15), 'no detection below 0.15'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_a_pair_that_cannot_be_is_refused(case):
    changes, student, teacher, message = REFUSED[case]
    given = recipe(entry=pairs.off())
    given['unlabelled'].update(changes)
    with pytest.raises(ValueError, match=message):
        pairs.distil(student(), teacher and teacher(), given)


ENTRIES = {
    'images': (dict(), 'names no images'),
    'two sources': (dict(images='a', ann_file='b'), 'names images and ann_file'),
    'an unknown key': (dict(images='a', treshold=0.4), "'treshold'; did you mean threshold"),
    'share 0': (dict(images='a', share=0), 'share=0 must be a number above 0'),
    'share 1.5': (dict(images='a', share=1.5), 'share=1.5'),
    'share True': (dict(images='a', share=True), 'share=True'),
    'weight': (dict(images='a', hard_weight=-1), 'hard_weight=-1 must be a number at least 0'),
    'threshold': (dict(images='a', threshold=1.5), 'threshold=1.5 must be a number between 0'),
    'a word': (dict(images='a', threshold='atuo'), "threshold='atuo'"),
    'no score': (dict(images='a', threshold=[]), 'has no score'),
    'a class': (dict(images='a', threshold=dict(a='x')), r"threshold\['a'\]='x'"),
    'ignore': (dict(images='a', threshold=[0.5, 0.3], ignore=0.3), 'ignore=0.3 must be below'),
    'view': (dict(images='a', view='teacher'), "view='teacher' must be 'student' or 'clean'"),
    'cache': (dict(images='a', cache='x.json'), "set view='clean'"),
    'prefix': (dict(images='a', img_prefix='b'), "img_prefix='b' is given without ann_file"),
    'folder': (dict(images=3), 'images=3 must be a folder'),
    'skip': (dict(images='a', skip_unreadable='yes'), "skip_unreadable='yes'"),
    'a path object': (dict(images=Path('a')), r"images=PosixPath\('a'\) must be .* \(strings\)"),
    'an empty list': (dict(images=[]), r'images=\[\] must be a folder'),
    'a percentage': (dict(images='a', threshold=50), 'threshold=50 must be a number between 0 and'),
    'no number': (dict(images='a', threshold=float('nan')), 'threshold=nan must be a number'),
    'no threshold': (dict(images='a', threshold=None), 'threshold=None must be a number'),
    'a number in quotes': (dict(images='a', share='0.5'), "share='0.5' must be a number"),
    'infinite': (dict(images='a', hard_weight=float('inf')), 'hard_weight=inf must be a number'),
    'a list of regions': (dict(images='a', ignore=[0.1]), r'ignore=\[0.1\] must be a number'),
    'no data set': (dict(dataset=dict(ann_file='a.json')), 'dataset=.* has no type, such as'),
    'a data set by name': (dict(dataset='CocoDataset'), "dataset='CocoDataset' must be the config"),
    'a cache': (dict(images='a', view='clean', cache='labels'), "cache='labels' must be .*json"),
    'an inherited source': (
        dict(images='a', dataset=dict(type='x')),
        'set an inherited one to None',
    ),
    'no dict': ('folder', 'must be a dict'),
}


@pytest.mark.parametrize('case', ENTRIES)
def test_an_entry_that_cannot_be_is_refused(case):
    entry, message = ENTRIES[case]
    with pytest.raises(ValueError, match=message):
        read_recipe(dict(unlabelled=entry))


def test_american_spelling_is_understood():
    with pytest.raises(ValueError, match="'unlabeled'.* did you mean .*unlabelled"):
        read_recipe(dict(unlabeled=dict(images='a')))


def test_thresholds_by_name_have_to_name_the_classes():
    settings = Unlabelled(images='a', threshold=dict(cat=0.5, dog=0.4))
    assert settings.by_class(['dog', 'cat'], 2) == [0.4, 0.5]
    with pytest.raises(ValueError, match="no class 'cat'; did you mean 'car'"):
        settings.by_class(['dog', 'car'], 2)
    with pytest.raises(ValueError, match='no score for bird'):
        settings.by_class(['dog', 'cat', 'bird'], 3)


@pytest.mark.parametrize('share, size, count', [(0.5, 8, 4), (0.25, 2, 1), (1, 3, 3), (0.9, 4, 3)])
def test_each_batch_has_a_fixed_share(share, size, count):
    settings = Unlabelled(images='a', share=share)
    if count == size or 0 < int(share * size + 0.5) < size:
        assert settings.of_batch(size) == count
    else:
        with pytest.raises(ValueError, match=f'batch_size={size} leaves no labelled image'):
            settings.of_batch(size)
    with pytest.raises(ValueError, match='batch_size=4 leaves no unlabelled image'):
        Unlabelled(images='a', share=0.1).of_batch(4)


# ------------------------------------------------------------------------------ the images


def draw(folder, count, first=100, size=(64, 64)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')


@pytest.fixture
def pair(tmp_path):
    """The tiny detector, with itself, untrained, as its teacher, and six images without labels."""
    cfg = Config.fromfile(tiny_config(tmp_path))
    cfg.runner_type = 'mmkd.DistillationRunner'
    cfg.experiment_name = tmp_path.name
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1)
    draw(tmp_path / 'more' / 'deeper', 6)
    teacher = tmp_path / 'teacher.py'
    cfg.dump(teacher)
    cfg.model = dict(
        cfg.model, type='mmkd.KnowledgeDistillationTwoStageDetector', teacher_config=str(teacher),
        teacher_ckpt='random', distillation=recipe('rcnn_cls'),
    )  # fmt: skip
    cfg.model.distillation.unlabelled.images = str(tmp_path / 'more')
    return cfg


def loader_of(cfg, seed=0, **changes):
    settings = Unlabelled(**{**cfg.model.distillation.unlabelled, **changes})
    return Runner.build_dataloader(with_unlabelled(cfg.train_dataloader, settings), seed=seed)


def epoch_of(loader, epoch):
    loader.batch_sampler.sampler.set_epoch(epoch)
    return list(loader.batch_sampler)


def test_a_batch_has_labelled_images_and_then_marked_ones(pair):
    loader = loader_of(pair, share=0.25)
    assert isinstance(loader.dataset, MixedDataset) and len(loader.dataset) == 16 + 6
    assert loader.dataset.metainfo['classes'] == CLASSES
    batches = list(loader)
    assert len(batches) == len(loader) == 6  # one pass over the 16 labelled images by threes
    for batch in batches:
        marks = [bool(s.get(MARK)) for s in batch['data_samples']]
        assert marks == sorted(marks) and sum(marks) == 1
        boxes = [len(s.gt_instances) for s in batch['data_samples']]
        assert boxes[-1] == 0 and min(boxes[:-1]) > 0


def test_the_unlabelled_images_come_in_turn_over_epochs(pair):
    loader = loader_of(pair)  # 8 batches of 2 and 2
    epochs = [epoch_of(loader, epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch if i < 16) == list(range(16))
    order = [i - 16 for batches in epochs for batch in batches for i in batch if i >= 16]
    assert len(order) == 48 and set(Counter(order).values()) == {8}
    for turn in range(0, 48, 6):
        assert sorted(order[turn : turn + 6]) == list(range(6))
    assert epoch_of(loader, 1) == epochs[1] != epochs[0]
    assert epoch_of(loader_of(pair, seed=1), 1) != epochs[1]


def test_each_process_has_its_part(pair, monkeypatch):
    parts = []
    for rank in range(2):
        for where in ('mmkd.datasets.unlabelled', 'mmengine.dataset.sampler'):
            monkeypatch.setattr(f'{where}.get_dist_info', lambda rank=rank: (rank, 2))
        parts.append([epoch_of(loader, e) for loader in [loader_of(pair)] for e in range(3)])
    flat = [[i for batches in part for batch in batches for i in batch] for part in parts]
    labelled = [[i for i in part if i < 16] for part in flat]
    assert sorted(labelled[0] + labelled[1]) == sorted(3 * list(range(16)))
    mine, theirs = ([i for i in part if i >= 16] for part in flat)
    assert set(Counter(mine + theirs).values()) == {8}
    together = [i for both in zip(mine, theirs, strict=True) for i in both]
    assert all(len(set(together[t : t + 6])) == 6 for t in range(0, 48, 6))


def test_batches_keep_their_aspect_ratio(pair, tmp_path):
    draw(tmp_path / 'more', 4, 200, (40, 64))
    content = json.loads(Path(pair.data_root, 'train.json').read_text())
    for image in content['images'][:4]:
        image['width'] = 40
    Path(pair.data_root, 'train.json').write_text(json.dumps(content))
    loader = loader_of(pair)
    for epoch in range(2):
        for batch in epoch_of(loader, epoch):
            infos = [loader.dataset.get_data_info(i) for i in batch]
            assert len({info['width'] < info['height'] for info in infos}) == 1
    # With no upright image at all, any will do.
    loader = loader_of(pair, images=str(tmp_path / 'more' / 'deeper'))
    assert all(len(batch) == 4 for batch in epoch_of(loader, 0))
    # Where no labelled image is upright, the unlabelled ones that are still have their turn.
    for image in content['images']:
        image['width'] = 64
    Path(pair.data_root, 'train.json').write_text(json.dumps(content))
    seen = [i for epoch in range(2) for batch in epoch_of(loader_of(pair), epoch) for i in batch]
    assert set(seen) == set(range(16 + 10))


@pytest.mark.parametrize('kind', ['epoch', 'iter'])
def test_the_teacher_alone_needs_no_labelled_image(pair, kind):
    pair.train_dataloader.dataset.ann_file = 'nowhere.json'
    if kind == 'iter':
        pair.train_dataloader.sampler.type = 'InfiniteSampler'
    loader = loader_of(pair, share=1.0)
    # One that chooses by labels gives way.
    classes = dict(pair.train_dataloader, sampler=dict(type='ClassAwareSampler'))
    settings = Unlabelled(images=pair.model.distillation.unlabelled.images, share=1.0)
    assert with_unlabelled(classes, settings)['sampler']['type'] is DefaultSampler
    assert type(loader.batch_sampler.sampler) is {
        'epoch': DefaultSampler, 'iter': InfiniteSampler}[kind]  # fmt: skip
    assert len(loader) == 2 and len(loader.dataset) == 6
    batch = next(iter(loader))
    assert all(s.get(MARK) for s in batch['data_samples'])


def test_no_image_is_dropped_for_lack_of_boxes(pair):
    pair.train_dataloader.dataset.update(
        filter_cfg=dict(filter_empty_gt=True, min_size=200),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='RandomCrop', crop_size=(48, 48)),
            dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
            dict(type='PackDetInputs'),
        ],
    )
    pair.train_dataloader.dataset.filter_cfg.min_size = 1
    loader = loader_of(pair)
    seen = Counter(
        s.img_path for batch in loader for s in batch['data_samples'] if s.get(MARK)
    )  # fmt: skip
    assert sum(seen.values()) == 16 and len(seen) == 6
    said = ' '.join(loader.dataset.adapted)
    assert 'RandomCrop(allow_negative_crop=True)' in said
    assert 'FilterAnnotations(keep_empty=False)' in said
    # The labelled images keep the pipeline as it was.
    crop = loader.dataset.labelled.pipeline.transforms[2]
    assert crop.allow_negative_crop is False
    # So does one that a hook puts in its place.
    switched = Compose(pair.train_dataloader.dataset.pipeline)
    loader.dataset.pipeline = switched
    assert loader.dataset.labelled.pipeline is switched
    assert switched.transforms[2].allow_negative_crop is False
    assert loader.dataset.unlabelled.pipeline.transforms[2].allow_negative_crop is True


def test_the_labelled_set_may_be_wrapped(pair):
    own = pair.train_dataloader.dataset
    for wrapped in (
        dict(type='RepeatDataset', times=2, dataset=own),
        dict(type='ConcatDataset', datasets=[own, own]),
        dict(type='ClassBalancedDataset', oversample_thr=1e-3, dataset=own),
    ):
        pair.train_dataloader.dataset = wrapped
        loader = loader_of(pair)
        labelled = loader.dataset.offset
        assert labelled >= 16 and len(loader.dataset.unlabelled) == 6
        batches = epoch_of(loader, 0)
        assert sorted(i for b in batches for i in b if i < labelled) == list(range(labelled))
        assert any(s.get(MARK) for s in next(iter(loader))['data_samples'])
        # A hook's pipeline does not reach those inside in MMDetection: so for both kinds.
        before = loader.dataset.unlabelled.pipeline
        loader.dataset.pipeline = Compose([])
        assert loader.dataset.unlabelled.pipeline is before
    mosaic = dict(
        type='MultiImageMixDataset', dataset=own, pipeline=[
            dict(type='Mosaic', img_scale=(64, 64)), dict(type='PackDetInputs')])  # fmt: skip
    mosaic['dataset'] = dict(own, pipeline=own.pipeline[:2])
    pair.train_dataloader.dataset = mosaic
    loader = loader_of(pair)
    sample = loader.dataset[loader.dataset.offset]['data_samples']
    assert sample.get(MARK) and sample.img_shape == (128, 128)


def test_a_sampler_of_ones_own_chooses_the_labelled_images(pair):
    own = pair.train_dataloader.dataset
    pair.train_dataloader.batch_sampler = None
    pair.train_dataloader.sampler = dict(type='ClassAwareSampler', num_sample_class=1)
    loader = loader_of(pair)
    assert [sum(i >= 16 for i in batch) for batch in epoch_of(loader, 1)] == [2] * 8
    pair.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[own, own])
    sources = dict(type='MultiSourceSampler', batch_size=4, source_ratio=[1, 1])
    pair.train_dataloader.sampler = sources
    batches = iter(loader_of(pair).batch_sampler)
    for _ in range(20):
        one, other, *unlabelled = next(batches)
        assert one < 16 <= other < 32 and all(i >= 32 for i in unlabelled)
    # It would look for ever for no image of the second.
    pair.train_dataloader.sampler.source_ratio = [3, 1]
    with pytest.raises(ValueError, match=r'take \[2, 0\] from its sources .* a smaller share'):
        loader_of(pair)


@pytest.mark.parametrize('share, size, unlabelled', [(0.5, 4, 2), (1.0, 4, 1)])
def test_one_image_is_enough(pair, tmp_path, share, size, unlabelled):
    draw(tmp_path / 'single', 1)
    loader = loader_of(pair, images=str(tmp_path / 'single'), share=share)
    for batch in epoch_of(loader, 3):
        assert [i >= loader.dataset.offset for i in batch].count(True) == unlabelled
    pair.train_dataloader.batch_size = size + 5
    assert list(loader_of(pair, images=str(tmp_path / 'single'), share=share))


def test_a_batch_without_a_size_is_of_one_image(pair):
    del pair.train_dataloader['batch_size']
    pair.train_dataloader.batch_sampler = None
    with pytest.raises(ValueError, match='train_dataloader.batch_size=1 leaves no labelled image'):
        train(pair)


def test_folders_in_each_other_and_links_give_an_image_once(pair, tmp_path):
    more = tmp_path / 'more'
    (tmp_path / 'link').symlink_to(more)
    draw(tmp_path / 'others', 2, 200)
    folders = [str(tmp_path / name) for name in ('more', 'more/deeper', 'link', 'others')]
    data = loader_of(pair, images=folders).dataset
    assert len(data.images) == 8
    assert data.images.get_data_info(0)['img_path'] == str(more / 'deeper' / '100.png')


def test_images_may_be_named_by_a_file_or_a_data_set(pair, tmp_path):
    folder = tmp_path / 'more' / 'deeper'
    listed = tmp_path / 'list.json'
    listed.write_text(json.dumps({'images': [
        {'id': 1, 'file_name': '100.png', 'width': 64, 'height': 64},
        {'id': 2, 'file_name': '103.png', 'width': 64, 'height': 64}]}))  # fmt: skip
    plain = dict(images=None, ann_file=str(listed), img_prefix=str(folder))
    assert len(loader_of(pair, **plain).dataset.images) == 2
    # Any data set of MMDetection, whatever it would leave out for its annotations.
    other = dict(pair.train_dataloader.dataset, ann_file='val.json', filter_cfg=dict(min_size=999))
    data = loader_of(pair, images=None, dataset=other).dataset
    assert len(data.images) == 8 and len(data.images[0]['data_samples'].gt_instances) == 0
    assert all(data.images.get_data_info(i)['instances'] == [] for i in range(8))
    with pytest.raises(ValueError, match=r'unlabelled: .*list\.json: .*images is empty'):
        listed.write_text(json.dumps({'images': []}))
        loader_of(pair, **plain)


class LoadArray(LoadImageFromFile):
    def transform(self, results):
        results['img'] = np.load(results['img_path'])
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results


def test_a_loader_of_ones_own_may_read_what_is_no_picture(pair, tmp_path):
    names = [f'{i}.npy' for i in range(3)]
    for name in names:
        np.save(tmp_path / name, np.zeros((64, 64, 3), np.uint8))
    listed = tmp_path / 'list.json'
    entries = [dict(id=i, file_name=name) for i, name in enumerate(names)]
    listed.write_text(json.dumps(dict(images=entries)))
    plain = dict(images=None, ann_file=str(listed))
    with pytest.raises(ImageError, match='3 of 3 images cannot be read'):
        loader_of(pair, **plain)
    pair.train_dataloader.dataset.pipeline[0] = dict(type=LoadArray)
    data = loader_of(pair, **plain).dataset
    assert data[16]['inputs'].shape == (3, 64, 64) and len(data.images) == 3


def test_unreadable_images_are_named_and_passed_over_if_told_so(pair, tmp_path):
    folder = tmp_path / 'more'
    (folder / 'a.jpg').write_bytes(b'no image')
    (folder / 'b.png').write_bytes((folder / 'deeper' / '100.png').read_bytes()[:-40])
    (folder / 'c.jpg').write_bytes(b'')
    (folder / 'notes.txt').write_text('no image, and none by its name')
    with pytest.raises(ImageError, match=r'3 of 9 images cannot be read: .*a\.jpg.*skip_unread'):
        loader_of(pair)
    data = loader_of(pair, skip_unreadable=True).dataset
    assert len(data.images) == 6 and 'b.png (it is cut short' in str(data.images.passed_over)
    for path in (folder / 'deeper').iterdir():
        path.unlink()
    with pytest.raises(ImageError, match='3 of 3 images cannot be read'):
        loader_of(pair, skip_unreadable=True)
    for path in folder.glob('*.*g'):
        path.unlink()
    with pytest.raises(ValueError, match='unlabelled: folder .*more has no image in it'):
        loader_of(pair)
    with pytest.raises(ValueError, match='unlabelled: images /nowhere does not exist'):
        loader_of(pair, images='/nowhere')


def test_what_opencv_reads_is_an_image(pair, tmp_path, monkeypatch):
    """Also one whose EXIF data are damaged, or that has more pixels than Pillow likes."""
    path = tmp_path / 'more' / 'a.jpg'
    Image.new('RGB', (60, 40)).save(path, exif=b'Exif\0\0no TIFF header at all', dpi=(72, 72))
    assert len(loader_of(pair).dataset.images) == 7
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'getexif', lambda self: 1 / 0)
        assert len(listed(pair)) == 7
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    sizes = {Path(p).name: size for p, *size in listed(pair)}
    assert sizes['a.jpg'] == [60, 40] and sizes['100.png'] == [64, 64]

    def broken(path):
        raise cv2.error('too large')

    monkeypatch.setattr(datasets.cv2, 'imread', broken)
    with pytest.raises(ImageError, match=r'7 of 7 .*OpenCV cannot decode it: too large'):
        listed(pair)


def listed(pair):
    return datasets.list_images(Unlabelled(images=pair.model.distillation.unlabelled.images))[0]


def test_each_unreadable_image_is_in_the_log(pair, tmp_path, monkeypatch):
    for i in range(5):
        (tmp_path / 'more' / f'bad{i}.jpg').write_bytes(b'no image')
    said = []
    monkeypatch.setattr(datasets, 'print_log', lambda text, *_: said.append(text))
    with pytest.raises(ImageError, match='5 of 11 images cannot be read: .*the log has all'):
        listed(pair)
    assert all(f'bad{i}.jpg (it is no image)' in said[0] for i in range(5))


def test_an_image_that_breaks_as_it_is_decoded_is_passed_over_too(pair, tmp_path):
    """Its beginning and its end are those of a picture."""
    whole = (tmp_path / 'more' / 'deeper' / '100.png').read_bytes()
    (tmp_path / 'more' / 'a.png').write_bytes(whole[:60] + whole[-12:])
    data = loader_of(pair).dataset
    require_intact_images(data)
    with pytest.raises(ImageError, match=r'a\.png'):
        data[16]
    data = loader_of(pair, skip_unreadable=True).dataset
    require_intact_images(data)
    sample = data[16]['data_samples']
    assert len(data.images) == 7 and sample.get(MARK) and 'deeper' in sample.img_path


# ------------------------------------------------------------------------------ a run


class Cut(RuntimeError):
    pass


class CutHook(Hook):
    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            raise Cut


def train(cfg, name='run', cut=None, **changes):
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(Path(cfg.work_dir).with_name(name))
    cfg.experiment_name = f'{name}{cut}'
    cfg.update(changes)
    runner = RUNNERS.build(cfg)
    if cut:
        runner.register_hook(CutHook(cut))
        with pytest.raises(Cut):
            runner.train()
    else:
        runner.train()
    return runner


def log_of(runner):
    for handler in runner.logger.handlers:
        handler.flush()
    return next(Path(runner.log_dir).glob('*.log')).read_text()


@pytest.mark.parametrize(
    'loop',
    [
        'epoch',
        *(pytest.param(x, marks=pytest.mark.slow) for x in ('iter', 'iter, of epochs', 'alone')),
    ],
)
def test_a_run_goes_on_in_mid_epoch_to_the_bit(pair, loop):
    pair.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
    if loop.startswith('iter'):
        pair.train_cfg = dict(type='IterBasedTrainLoop', max_iters=12)
        if loop == 'iter':
            pair.train_dataloader.sampler.type = 'InfiniteSampler'
    if loop == 'alone':
        pair.train_cfg.max_epochs = 6
        pair.model.distillation.unlabelled.share = 1.0
    whole = train(pair, 'whole')
    said = log_of(whole)
    how = 'no labelled ones' if loop == 'alone' else '2 of 4 in each batch'
    assert f'6 images; {how}' in said and 'unlabelled_boxes: ' in said
    # The sixth epoch of the teacher alone, the second of the others, the third by iterations.
    train(pair, 'parts', cut=11 if loop == 'alone' else 10)
    train(pair, 'parts', resume=True)
    ends = [
        from_plain(read_checkpoint(latest_checkpoint(str(Path(whole.work_dir).with_name(name)))))
        for name in ('whole', 'parts')
    ]
    assert same(ends[0]['state_dict'], ends[1]['state_dict'])
    assert same(ends[0]['optimizer'], ends[1]['optimizer'])


def test_the_teacher_alone_trains(pair):
    pair.train_dataloader.dataset.ann_file = 'nowhere.json'
    pair.model.distillation.update(pairs.recipe('rcnn_bbox', 'rpn_bbox'))
    pair.model.distillation.unlabelled.share = 1.0
    runner = train(pair)
    assert runner.iter == 2 and 'the teacher alone teaches' in log_of(runner)


def test_gradients_may_be_accumulated(pair):
    """Of two batches, with weights and ignored regions; the log has the means of its interval."""
    pair.optim_wrapper.accumulative_counts = 2
    pair.auto_scale_lr = dict(enable=True, base_batch_size=16)  # a batch is of 4, both kinds
    pair.default_hooks.logger.interval = 4
    pair.model.distillation.unlabelled.update(threshold=0.262, ignore=0.1, hard_weight=0.5)
    counts = []

    class Listen(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            counts.append(float(outputs['unlabelled_boxes']))

    pair.custom_hooks = [dict(type=Listen)]
    runner = train(pair)
    assert runner.optim_wrapper.param_groups[0]['lr'] == pytest.approx(0.01 * 4 / 16)
    said = re.findall(r'unlabelled_boxes: ([\d.]+)', log_of(runner))
    means = [sum(counts[i : i + 4]) / 4 for i in (0, 4)]
    assert len(counts) == 8 and len(set(counts)) > 1
    assert [float(value) for value in said] == pytest.approx(means, abs=1e-3)


def test_both_views_are_made_of_unlabelled_images_too(pair):
    pair.model.distillation.resolution = dict(student=(64, 64), teacher=(128, 128))
    runner = train(pair)
    assert 'unlabelled_boxes: ' in log_of(runner)
    for index in (0, 16):
        sample = runner.train_dataloader.dataset[index]['data_samples']
        assert sample.teacher_view.img.shape[-2:] == (128, 128) and sample.img_shape == (64, 64)


def test_the_pipeline_may_change_between_epochs(pair):
    """By workers that stay; what would drop images in the new one keeps them."""
    pair.train_cfg.max_epochs = 2
    pair.train_dataloader.update(num_workers=1, persistent_workers=True)
    last = copy.deepcopy(pair.train_dataloader.dataset.pipeline)
    last[3] = dict(type='RandomCrop', crop_size=(48, 48))
    pair.custom_hooks = [dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=last)]
    shapes = []

    class Listen(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            shapes.append({(s.img_shape, bool(s.get(MARK))) for s in data_batch['data_samples']})

    pair.custom_hooks.append(dict(type=Listen))
    train(pair)
    for epoch, side in enumerate((64, 48)):
        both = {((side, side), False), ((side, side), True)}
        assert all(found_ == both for found_ in shapes[8 * epoch : 8 * epoch + 8])


def test_classes_that_the_teacher_does_not_know_are_said(pair):
    pair.default_hooks.checkpoint = None  # MMEngine's own way to the loader
    pair.model.distillation.classes = dict(
        student=list(CLASSES), teacher=['green', 'white', 'red'])  # fmt: skip
    runner = train(pair)
    assert 'blue: never found, so background there' in log_of(runner)


class Labelling:
    """Stands for label_images where no image has been labelled before."""

    checked = labelled = False

    def __call__(self, *_, check, **__):
        self.checked = True
        check()
        self.labelled = True


@pytest.mark.parametrize('terms', ['on', 'off'])
@pytest.mark.parametrize('fault', ['a blind teacher', 'an order of classes'])
def test_what_makes_labels_worthless_is_found_before_they_are_made(pair, monkeypatch, terms, fault):
    if terms == 'off':
        pair.model.distillation = dict(pairs.off(), unlabelled=pair.model.distillation.unlabelled)
    pair.model.distillation.check_teacher = True
    pair.model.distillation.unlabelled.update(view='clean', threshold=0.2)
    monkeypatch.setattr('mmkd.engine.teacher_check.UNTRAINED', None)
    monkeypatch.setattr('mmkd.engine.labeller.UNTRAINED', None)
    monkeypatch.setattr(engine, 'UNTRAINED', None)
    for place in ('teacher_check', 'labeller_checks'):
        monkeypatch.setattr(f'mmkd.engine.{place}.BOXES', 1)
        # No teacher has it.
        monkeypatch.setattr(f'mmkd.engine.{place}.MIN_TRAIN_RECALL', 1.01)
    says, error = r'the teacher finds \d+ % of', TeacherError
    if fault == 'an order of classes':
        pair.train_dataloader.dataset.metainfo = dict(classes=('blue', 'green', 'red'))
        says, error = 'in the order of the file', ValueError
    monkeypatch.setattr(engine, 'label_images', labelling := Labelling())
    with pytest.raises(error, match=says):
        train(pair)
    assert labelling.checked and not labelling.labelled


def test_the_teacher_alone_numbers_classes_as_validation_does(pair):
    """No labelled image tells the order of the classes."""
    pair.model.distillation.unlabelled.share = 1.0
    pair.val_dataloader, pair.val_cfg = copy.deepcopy(pair.test_dataloader), dict(type='ValLoop')
    file = str(Path(pair.data_root, 'val.json'))
    pair.val_evaluator = dict(type='CocoMetric', ann_file=file, metric='bbox')
    pair.val_dataloader.dataset.metainfo = dict(classes=('blue', 'green', 'red'))
    with pytest.raises(ValueError, match='in the order of the file'):
        train(pair)


def test_photographs_are_turned_alike(pair, tmp_path):
    """A labels file has boxes of the turned image, which the student must see so too."""
    turned = tmp_path / 'camera.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (60, 40)).save(turned, exif=exif)
    upright = tmp_path / 'more' / 'deeper' / '100.png'
    one = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]
    other = [dict(type=LoadImageFromFile, color_type='color_ignore_orientation')]
    engine.require_same_orientation(one, other, [str(upright)])
    engine.require_same_orientation(other, other, [str(turned)])
    for student, teacher, said in ((one, other, "student's training"), (other, one, "teacher's")):
        with pytest.raises(ValueError, match=rf'the {said} .*pipeline turns .* on .*camera\.jpg'):
            engine.require_same_orientation(student, teacher, [str(upright), str(turned)])


def test_labels_of_more_classes_than_the_student_has(pair):
    model = mmkd.engine.runner.unwrap(RUNNERS.build(pair).model)
    engine.require_same_classes(model, list(CLASSES))
    with pytest.raises(ValueError, match='with 4 classes .* the student has 3, whose names'):
        engine.require_same_classes(model, [*CLASSES, 'white'])


def test_a_run_that_labels_ends_at_once(pair, monkeypatch):
    """By a signal, for no iteration ends there to which it could be deferred; by an error, without
    labelling all images once more."""
    seen = []

    def mixed(dataloader, *_):
        seen.append(signal.getsignal(signal.SIGTERM))
        raise Cut

    monkeypatch.setattr('mmkd.engine.runner.mixed_dataloader', mixed)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Cut):
        train(pair, 'signals')
    assert seen == [before] and signal.getsignal(signal.SIGTERM) == before


def test_hard_labels_alone_train(pair):
    pair.model.distillation = dict(pairs.off(), unlabelled=pair.model.distillation.unlabelled)
    said = log_of(train(pair))
    assert 'unlabelled_boxes' in said and 'loss_kd' not in said.split('loss: ')[-1]


def test_labels_of_clean_images_pass_the_students_transforms(pair, tmp_path):
    """And are made once; images are turned over, boxes with them."""
    pair.train_dataloader.dataset.pipeline[3].prob = 1.0
    pair.model.distillation = dict(pairs.off(), unlabelled=pair.model.distillation.unlabelled)
    cache = tmp_path / 'labels.json'
    pair.model.distillation.unlabelled.update(
        view='clean', threshold=0.262, ignore=0.26, cache=str(cache)
    )
    runner = train(pair)
    assert 'detects in the clean image' in log_of(runner)
    assert mmkd.engine.runner.unwrap(runner.model).teacher is None
    data, labels, made = runner.train_dataloader.dataset, read_labels(cache), cache.stat().st_mtime
    assert len(labels.images) == 6
    counts = [0, 0]
    for i in range(16, len(data)):
        sample = data[i]['data_samples']
        theirs = labels.images[str(Path(sample.img_path).relative_to(tmp_path / 'more'))]
        turned = torch.tensor([64, 0, 64, 0]) - torch.tensor(theirs.boxes)[:, [2, 1, 0, 3]]
        turned = turned * torch.tensor([1, -1, 1, -1])
        sure = torch.tensor(theirs.scores >= 0.262)
        between = torch.tensor(theirs.scores >= 0.26) & ~sure
        for k, (found_, mask) in enumerate((('gt', sure), ('ignored', between))):
            mine = sample.get(f'{found_}_instances')
            torch.testing.assert_close(mine.bboxes.tensor, turned[mask], rtol=0, atol=1e-3)
            assert mine.labels.tolist() == torch.tensor(theirs.labels)[mask].tolist()
            counts[k] += len(mine)
    assert min(counts) > 0
    train(pair, 'again')
    assert cache.stat().st_mtime == made


def test_boxes_of_clean_images_pass_crops_and_flips(pair, tmp_path):
    """Each at the place to which MMDetection's own matrix moves it, cut at the crop's border."""
    pair.train_dataloader.dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(96, 96), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(60, 60)),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs', meta_keys=('img_path', 'img_shape', 'homography_matrix')),
    ]
    boxes = [[20.0, 18.0, 30.0, 32.0], [20.0, 30.0, 64.0, 64.0]]
    paths = [str(path) for path in (tmp_path / 'more' / 'deeper').iterdir()]
    instances = {
        path: [dict(bbox=box, bbox_label=i, ignore_flag=i) for i, box in enumerate(boxes)]
        for path in paths[1:]
    }
    settings = Unlabelled(images=str(tmp_path / 'more'), view='clean', skip_unreadable=True)
    loader = Runner.build_dataloader(with_unlabelled(pair.train_dataloader, settings, instances))
    data, flips, counts = loader.dataset, set(), Counter()
    assert len(data.images) == 5 and f'{paths[0]} (no labels)' in data.images.passed_over
    for index in 4 * list(range(16, 21)):
        sample = data[index]['data_samples']
        matrix = torch.tensor(sample.homography_matrix)
        flips.add(bool(matrix[0, 0] < 0))
        for i, (box, kind) in enumerate(zip(boxes, ('gt', 'ignored'), strict=True)):
            x1, y1, x2, y2 = box
            ends = matrix @ torch.tensor([[x1, x2], [y1, y2], [1.0, 1.0]])
            expected = torch.cat([ends[:2].amin(1), ends[:2].amax(1)]).clamp(0, 60)
            mine = sample.get(f'{kind}_instances')
            if (expected[2:] > expected[:2]).all():
                torch.testing.assert_close(mine.bboxes.tensor, expected[None], rtol=0, atol=1e-3)
                assert mine.labels.tolist() == [i]
                counts[kind, bool((expected % 60 == 0).any())] += 1
            else:
                assert len(mine) == 0
    assert len(flips) == 2 and len(counts) >= 3


def test_scores_below_those_of_a_labels_file(pair, tmp_path):
    """The file holds what is asked for, if the teacher gives it."""
    teacher = Config.fromfile(pair.model.teacher_config)
    pair.model.distillation.unlabelled.update(view='clean', threshold=0.02, ignore=0.01)
    with pytest.raises(ValueError, match=r'no detection below 0\.05 .* 0\.01 is asked for'):
        train(pair)
    teacher.model.test_cfg.rcnn.score_thr = 0.0
    teacher.dump(pair.model.teacher_config)
    runner = train(pair)
    labels = read_labels(Path(runner.work_dir, 'unlabelled_labels.json'))
    assert labels.info['min_score'] == 0.01


def test_thresholds_may_be_found_on_validation_images(pair, tmp_path, monkeypatch, capsys):
    pair.model.distillation.unlabelled.threshold = 'auto'
    asked = []

    def best_thresholds(cfg, out, teacher, clean_view, check):
        asked.append((Path(out).parent.name, teacher.source, clean_view))
        return [SimpleNamespace(score=score) for score in (0.2, 0.3, 0.25)]

    monkeypatch.setattr(engine, 'best_thresholds', best_thresholds)
    runner = train(pair)
    assert asked == [('run', 'random', False)]
    assert mmkd.engine.runner.unwrap(runner.model).unlabelled.thresholds == [0.2, 0.3, 0.25]
    assert '0.2, 0.3, 0.25 (auto)' in log_of(runner)
    # A step that is taken again has them, and asks nobody.
    step = runner._steps.save(runner, mmkd.engine.runner.unwrap(runner.model))
    monkeypatch.setattr(engine, 'best_thresholds', None)
    pair.dump(tmp_path / 'pair.py')
    capsys.readouterr()
    assert replay.main([str(tmp_path / 'pair.py'), step]) == 0
    assert 'the outputs of all modules are finite' in capsys.readouterr().out


def test_validation_images_among_the_unlabelled_are_a_leak(pair, tmp_path, monkeypatch):
    for split in ('val', 'train'):
        copied = Path(pair.data_root, 'images', f'{split}_003.png').read_bytes()
        (tmp_path / 'more' / f'{split}.png').write_bytes(copied)
    pair.test_dataloader.dataset.ann_file = 'val.json'
    with pytest.raises(engine.LeakError, match=r'1 test images are among .*val\.png is .*val_003'):
        train(pair)
    # Before the teacher has looked at a single image.
    monkeypatch.setattr(engine, 'label_images', None)
    monkeypatch.setattr(engine, 'best_thresholds', None)
    for entry in (dict(view='clean'), dict(threshold='auto')):
        before = copy.deepcopy(pair.model.distillation.unlabelled)
        pair.model.distillation.unlabelled.update(entry)
        with pytest.raises(engine.LeakError, match='1 test images are among'):
            train(pair)
        pair.model.distillation.unlabelled = before
    (tmp_path / 'more' / 'val.png').unlink()
    # A labelled image may be there, and is said.
    assert '1 labelled images are among the unlabelled ones' in log_of(train(pair))


def test_a_leak_is_found_by_any_path_and_by_its_bytes(pair, tmp_path):
    here = Path(pair.data_root, 'images', 'val_003.png')
    folder, other = tmp_path / 'more', tmp_path / 'other.png'
    (tmp_path / 'linked').symlink_to(here.parent)
    (folder / 'soft.png').symlink_to(here)
    (folder / 'hard.png').hardlink_to(here)
    (folder / 'copy.PNG').write_bytes(here.read_bytes())
    other.write_bytes(bytes([here.read_bytes()[0] ^ 1]) + here.read_bytes()[1:])
    held_out = dict(validation=pair.test_dataloader.dataset)
    for path in (here, tmp_path / 'linked' / here.name, here.parent / '..' / 'images' / here.name,
                 *(folder / name for name in ('soft.png', 'hard.png', 'copy.PNG'))):  # fmt: skip
        with pytest.raises(engine.LeakError, match='1 validation images .* list the others'):
            engine.refuse_leaks([str(folder / 'deeper' / '100.png'), str(path)], held_out)
    engine.refuse_leaks([str(other), str(here.with_name('train_003.png'))], held_out)
    # All images of the data set lie in one folder.
    pair.model.distillation.unlabelled.images = str(here.parent)
    with pytest.raises(engine.LeakError, match='8 test images are among'):
        train(pair)


def test_a_teacher_that_finds_next_to_nothing_stops_the_run(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, 'LOOKED', 6)
    pair.model.distillation.unlabelled.threshold = 0.9
    pair.model.distillation.check_teacher = True
    weights = tmp_path / 'teacher.pth'
    torch.save(pairs.build(Config.fromfile(pair.model.teacher_config).model).state_dict(), weights)
    pair.model.teacher_ckpt = str(weights)
    monkeypatch.setattr('mmkd.engine.training_checks.check_teacher', lambda *_: 'teacher check: ok')
    with pytest.raises(TeacherError, match=r'on 0 of the first 6 unlabelled .* threshold 0\.9'):
        train(pair)
    pair.model.distillation.check_teacher = False
    train(pair, 'told so')


def test_a_loop_of_ones_own_needs_the_images(pair):
    model = mmkd.engine.runner.unwrap(RUNNERS.build(pair).model)
    plain = Runner.build_dataloader(pair.train_dataloader)
    with pytest.raises(RuntimeError, match=re.escape('mmkd.guard(model, train_dataloader)')):
        model.train()(**model.data_preprocessor(next(iter(plain)), True), mode='loss')
    with pytest.raises(ValueError, match='mmkd.mixed_dataloader'):
        mmkd.guard(model, plain)
    loader = Runner.build_dataloader(mmkd.mixed_dataloader(pair.train_dataloader, model))
    mmkd.guard(model, loader)
    values = model(**model.data_preprocessor(next(iter(loader)), True), mode='loss')
    assert 'unlabelled_boxes' in values


def test_a_loop_of_ones_own_may_have_clean_images_labelled(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair.model.distillation.unlabelled.update(view='clean', threshold=0.26)
    model = mmkd.engine.runner.unwrap(RUNNERS.build(pair).model)
    with pytest.raises(
        ValueError, match=r"view='clean' .*mixed_dataloader\(dataloader, model, cfg"
    ):
        mmkd.mixed_dataloader(pair.train_dataloader, model)
    loader = Runner.build_dataloader(mmkd.mixed_dataloader(pair.train_dataloader, model, pair))
    mmkd.guard(model, loader)
    assert len(read_labels('unlabelled_labels.json').images) == 6
    batch = next(iter(loader))
    boxes = [len(s.gt_instances) for s in batch['data_samples'] if s.get(MARK)]
    values = model.train()(**model.data_preprocessor(batch, True), mode='loss')
    assert float(values['unlabelled_boxes']) == sum(boxes) / 2 > 0


@pytest.mark.slow
@cpu_only
def test_two_processes_share_images_and_labels(pair, tmp_path):
    pair.model.distillation.unlabelled.update(view='clean', threshold=0.26)
    pair.runner_type = 'mmkd.DistillationRunner'
    pair.dump(tmp_path / 'pair.py')
    args = ['dist_train.sh', tmp_path / 'pair.py', 2, '--work-dir', tmp_path / 'work']
    (output,) = finish(start(*args, PORT=free_port(), **warmed()))
    assert 'Distributed training: True' in output and '6 images; 2 of 4 in each batch' in output
    # 16 labelled images, two processes of 2 each, beside 2 unlabelled ones.
    assert read_checkpoint(latest_checkpoint(str(tmp_path / 'work')))['meta']['iter'] == 4
    assert len(read_labels(tmp_path / 'work' / 'unlabelled_labels.json').images) == 6
