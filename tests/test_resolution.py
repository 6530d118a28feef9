"""The second setting: two views of one image, and each comparison at one place of it."""

import copy
import importlib
from types import SimpleNamespace

import cv2
import mmcv
import numpy as np
import pairs
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.models.task_modules import AnchorGenerator
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.registry import RUNNERS
from pairs import ROOT, batch, losses, recipe
from tiny import tiny_config
from torch import nn
from torch.nn import functional as F

from mmkd.analysis.comparison import plan_runs
from mmkd.datasets.two_views import apply_resolution, at_teachers_scale, rescale
from mmkd.engine.summary import startup_table
from mmkd.engine.training_checks import TrainingChecksHook
from mmkd.models.step import resample
from mmkd.options.anchor_match import SAME, AnchorMatch
from mmkd.options.resolution import Resolution, View

PACK = dict(type='PackDetInputs', meta_keys=('img_shape', 'scale_factor', 'flip'))
RESIZE = dict(type='Resize', scale=(120, 72), keep_ratio=True)
CROP = dict(type='RandomCrop', crop_size=(0.6, 0.7), crop_type='relative', allow_negative_crop=True)
PIPELINES = {
    'resize': [RESIZE],
    'flip': [RESIZE, dict(type='RandomFlip', prob=[0.4, 0.3, 0.3],
                          direction=['horizontal', 'vertical', 'diagonal'])],
    'one size': [dict(type='Resize', scale=(101, 67), keep_ratio=False)],
    'sizes': [dict(type='RandomChoiceResize', scales=[(120, 60), (120, 72)], keep_ratio=True),
              dict(type='RandomFlip', prob=0.5)],
    'range': [dict(type='RandomResize', scale=[(120, 50), (120, 72)], keep_ratio=True)],
    'crop': [RESIZE, dict(type='RandomFlip', prob=0.5), CROP],
    'all': [dict(type='RandomChoiceResize', scales=[(120, 60), (120, 72)], keep_ratio=True), CROP,
            dict(type='RandomFlip', prob=0.5), RESIZE],
}  # fmt: skip


def picture(height=150, width=217):
    """Green rises along x, red along y: a pixel says where it is."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([np.zeros_like(x), x, y], -1)


def two_views(transforms, image, ratio=2.0, seed=0):
    large = tuple(round(ratio * edge) for edge in (120, 72))
    views = TRANSFORMS.build(
        dict(type='mmkd.TwoViews', transforms=[*copy.deepcopy(transforms), PACK],
             student=(120, 72), teacher=large)
    )  # fmt: skip
    np.random.seed(seed)
    packed = views(dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2]))
    view = packed['data_samples'].teacher_view
    return packed, view


# ---------------------------------------------------------------------------- the two views


@pytest.mark.parametrize('name', PIPELINES)
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_students_view_is_plain_mmdetections(name, seed):
    """TeacherInputs, boxes and the state of the random numbers behind it, to the bit."""
    image = np.random.default_rng(3).integers(0, 256, (150, 217, 3), dtype=np.uint8)
    pad = dict(type='Pad', size_divisor=8)
    transforms = [*PIPELINES[name], dict(type='PhotoMetricDistortion'), pad]
    packed, _ = two_views(transforms, image, seed=seed)
    after = np.random.get_state()[1:3]
    np.random.seed(seed)
    plain = Compose([TRANSFORMS.build(copy.deepcopy(t)) for t in [*transforms, PACK]])
    alone = plain(dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2]))
    assert torch.equal(packed['inputs'], alone['inputs'])
    assert packed['data_samples'].metainfo == alone['data_samples'].metainfo
    assert all(np.array_equal(a, b) for a, b in zip(after, np.random.get_state()[1:3], strict=True))


@pytest.mark.parametrize('name', PIPELINES)
@pytest.mark.parametrize('ratio', [1.5, 2.0, 3.0])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_both_views_show_one_place(name, ratio, seed):
    """What a pixel says of where it is: half a pixel off is 0.5 grey levels or more."""
    image = picture()
    packed, view = two_views(PIPELINES[name], image, ratio, seed)
    small, large = (t[1:].float() for t in (packed['inputs'], view.img))
    filled = packed['data_samples'].img_shape
    y, x = torch.meshgrid(*(torch.arange(4.0, edge - 4) for edge in filled), indexing='ij')
    place = torch.stack([x, y], -1) + 0.5
    there = place * torch.tensor(view.scale) + torch.tensor(view.offset)
    grid = 2 * there / torch.tensor(large.shape[:0:-1]) - 1
    sampled = F.grid_sample(large[None], grid[None].float(), align_corners=False)[0]
    error = sampled - small[:, 4 : filled[0] - 4, 4 : filled[1] - 4]
    # Grey levels are whole, so both views round. Of the original a pixel of the student is 1.5 or
    # more, so half a pixel off would be 0.75 on average.
    assert error.mean((1, 2)).abs().max() < 0.3
    assert error.abs().mean() < 0.6


@pytest.mark.parametrize('direction', ['horizontal', 'vertical', 'diagonal'])
@pytest.mark.parametrize('seed', range(4))
def test_a_flip_behind_a_crop_mirrors_the_place(direction, seed):
    """The crop leaves a fraction of a pixel, which the flip moves to the other side."""
    image = picture(144, 240)
    flip = dict(type='RandomFlip', prob=1.0, direction=direction)
    packed, straight = two_views([RESIZE, CROP], image, 1.3, seed)
    _, mirrored = two_views([RESIZE, CROP, flip], image, 1.3, seed)
    small, large = (np.array(t.shape[:0:-1]) for t in (packed['inputs'], straight.img))
    assert np.any(straight.offset)
    place = np.array([3.0, 5.0])
    turned = np.array([direction != 'vertical', direction != 'horizontal'])
    there = np.array(straight.scale) * place + straight.offset
    want = np.where(turned, large - there, there)
    place = np.where(turned, small - place, place)
    np.testing.assert_allclose(np.array(mirrored.scale) * place + mirrored.offset, want)


def test_the_teachers_view_is_made_of_the_decoded_image():
    """Not of the student's: at the scale of the file it is the file."""
    image = np.random.default_rng(0).integers(0, 256, (144, 240, 3), dtype=np.uint8)
    _, view = two_views([RESIZE], image, ratio=2.0)
    assert np.array_equal(view.img.permute(1, 2, 0).numpy(), image)
    assert view.scale == (2.0, 2.0)
    assert view.offset == (0.0, 0.0)


def test_colours_are_drawn_once():
    image = np.full((144, 240, 3), 90, np.uint8)
    for seed in range(5):
        packed, view = two_views([RESIZE, dict(type='PhotoMetricDistortion')], image, seed=seed)
        assert (packed['inputs'][:, 0, 0].float() == view.img[:, 0, 0].float()).all()


def test_several_scales_keep_the_ratio():
    seen = set()
    for seed in range(8):
        packed, view = two_views(PIPELINES['sizes'], picture(150, 200), ratio=2.0, seed=seed)
        assert view.img.shape[1:] == tuple(2 * edge for edge in packed['inputs'].shape[1:])
        seen.add(tuple(packed['inputs'].shape[1:]))
    assert seen == {(60, 80), (72, 96)}


@pytest.mark.parametrize(
    'transform',
    [dict(type='Mosaic'), dict(type='RandomAffine'), dict(type='Pad', size=(64, 64))],
)
def test_choices_that_cannot_be_shared_are_refused(transform):
    with pytest.raises(ValueError, match=f'(?s){transform["type"]}.*cannot be shared.*RandomFlip'):
        TRANSFORMS.build(
            dict(type='mmkd.TwoViews', transforms=[transform, PACK], student=(8, 8),
                 teacher=(16, 16))
        )  # fmt: skip


# ------------------------------------------------------------------------- the two scales


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(student=(8, 8)), 'names no scale for the teacher: give both'),
        (dict(teacher=(8, 8)), 'names no scale for the student: give both'),
        (dict(student=(16, 8), teacher=(8, 8)), r'fewer pixels.*Swap the two.*reason'),
        (dict(student=(8, 0), teacher=(8, 8)), r'resolution.student=\(8, 0\) must be a pair'),
        (dict(student=8, teacher=(8, 8)), 'resolution.student=8 must be a pair'),
        (dict(student=(8, 8), teachers=(8, 8)), "no entry 'teachers'; did you mean teacher"),
        ((8, 8), r'must be dict\(student'),
        ('dict(student=(8, 8), teacher=(16, 16))', r'must be dict\(student'),
        (8, r'must be dict\(student'),
    ],
)
def test_a_resolution_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Resolution.of(given)
    model = pairs.distilled(pairs.fpn(), pairs.fpn(), dict(recipe(), resolution=given))
    for build in (MODELS.build, as_config(apply_resolution), as_config(at_teachers_scale)):
        with pytest.raises(ValueError, match=message):
            build(model)


def as_config(function):
    return lambda model: function(Config(dict(model=model)))


def test_a_recipe_that_is_no_dict_is_refused_in_words():
    model = pairs.distilled(pairs.fpn(), pairs.fpn(), 'none')
    for build in (MODELS.build, as_config(apply_resolution)):
        with pytest.raises(ValueError, match="distillation='none' must be a dict"):
            build(model)


def test_a_scale_keeps_its_order_of_edges():
    """Without keep_ratio MMDetection's scale is (width, height), upright ones included."""
    upright = Resolution((40, 64), (80, 128))
    assert upright.student == (40, 64)
    assert upright.enlarge((40, 64)) == (80, 128)
    resize = dict(type='Resize', keep_ratio=False)
    assert rescale({**resize, 'scale': (64, 64)}, (40, 64))['scale'] == (40, 64)
    assert rescale({**resize, 'scale': 64}, (40, 64))['scale'] == (40, 64)
    with pytest.raises(ValueError, match=r'scales=\[480, 512\].*each as a pair'):
        rescale(dict(type='RandomChoiceResize', scales=[480, 512]), (40, 64))


def test_a_reason_allows_fewer_pixels():
    assert Resolution((16, 8), (8, 8), 'what the teacher was trained on').ratio == 1


def config_of(tmp_path, resolution, distillation=None, pipeline=None):
    """A distilled tiny config with two scales."""
    base = tiny_config(tmp_path, 'plain')
    path = tmp_path / 'pair.py'
    recipe_ = dict(distillation or recipe(), resolution=resolution)
    path.write_text(
        f'_base_ = {str(base)!r}\n'
        "model = dict(type='mmkd.KnowledgeDistillationTwoStageDetector',\n"
        f'    teacher_config={str(base)!r}, teacher_ckpt="random", distillation={recipe_!r})\n'
        "runner_type = 'mmkd.DistillationRunner'\n"
        + (f'train_dataloader = dict(dataset=dict(pipeline={pipeline!r}))\n' if pipeline else '')
    )
    return Config.fromfile(path)


TWICE = dict(student=(64, 64), teacher=(128, 128))


def test_a_config_names_the_scales_and_nothing_else(tmp_path):
    cfg = apply_resolution(config_of(tmp_path, dict(student=(48, 40), teacher=(96, 80))))
    load, views = cfg.train_dataloader.dataset.pipeline
    assert load['type'] == 'LoadImageFromFile'
    assert views['type'] == 'mmkd.TwoViews'
    assert [t['type'] for t in views['transforms']] == [
        'LoadAnnotations', 'Resize', 'RandomFlip', 'PackDetInputs']  # fmt: skip
    assert views['transforms'][1]['scale'] == (48, 40)
    for split in ('val', 'test'):
        (scale,) = (t['scale'] for t in cfg[f'{split}_dataloader'].dataset.pipeline if 'scale' in t)
        assert scale == (48, 40)
    assert apply_resolution(cfg).to_dict() == cfg.to_dict()


def test_with_every_term_off_it_is_the_plain_config_at_that_scale(tmp_path):
    """So the baseline of a comparison is the plain student: one run, by its key."""
    cfg = config_of(tmp_path, dict(student=(48, 48), teacher=(64, 64)))
    plain = tmp_path / 'plain_48.py'
    text = (tmp_path / 'plain.py').read_text()
    plain.write_text(text.replace('scale=(64, 64)', 'scale=(48, 48)'))
    plan = plan_runs([cfg.filename], [0], [str(plain)])
    assert plan.comparisons[0].baseline is plan.plain[0]
    pipeline = plan.comparisons[0].distilled.runs[0].test_cfg.test_dataloader.dataset.pipeline
    assert [t['scale'] for t in pipeline if 'scale' in t] == [(48, 48)]


def test_the_teacher_is_tested_at_its_own_scale(tmp_path):
    cfg = config_of(tmp_path, TWICE)
    weights = tmp_path / 'teacher.pth'
    weights.write_bytes(b'x')
    plan = plan_runs([cfg.filename], [0], options=[f'model.teacher_ckpt={weights}'])
    (run,) = plan.comparisons[0].teacher.runs
    pipeline = run.test_cfg.test_dataloader.dataset.pipeline
    assert [t['scale'] for t in pipeline if 'scale' in t] == [(128, 128)]


def test_several_scales_keep_their_proportions(tmp_path):
    pipeline = [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomChoiceResize', scales=[(1333, 640), (1333, 800)], keep_ratio=True),
        dict(type='PackDetInputs'),
    ]  # fmt: skip
    cfg = apply_resolution(
        config_of(tmp_path, dict(student=(667, 400), teacher=(1333, 800)), pipeline=pipeline)
    )
    views = cfg.train_dataloader.dataset.pipeline[1]
    assert views['transforms'][1]['scales'] == [(667, 320), (667, 400)]


@pytest.mark.parametrize(
    ('pipeline', 'message'),
    [
        (['LoadImageFromFile', 'PackDetInputs'], 'train pipeline has no transform that resizes'),
        (['Resize', 'PackDetInputs'], 'loads no image'),
        (['LoadImageFromFile', 'factor', 'PackDetInputs'], 'by a factor'),
    ],
)
def test_a_pipeline_without_a_scale_is_refused(tmp_path, pipeline, message):
    known = {'Resize': RESIZE, 'factor': dict(type='Resize', scale_factor=0.5)}
    cfg = config_of(tmp_path, TWICE, pipeline=[known.get(t, dict(type=t)) for t in pipeline])
    with pytest.raises(ValueError, match=message):
        apply_resolution(cfg)


def test_a_run_trains_at_both_scales_and_decodes_once(tmp_path, monkeypatch):
    cfg = config_of(tmp_path, TWICE)
    decoded = []
    original = mmcv.imfrombytes
    monkeypatch.setattr(mmcv, 'imfrombytes', lambda *a, **k: decoded.append(1) or original(*a, **k))
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = RUNNERS.build(cfg)
    seen = []
    runner.model.teacher.network.backbone.register_forward_hook(
        lambda module, args, out: seen.append(tuple(args[0].shape))
    )
    table = startup_table(runner.model)
    assert '128x128, where the student sees 64x64' in table
    assert 'levels 0 -> 1, 1 -> 2, 2 -> 3, 3 -> 4' in table
    assert '99.7 % of the student' in table
    runner.train()
    assert seen == [(4, 3, 128, 128)] * 4
    assert len(decoded) == 16


def test_without_the_runner_the_missing_view_is_named():
    model = pairs.distil(pairs.fpn(), None, dict(recipe(), resolution=TWICE))
    with pytest.raises(RuntimeError, match='no second view.*mmkd.TwoViews'):
        losses(model)


def test_a_batch_that_changes_behind_the_pipeline_is_refused():
    student = pairs.fpn()
    student.data_preprocessor.batch_augments = [
        dict(type='BatchSyncRandomResize', random_size_range=(32, 64), interval=1)
    ]
    with pytest.raises(ValueError, match='BatchSyncRandomResize.*another place'):
        pairs.distil(student, pairs.fpn(), dict(recipe(), resolution=TWICE))


def test_one_scale_for_both_is_the_path_of_one_resolution():
    """Ratio 1: the same losses to the bit, with no second view."""
    same = dict(student=(64, 64), teacher=(64, 64))
    values = []
    for distillation in (recipe(), dict(recipe(), resolution=same)):
        values.append(losses(pairs.distil(pairs.fpn(), pairs.fpn(8), distillation)))
    assert values[0].keys() == values[1].keys()
    for one, other in zip(values[0].values(), values[1].values(), strict=True):
        flat = [torch.stack(v if isinstance(v, list) else [v]) for v in (one, other)]
        assert torch.equal(*flat)


# ------------------------------------------------------------------------------- anchors


def generator(strides=(4, 8, 16, 32), scales=(8,), ratios=(0.5, 1.0, 2.0), **kwargs):
    return AnchorGenerator(
        strides=list(strides), scales=list(scales), ratios=list(ratios), **kwargs
    )


def brute_force(student, teacher, sizes, own_sizes, scale):
    """For each of the student's anchors the teacher's with the largest IoU, and that IoU."""
    own = torch.cat(student.grid_priors(own_sizes, device='cpu')) * scale
    theirs = torch.cat(teacher.grid_priors(sizes, device='cpu'))
    common = torch.minimum(own[:, None, 2:], theirs[:, 2:]) - torch.maximum(
        own[:, None, :2], theirs[:, :2]
    )
    overlap = common.clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (own, theirs)]
    return (overlap / (areas[0][:, None] + areas[1] - overlap)).max(1)


@pytest.mark.parametrize('ratio', [1.0, 1.5, 1.9985, 2.0, 3.0, 4.0])
@pytest.mark.parametrize(
    'changes',
    [{}, dict(center_offset=0.5), dict(octave_base_scale=4, scales_per_octave=3, scales=None)],
    ids=['paper', 'centred', 'octaves'],
)
def test_an_anchor_answers_where_it_is_the_same_box(ratio, changes):
    """Against every pair of anchors, one by one."""
    if 'octave_base_scale' in changes:
        own = AnchorGenerator(strides=[4, 8, 16, 32], ratios=[1.0], **changes)
    else:
        own = generator(ratios=(0.5, 1.0), **changes)
    match = AnchorMatch(own, own, ratio)
    own_sizes = [(16, 20), (8, 10), (4, 5), (2, 3)]
    sizes = [tuple(int(np.ceil(edge * ratio)) for edge in size) for size in own_sizes]
    iou, best = brute_force(own, own, sizes, own_sizes, ratio)
    first = 0
    view = View(torch.full((1, 2), ratio, dtype=torch.float64), torch.zeros(1, 2))
    total = 0
    for level, size in enumerate(own_sizes):
        count = size[0] * size[1] * own.num_base_anchors[level]
        found, row, *_ = match(level, torch.arange(count), size, sizes, 1, view)
        expected = iou[first : first + count] >= SAME
        assert torch.equal(found, expected)
        assert torch.equal(row[found], best[first : first + count][found])
        total += int(found.sum())
        first += count
    assert (total == 0) == (match.share == 0)
    assert (match.share > 0) == (ratio in (1.0, 1.9985, 2.0, 4.0))


def test_of_two_levels_with_an_anchor_of_one_size_the_nearer_stride_answers():
    own = AnchorGenerator(strides=[8], ratios=[1.0], scales=[4])
    both = AnchorGenerator(strides=[8, 16], ratios=[1.0], base_sizes=[8, 8], scales=[8])
    assert AnchorMatch(own, both, 2.0).kinds[0].tolist() == [[1, 0]]
    both = AnchorGenerator(strides=[8, 16], ratios=[1.0], base_sizes=[8, 8], scales=[4])
    assert AnchorMatch(own, both).kinds[0].tolist() == [[0, 0]]


def test_ratio_1_is_the_identity():
    own = generator()
    match = AnchorMatch(own, own)
    sizes = [(16, 20), (8, 10), (4, 5), (2, 3)]
    images, first = 2, 0
    for level, (height, width) in enumerate(sizes):
        rows = torch.arange(images * height * width * 3)
        found, row, box, theirs = match(level, rows, sizes[level], sizes, images, None)
        assert found.all()
        assert torch.equal(row, rows + first)
        assert torch.equal(box, theirs)
        first += len(rows)
    assert match.share == 1


def test_an_rpn_with_another_coder_answers_in_the_students_frame():
    """One network, its deltas in other units: the same boxes, so the same rows."""
    other = pairs.fpn()
    stds = [0.1, 0.2, 0.4, 0.5]
    other.rpn_head.bbox_coder.target_stds = stds
    model = pairs.distil(pairs.fpn(), other, recipe('rpn_cls', 'rpn_bbox'))
    pairs.teach_itself(model)
    head = model.teacher.network.rpn_head.rpn_reg
    with torch.no_grad():
        head.weight /= torch.tensor(stds).repeat(3)[:, None, None, None]
    heard = pairs.spy(model)
    losses(model)
    for name in ('rpn_cls', 'rpn_bbox'):
        own, theirs = heard[name][0][:2]
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_anchors_of_another_level_are_matched_at_one_resolution():
    """A teacher with sides twice as large: the student's level l + 1 is its level l."""
    other = pairs.fpn()
    other.rpn_head.anchor_generator.scales = [8]
    model = pairs.distil(pairs.fpn(), other, recipe())
    assert model.sites['rpn'].match.levels == '1 -> 0, 2 -> 1, 3 -> 2, 4 -> 3'
    assert model.sites['rpn'].match.share == pytest.approx(1 - 256 / (256 + 64 + 16 + 4 + 1))
    values = losses(model, batch(size=128, sides=(30, 80)))
    assert values['loss_kd_rpn_cls'] > 0


def test_half_a_cell_off_is_another_anchor():
    """The teacher's grid is moved by half a cell: nothing answers at stride 8 · side 16."""
    own, moved = generator(scales=(2,)), generator(scales=(2,), center_offset=0.5)
    match = AnchorMatch(own, moved)
    sizes = [(16, 20), (8, 10), (4, 5), (2, 3)]
    found, *_ = match(0, torch.arange(16 * 20 * 3), sizes[0], sizes, 1, None)
    assert not found.any()
    assert match.share == 0
    with pytest.raises(ValueError, match="no anchor of the student is one of the teacher's"):
        other = pairs.fpn()
        other.rpn_head.anchor_generator.center_offset = 0.5
        pairs.distil(pairs.fpn(), other, recipe())


def test_a_grid_that_is_moved_by_whole_cells_on_some_levels_answers_on_these():
    """CrowdDet's anchors stand 8 pixels aside on every level: too far where a cell is larger."""
    aside = pairs.fpn()
    aside.rpn_head.anchor_generator.centers = [(8, 8)] * 5
    model = pairs.distil(aside, pairs.fpn(), recipe())
    assert model.sites['rpn'].match.levels == '0 -> 0, 1 -> 1'
    # Where ground truth meets none of them the term stays 0, and the warning says why.
    guard, said = TrainingChecksHook(), []
    guard.digests = {'a': ''}
    runner = SimpleNamespace(model=model, iter=0, logger=SimpleNamespace(warning=said.append))
    for _ in range(60):
        outputs = {'loss_kd_rpn_cls': torch.zeros(()), 'loss_kd_hint': torch.ones(())}
        guard.after_train_iter(runner, 0, None, outputs)
    assert len(said) == 1
    share = f'{100 * model.sites["rpn"].match.share:.0f} %'
    assert f"network. {share} of the student's anchors are the teacher's too (levels 0" in said[0]


@pytest.mark.parametrize('ratio', [1.5, 3.0])
def test_where_no_anchor_matches_the_rpn_terms_are_off_and_said(ratio):
    resolution = dict(student=(64, 64), teacher=(round(64 * ratio), round(64 * ratio)))
    model = pairs.distil(pairs.fpn(), None, dict(recipe(), resolution=resolution))
    assert set(model.kd_terms) == {'rcnn_cls', 'rcnn_bbox', 'hint'}
    table = startup_table(model)
    assert f'OFF: no anchor has a counterpart at ratio {ratio:g}' in table
    with pytest.raises(ValueError, match='RPN terms alone'):
        pairs.distil(pairs.fpn(), None, dict(recipe('rpn_cls', 'rpn_bbox'), resolution=resolution))


# --------------------------------------------------------------------------------- hints


@pytest.mark.parametrize('cells', [(13, 17), (16, 24)])
@pytest.mark.parametrize('ratio', [(2.0, 2.0), (1.5, 1.4925), (3.0, 3.0), (1.0, 1.0)])
@pytest.mark.parametrize('strides', [(4, 4), (8, 16), (16, 8)])
@pytest.mark.parametrize('offset', [(0.0, 0.0), (0.4, -0.3)])
def test_a_hint_is_read_at_the_place_of_each_cell(cells, ratio, strides, offset):
    """The teacher's map says where in the student's image each of its cells is."""
    own, other = strides
    extent = [cells[0] * own * ratio[1] + 8, cells[1] * own * ratio[0] + 8]
    y, x = (torch.arange(int(edge // other) + 1) + 0.5 for edge in extent)
    maps = torch.stack(torch.meshgrid(y * other, x * other, indexing='ij'))[None]
    scale = torch.tensor([ratio], dtype=torch.float64)
    view = View(scale, torch.tensor([offset], dtype=torch.float64))
    said = resample(maps, torch.zeros(1, 5, *cells), strides, view)[0]
    want_y = (torch.arange(cells[0]) + 0.5) * own * ratio[1] + offset[1]
    want_x = (torch.arange(cells[1]) + 0.5) * own * ratio[0] + offset[0]
    error = torch.stack([said[0] - want_y[:, None], said[1] - want_x[None]])
    # Beyond the middle of the outermost cell there is nothing to interpolate with.
    inner = error[:, 2:-2, 2:-2].abs().max()
    assert inner < 0.01 * min(own, other)
    assert inner < other / 2  # half a cell off would fail


def test_grids_that_are_one_are_not_touched():
    hint, guided = torch.rand(2, 3, 8, 8), torch.rand(2, 5, 8, 8)
    assert resample(hint, guided, (4, 4)) is hint
    assert resample(hint, guided) is hint


# ------------------------------------------------------------ one image, two resolutions


@MODELS.register_module()
class BlockMeans(nn.Module):
    """A backbone that sees no further than a cell: means over blocks of 4, 8, 16, 32 pixels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def init_weights(self):
        pass

    def forward(self, images):
        return tuple(F.avg_pool2d(images * self.scale, size) for size in (4, 8, 16, 32))


def block_pair(size, terms=(), **changes):
    """Student and teacher of one kind, and a batch whose large view is each pixel doubled."""
    student = pairs.fpn()
    student.backbone = dict(type='BlockMeans')
    del student['neck']
    student.rpn_head.update(in_channels=3)
    student.rpn_head.anchor_generator.update(strides=[4, 8, 16, 32], scales=[4], ratios=[1.0])
    student.roi_head.bbox_roi_extractor.update(
        out_channels=3, featmap_strides=[4, 8, 16, 32], finest_scale=8
    )
    student.roi_head.bbox_head.update(in_channels=3)
    hint = dict(pairs=[dict(student=f'backbone[{i}]', teacher=f'backbone[{i + 1}]')
                       for i in range(3)])  # fmt: skip
    distillation = dict(recipe(*terms, hint=hint), resolution=TWICE)
    model = pairs.distil(student, None, distillation)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('kd_terms.')}
    model.teacher.network.load_state_dict(state, strict=True)
    for adapter in model.kd_terms['hint'].adapters.values():
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    data = batch((3, 2), size, sides=(8, 30))
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        # Both views of real images are padded alike; here each pixel is a block of four.
        pairs.second_view(sample, image.repeat_interleave(2, 1).repeat_interleave(2, 2))
    return model, data


@pytest.mark.parametrize('size', [64, (64, 96), (50, 77)])
def test_a_doubled_image_is_answered_alike(size):
    """Constant blocks: rows of the RPN, rows of the RoI head and hints agree at ratio 2."""
    model, data = block_pair(size)
    heard = pairs.spy(model)
    asked = []
    score_rois = model.teacher.score_rois
    model.teacher.score_rois = lambda *a: asked.append(a[1]) or score_rois(*a)
    labels = []
    model.roi_head.bbox_head.loss_cls.register_forward_hook(
        lambda module, args, out: labels.append(args[1])
    )
    values = losses(model, data)
    extractor = model.roi_head.bbox_roi_extractor
    levels = [extractor.map_roi_levels(torch.cat([asked[0][:, :1], asked[0][:, 1:] / by], 1), 4)
              for by in (2, 1)]  # fmt: skip
    # Where neither is at the end of its pyramid, each reads its own level, of the same cells.
    comparable = levels[1] == levels[0] + 1
    assert comparable.float().mean() > 0.5
    for name in ('rpn_cls', 'rpn_bbox', 'rcnn_cls', 'rcnn_bbox'):
        own, theirs = heard[name][0][:2]
        if name.startswith('rcnn'):
            chosen = comparable if name == 'rcnn_cls' else comparable[labels[0] < pairs.CLASSES]
            own, theirs = own[chosen], theirs[chosen]
        assert len(own) > 2
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    # 64 anchors an image, those of the coarsest level excepted.
    assert len(heard['rpn_cls'][0][0]) > 100
    assert values['loss_kd_hint'] < 1e-8


def test_half_a_cell_would_be_seen():
    """The same with the large view moved by half a cell of the finest map, two of its pixels."""
    model, data = block_pair(64)
    for sample in data['data_samples']:
        image = sample.teacher_view.img
        pairs.second_view(sample, image.roll((4, 4), (1, 2)))
    heard = pairs.spy(model)
    values = losses(model, data)
    for name in ('rpn_cls', 'rcnn_cls'):
        own, theirs = heard[name][0][:2]
        assert (own - theirs).abs().max() > 1e-4  # ten times what is allowed where they agree
    assert values['loss_kd_hint'] > 1e-3


def test_a_pair_may_differ_in_both():
    """Another network and another resolution at once; every term steps."""
    model = pairs.distil(pairs.fpn(4), pairs.fpn(8), dict(recipe(), resolution=TWICE))
    data = batch()
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        pairs.second_view(sample, image.repeat_interleave(2, 1).repeat_interleave(2, 2))
    values = losses(model, data)
    pairs.total(model, values).backward()
    assert {k for k in values if 'kd' in k} == set(pairs.LOG_NAMES.values())
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())


def test_the_teachers_own_preprocessor_makes_its_view():
    teacher = pairs.fpn(8)
    teacher.data_preprocessor.update(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=False)
    model = pairs.distil(pairs.fpn(), teacher, dict(recipe('hint'), resolution=TWICE))
    data = batch((1,))
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    pairs.second_view(data['data_samples'][0], image)
    seen = []
    network = model.teacher.network
    network.backbone.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    losses(model, data)
    assert torch.equal(seen[0], network.data_preprocessor(dict(inputs=[image]), False)['inputs'])


def test_the_shipped_config_says_no_more_than_the_two_scales():
    path = ROOT / 'configs/kd/faster_rcnn_r50_800_to_400.py'
    assert path.read_text().count('(1333, 800)') == 1
    cfg = apply_resolution(Config.fromfile(path))
    assert cfg.train_dataloader.dataset.pipeline[1]['type'] == 'mmkd.TwoViews'


def test_cv2_aligns_pixels_by_their_middle():
    """What the geometry rests on: x_large + 0.5 = ratio · (x_small + 0.5)."""
    ramp = np.arange(64, dtype=np.float32)[None].repeat(4, 0)
    half = cv2.resize(ramp, (32, 4))
    assert np.allclose(half[0], np.arange(32) * 2 + 0.5)


def test_the_student_is_tested_at_its_own_scale(tmp_path, monkeypatch):
    """tools/test.py on the distilled config: the teacher is gone, its scale as well."""
    tool = importlib.import_module('mmkd.commands.test')
    cfg = config_of(tmp_path, dict(student=(48, 40), teacher=(96, 80)))
    built = []

    def build(cfg):
        built.append(cfg)
        raise SystemExit

    monkeypatch.setattr(tool, 'build_runner', build)
    weights = tmp_path / 'x.pth'
    weights.write_bytes(b'')
    with pytest.raises(SystemExit):
        tool.main([cfg.filename, str(weights), '--work-dir', str(tmp_path / 'work')])
    pipeline = built[0].test_dataloader.dataset.pipeline
    assert [t['scale'] for t in pipeline if 'scale' in t] == [(48, 40)]
    assert 'distillation' not in built[0].model
