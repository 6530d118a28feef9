"""The distilling detector, checked by equality: against plain MMDetection, against itself as its
own teacher, and against what the paper's equations say about what was heard."""

import copy
from pathlib import Path

import pairs
import pytest
import torch
import zoo
from mmcv.ops import RoIAlign, batched_nms
from mmdet.models.dense_heads import rpn_head
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from pairs import LOG_NAMES, TERMS, batch, build, distil, distilled, losses, off, recipe, total
from tiny import tiny_config
from torch import nn

from mmkd import plain_student
from mmkd.engine.runner import DistillationRunner
from mmkd.engine.summary import startup_table
from mmkd.io.teacher_weights import load_teacher
from mmkd.models.teacher import Teacher
from mmkd.observers import DeadTermError
from mmkd.options.inherit import inherit
from mmkd.options.teacher_inputs import TeacherInputs
from mmkd.recipe import TeacherError, is_pair

KINDS = {'fpn': pairs.fpn, 'c4': pairs.c4, 'ohem': pairs.ohem, 'cascade': pairs.cascade}


def kind_recipe(kind, *terms, **changes):
    """C4 has no neck to take a hint from."""
    if kind == 'c4':
        changes.setdefault('hint', dict(pairs=['backbone']))
    return recipe(*terms, **changes)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def equal_losses(a, b):
    """Equality to the bit of two loss dicts, whose values are tensors or lists of them."""
    as_list = [{k: v if isinstance(v, list) else [v] for k, v in x.items()} for x in (a, b)]
    return as_list[0].keys() == as_list[1].keys() and all(
        len(v) == len(as_list[1][k]) and all(map(torch.equal, v, as_list[1][k]))
        for k, v in as_list[0].items()
    )


# ---------------------------------------------------------------- off means off


def test_with_every_term_off_a_run_is_plain_mmdetection_to_the_bit(tmp_path):
    """A whole training run by the runner: the same losses, the same weights, the same file."""
    plain = Config.fromfile(tiny_config(tmp_path, 'plain'))
    kd = Config.fromfile(tiny_config(tmp_path, 'kd'))
    kd.model = distilled(kd.model, plain.model, off())
    kd.work_dir = str(tmp_path / 'kd')
    hubs, models = [], []
    for runner_type, config in ((Runner, plain), (DistillationRunner, kd)):
        config.train_cfg.val_interval = 10
        config.experiment_name = f'off_{runner_type.__name__}_{tmp_path.name}'
        runner = runner_type.from_cfg(config)
        models.append(runner.train())
        hubs.append(MessageHub.get_instance(config.experiment_name).log_scalars)
    assert same(models[0].state_dict(), models[1].state_dict())
    names = [name for name in hubs[0] if 'loss' in name or name.endswith('/acc')]
    assert {n for n in hubs[1] if 'loss' in n} == {n for n in names if 'loss' in n}
    for name in names:
        values, others = (hub[name].data[0].tolist() for hub in hubs)
        assert len(values) == 4
        assert values == others


def test_with_every_term_off_there_is_no_teacher_and_no_hook():
    model = distil(pairs.fpn(), pairs.fpn(8), off())
    assert model.teacher is None
    assert not model.kd_terms
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain = build(pairs.fpn())
    assert same(model.state_dict(), plain.state_dict())
    assert equal_losses(losses(model), losses(plain))


@pytest.mark.parametrize('kind', KINDS)
def test_a_teacher_does_not_move_the_random_numbers_of_the_student(kind):
    """Under one seed the distilled student has the plain one's weights, samples and losses."""
    config = KINDS[kind]()
    model = distil(config, distillation=kind_recipe(kind))
    plain = build(config)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith('kd_terms.')}
    assert same(own, plain.state_dict())
    after = torch.get_rng_state()
    build(config)
    assert torch.equal(torch.get_rng_state(), after)
    hard = {k: v for k, v in losses(model).items() if 'kd' not in k}
    expected = losses(plain)
    for key, value in expected.items():
        if 'loss_cls' in key:
            expected[key] = value * 0.5
        elif key == 'loss_rpn_cls':
            expected[key] = [v * 0.5 for v in value]
    assert equal_losses(hard, expected)
    assert torch.equal(torch.get_rng_state(), _rng_after_losses(plain))


def _rng_after_losses(model):
    losses(model)
    return torch.get_rng_state()


@pytest.mark.parametrize('term', TERMS)
def test_each_term_is_turned_off_alone(term):
    config, teacher = pairs.fpn(), pairs.fpn(8)
    whole = losses(distil(config, teacher))
    rest = losses(distil(config, teacher, recipe(*[t for t in TERMS if t != term])))
    plain = losses(build(config))
    key, hard = LOG_NAMES[term], {'rpn_cls': 'loss_rpn_cls', 'rcnn_cls': 'loss_cls'}.get(term)
    assert set(whole) - set(rest) == {key}
    assert set(plain) | set(LOG_NAMES.values()) == set(whole)
    if hard:  # its mu counts as 1
        assert equal_losses({hard: rest[hard]}, {hard: plain[hard]})
    others = set(rest) - {hard}
    assert equal_losses({k: rest[k] for k in others}, {k: whole[k] for k in others})


@pytest.mark.parametrize('term', TERMS)
def test_each_term_works_alone(term):
    config, teacher = pairs.fpn(), pairs.fpn(8)
    alone = losses(distil(config, teacher, recipe(term)))
    whole = losses(distil(config, teacher))
    key = LOG_NAMES[term]
    assert [k for k in alone if 'kd' in k] == [key]
    assert torch.equal(alone[key], whole[key])
    assert any(True for _ in distil(config, teacher, recipe(term)).kd_terms.parameters()) == (
        term == 'hint'
    )


@pytest.mark.parametrize('mu', [0.0, 0.25, 1.0])
def test_mu_scales_the_hard_loss_and_one_minus_mu_the_soft_one(mu):
    config, teacher = pairs.fpn(), pairs.fpn(8)
    weigh = dict(hard_weight=mu, loss_weight=None)
    got = losses(
        distil(config, teacher, recipe('rpn_cls', 'rcnn_cls', rpn_cls=weigh, rcnn_cls=weigh))
    )
    unit = dict(loss_weight=1.0)
    full = losses(
        distil(config, teacher, recipe('rpn_cls', 'rcnn_cls', rpn_cls=unit, rcnn_cls=unit))
    )
    plain = losses(build(config))
    assert torch.equal(got['loss_cls'], plain['loss_cls'] * mu)
    assert all(map(torch.equal, got['loss_rpn_cls'], [v * mu for v in plain['loss_rpn_cls']]))
    assert equal_losses(
        {k: got[k] for k in ('loss_bbox', 'loss_rpn_bbox')},
        {k: plain[k] for k in ('loss_bbox', 'loss_rpn_bbox')},
    )
    for key in ('loss_kd_rpn_cls', 'loss_kd_cls'):
        if mu == 1:  # nothing is left of the soft loss: the term is off
            assert key not in got
        else:
            torch.testing.assert_close(got[key], full[key] * (1 - mu))


def test_classes_and_features_can_be_learnt_from_the_teacher_alone():
    """The ground truth still says which boxes are asked about, and where they are."""
    config = pairs.fpn()
    for head in (config.rpn_head, config.roi_head.bbox_head):
        head.loss_bbox.loss_weight = 0.0
    alone = dict(hard_weight=0.0, loss_weight=1.0)
    terms = recipe('rpn_cls', 'rcnn_cls', 'hint', rpn_cls=alone, rcnn_cls=alone)
    model = distil(config, pairs.fpn(8), terms)
    data = batch((4, 3))
    values = losses(model, data)
    hard = {k: v for k, v in values.items() if 'loss' in k and 'kd' not in k}
    assert len(hard) == 4
    assert not any(
        x.detach().any() for v in hard.values() for x in (v if isinstance(v, list) else [v])
    )
    summed = total(model, values)
    assert summed == sum(values[LOG_NAMES[name]] for name in ('rpn_cls', 'rcnn_cls', 'hint')) > 0
    for sample in data['data_samples']:
        sample.gt_instances.labels = (sample.gt_instances.labels + 1) % pairs.CLASSES
    assert torch.equal(total(model, losses(model, data)), summed)


@pytest.mark.parametrize('head', ['rpn', 'rcnn'])
def test_a_term_joins_its_head_under_the_weight_of_the_heads_own_loss(head):
    config = pairs.fpn()
    where = config.rpn_head if head == 'rpn' else config.roi_head.bbox_head
    terms = [f'{head}_cls', f'{head}_bbox']
    once = losses(distil(config, pairs.fpn(8), recipe(*terms)))
    where.loss_cls.loss_weight, where.loss_bbox.loss_weight = 3.0, 5.0
    scaled = losses(distil(config, pairs.fpn(8), recipe(*terms)))
    for term, factor in zip(terms, (3, 5), strict=True):
        torch.testing.assert_close(scaled[LOG_NAMES[term]], factor * once[LOG_NAMES[term]])
        assert once[LOG_NAMES[term]] > 0


# ---------------------------------------------------------------- one question, two answers


@pytest.mark.parametrize('kind', KINDS)
def test_a_teacher_that_is_the_student_gives_the_same_rows_to_the_bit(kind):
    model = distil(KINDS[kind](), distillation=kind_recipe(kind), seed=3)
    pairs.teach_itself(model)
    heard = pairs.spy(model)
    got = losses(model)
    stages = 3 if kind == 'cascade' else 1
    assert [len(heard[t]) for t in TERMS[:4]] == [1, 1, stages, stages]
    for term in TERMS[:4]:
        for own, answer, *_ in heard[term]:
            assert len(own) > 0
            assert torch.equal(own, answer)
    rows = len(heard['rpn_cls'][0][0])
    assert rows == 2 * 64  # the sampled anchors of two images, and no other
    assert heard['rpn_cls'][0][3] == rows
    assert heard['rcnn_bbox'][0][0].shape[1] == 4
    # Equation (4): a student exactly as good as its teacher is not pushed.
    assert got['loss_kd_bbox'].item() == got['loss_kd_rpn_bbox'].item() == 0


@pytest.mark.parametrize('kind', ['fpn', 'cascade'])
def test_the_terms_are_the_equations_over_what_was_heard(kind):
    """avg_factor, weights and stage weights are those of the head's own loss."""
    model = distil(KINDS[kind](), distillation=recipe(), seed=1)
    heard = pairs.spy(model)
    got = losses(model)
    stage_weights = [1, 0.5, 0.25] if kind == 'cascade' else [1]
    expected = 0.0
    for weight, (own, answer, row_weight, avg_factor, sigmoid, background) in zip(
        stage_weights, heard['rcnn_cls'], strict=True
    ):
        assert (sigmoid, background) == (False, True)
        w_c = torch.tensor([1.0] * 3 + [1.5])
        rows = -(w_c * answer.softmax(-1) * own.log_softmax(-1)).sum(-1)
        assert avg_factor == (row_weight > 0).sum()
        expected += weight * 0.5 * (rows * row_weight).sum() / avg_factor
    torch.testing.assert_close(got['loss_kd_cls'], expected)
    own, answer, row_weight, avg_factor, sigmoid = heard['rpn_cls'][0]
    assert sigmoid
    p = answer.sigmoid()
    rows = -(p * own.sigmoid().log() + 1.5 * (1 - p) * (1 - own.sigmoid()).log())
    torch.testing.assert_close(got['loss_kd_rpn_cls'], 0.5 * rows.sum() / avg_factor)
    own, answer, target, weight, avg_factor = heard['rpn_bbox'][0]
    error, theirs = ((own - target) ** 2).sum(-1), ((answer - target) ** 2).sum(-1)
    assert torch.equal(weight, torch.ones_like(weight))
    expected = 0.5 * error[error > theirs].sum() / avg_factor
    torch.testing.assert_close(got['loss_kd_rpn_bbox'], expected)
    assert avg_factor == heard['rpn_cls'][0][3]


def test_ground_truth_classes_pick_the_columns_of_both_networks():
    model = distil(pairs.fpn(), pairs.fpn(8), recipe('rcnn_bbox'), seed=1)
    heard = pairs.spy(model)
    asked = []
    head = model.roi_head.bbox_head
    head.loss_cls.register_forward_hook(lambda m, args, out: asked.append(args[1]))
    said, mine = [], []
    model.teacher.network.roi_head.bbox_head.register_forward_hook(
        lambda m, args, out: said.append(out[1])
    )
    head.register_forward_hook(lambda m, args, out: mine.append(out[1]))
    losses(model)
    labels = asked[0]
    positive = [i for i, label in enumerate(labels.tolist()) if label < pairs.CLASSES]
    assert 0 < len(positive) < len(labels)
    assert len({labels[i].item() for i in positive}) > 1
    for deltas, rows in ((mine[0], heard['rcnn_bbox'][0][0]), (said[0], heard['rcnn_bbox'][0][1])):
        expected = [deltas[i, 4 * labels[i] : 4 * labels[i] + 4] for i in positive]
        assert torch.equal(rows, torch.stack(expected))


def test_identity_adapters_on_the_same_network_give_no_hint_loss():
    model = distil(pairs.fpn(), distillation=recipe('hint', start='teacher'))
    pairs.teach_itself(model)
    assert losses(model)['loss_kd_hint'].item() == 0
    channels = torch.eye(8).view(8, 8, 1, 1)
    assert all(torch.equal(a.weight, channels) for a in model.kd_terms['hint'].adapters.values())


def test_decoded_regression_is_compared_in_deltas():
    """A GIoU student lays boxes before its loss; the deltas are recovered from them."""
    config = pairs.giou()
    model = distil(config, distillation=recipe('rcnn_bbox'), seed=1)
    pairs.teach_itself(model)
    heard = pairs.spy(model)
    losses(model)
    own, answer, target, weight, avg_factor = heard['rcnn_bbox'][0]
    torch.testing.assert_close(own, answer, rtol=1e-3, atol=1e-4)
    plain = distil(pairs.fpn(), distillation=recipe('rcnn_bbox'), seed=1)
    pairs.teach_itself(plain)
    undecoded = pairs.spy(plain)
    losses(plain)
    assert avg_factor == undecoded['rcnn_bbox'][0][4]
    torch.testing.assert_close(target, undecoded['rcnn_bbox'][0][2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own, undecoded['rcnn_bbox'][0][0], rtol=1e-3, atol=1e-4)
    # and the gradient goes through the decoding
    values = losses(distil(config, pairs.fpn(8), recipe('rcnn_bbox'), seed=1))
    assert values['loss_kd_bbox'] > 0


def test_the_frames_of_two_box_coders_are_made_one():
    """Teacher: Cascade, class-agnostic, and other stds; student: class-specific."""
    teacher = pairs.cascade()
    stds, means = (0.2, 0.2, 0.4, 0.4), (0.01, 0.0, 0.0, -0.02)
    teacher.roi_head.bbox_head[0].bbox_coder.update(target_stds=stds, target_means=means)
    model = distil(pairs.fpn(), teacher, recipe('rcnn_cls', 'rcnn_bbox'), seed=1)
    said = []
    model.teacher.network.roi_head.bbox_head[0].register_forward_hook(
        lambda m, args, out: said.append(out[1])
    )
    model.teacher.network.roi_head.bbox_head[2].register_forward_hook(
        lambda *a: pytest.fail('the student has one stage, and asks no other')
    )
    nn.init.normal_(model.teacher.network.roi_head.bbox_head[0].fc_reg.weight, std=0.3)
    heard = pairs.spy(model)
    labels = []
    model.roi_head.bbox_head.loss_cls.register_forward_hook(lambda m, a, o: labels.append(a[1]))
    losses(model)
    assert said[0].shape[1] == 4
    deltas = said[0][labels[0] < pairs.CLASSES]
    expected = (deltas * torch.tensor(stds) + torch.tensor(means)) / torch.tensor(
        [0.1, 0.1, 0.2, 0.2]
    )
    torch.testing.assert_close(heard['rcnn_bbox'][0][1], expected, rtol=1e-3, atol=1e-4)
    assert deltas.abs().max() > 0.1


def test_a_cascade_student_of_a_plain_teacher_asks_it_at_every_stage():
    model = distil(pairs.cascade(), pairs.fpn(8), recipe('rcnn_cls', 'rcnn_bbox'))
    heard = pairs.spy(model)
    losses(model)
    assert len(heard['rcnn_cls']) == len(heard['rcnn_bbox']) == 3


# ---------------------------------------------------------------- what the teacher is asked


@pytest.mark.parametrize(
    ('terms', 'changes', 'expected'),
    [
        (['hint'], {}, (1, 1, 0, 0)),
        (['hint'], dict(hint=dict(pairs=['backbone[1]'])), (1, 0, 0, 0)),
        (['rpn_cls'], {}, (1, 1, 1, 0)),
        (['rpn_bbox'], {}, (1, 1, 1, 0)),
        (['rcnn_cls'], {}, (1, 1, 0, 1)),
        (['rcnn_bbox'], {}, (1, 1, 0, 1)),
        ([], {}, (1, 1, 1, 1)),
    ],
)
def test_the_teacher_runs_only_what_the_terms_need(terms, changes, expected):
    model = distil(pairs.fpn(), pairs.fpn(8), recipe(*terms, **changes))
    teacher = model.teacher.network
    parts = [teacher.backbone, teacher.neck, teacher.rpn_head, teacher.roi_head.bbox_head]
    counts = [0] * 4
    student = [0]
    model.backbone.register_forward_hook(lambda *a: student.__setitem__(0, student[0] + 1))
    for i, part in enumerate(parts):
        part.register_forward_hook(lambda *a, i=i: counts.__setitem__(i, counts[i] + 1))
    losses(model)
    assert tuple(counts) == expected
    assert student == [1]


def test_the_teacher_is_no_part_of_the_student():
    model = distil(pairs.fpn(), pairs.fpn(8))
    teacher = {id(p) for p in model.teacher.network.parameters()}
    assert not teacher & {id(p) for p in model.parameters()}
    assert not teacher & {id(p) for p in model.state_dict(keep_vars=True).values()}
    assert not {id(m) for m in model.teacher.network.modules()} & {id(m) for m in model.modules()}
    optimizer = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    ).optimizer
    trained = [p for group in optimizer.param_groups for p in group['params']]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
    assert not any(p.requires_grad for p in model.teacher.network.parameters())


def test_the_teacher_is_the_same_to_the_bit_after_training():
    model = distil(pairs.fpn(), pairs.fpn(8), seed=1)
    before = copy.deepcopy(model.teacher.network.state_dict())
    student = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for seed in range(3):
        optimizer.zero_grad()
        total(model, losses(model, batch(seed=seed))).backward()
        optimizer.step()
    assert same(model.teacher.network.state_dict(), before)
    assert not model.teacher.network.training
    assert all(p.grad is None for p in model.teacher.network.parameters())
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, student[k])]
    assert {k.split('.')[0] for k in moved} == {
        'backbone', 'neck', 'rpn_head', 'roi_head', 'kd_terms'
    }  # fmt: skip


def test_an_ema_copy_shares_the_teacher_and_has_a_recorder_of_its_own():
    model = distil(pairs.fpn(), pairs.fpn(8))
    total(model, losses(model)).backward()  # a copy is possible after a step
    ema = ExponentialMovingAverage(model).module
    assert ema.teacher is model.teacher
    assert ema.taps is not model.taps
    assert same(ema.state_dict(), model.state_dict())
    with model.taps as mine, ema.taps as its:
        loss_of_copy = ema.rpn_head.loss_cls
        loss_of_copy(torch.zeros(2, 1), torch.zeros(2).long(), torch.ones(2), avg_factor=2)
    assert not mine.loss_calls
    assert len(its.loss_calls['rpn', 0, 'cls']) == 1
    model.eval(), ema.eval()
    assert equal_losses(losses(model), losses(ema))
    assert {id(p) for p in ema.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_nothing_is_recorded_outside_a_step_and_nothing_kept_after_it():
    model = distil(pairs.fpn(), pairs.fpn(8))
    losses(model)
    assert model.taps._record is None
    assert model.teacher.taps._record is None
    data = model.data_preprocessor(batch(), False)
    model.eval()
    with torch.no_grad():
        plain = build(pairs.fpn()).eval()
        got, expected = model(**data, mode='predict'), plain(**data, mode='predict')
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.pred_instances.bboxes, b.pred_instances.bboxes)
    boom = model.roi_head.bbox_head.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        losses(model)
    boom.remove()
    assert model.taps._record is None
    assert model.taps._rois == {}


@pytest.fixture
def nms_of_any_dtype(monkeypatch):
    """mmcv's NMS takes nothing but float32 on a CPU."""

    def nms(boxes, scores, *args):
        kept, index = batched_nms(boxes.float(), scores.float(), *args)
        return kept.to(torch.promote_types(boxes.dtype, torch.float32)), index

    monkeypatch.setattr(rpn_head, 'batched_nms', nms)


def test_the_teacher_follows_the_students_dtype(nms_of_any_dtype):
    model = distil(pairs.fpn(), pairs.fpn(8))
    single = losses(model)
    model = distil(pairs.fpn(), pairs.fpn(8)).double()
    data = model.data_preprocessor(batch(), True)
    data['inputs'] = data['inputs'].double()
    for sample in data['data_samples']:
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.double()
    torch.manual_seed(0)
    double = model(**data, mode='loss')
    assert {p.dtype for p in model.teacher.network.parameters()} == {torch.float64}
    for name in ('loss_kd_hint', 'loss_kd_rpn_cls'):
        assert double[name].dtype == torch.float64
        assert double[name].item() == pytest.approx(single[name].item(), rel=1e-3)
    model.half()
    model.teacher.follow(next(model.parameters()))
    assert {p.dtype for p in model.teacher.network.parameters()} == {torch.float16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='mmcv has half precision on GPUs only')
def test_a_step_under_autocast():
    model = distil(pairs.fpn(), pairs.fpn(8)).cuda()
    single = losses(model)
    with torch.autocast('cuda', dtype=torch.float16):
        half = losses(model)
    assert {p.device.type for p in model.teacher.network.parameters()} == {'cuda'}
    for name in LOG_NAMES.values():
        assert half[name].dtype == torch.float32
    for name in ('loss_kd_cls', 'loss_kd_rpn_cls'):
        assert half[name].item() == pytest.approx(single[name].item(), rel=0.02)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_step_under_autocast_on_a_cpu(dtype, nms_of_any_dtype, monkeypatch):
    """Where mmcv has its ops in float32 alone; the student and the teacher run in half."""
    pool = RoIAlign.forward
    monkeypatch.setattr(
        RoIAlign, 'forward', lambda self, x, rois: pool(self, x.float(), rois.float()).to(x.dtype)
    )
    model = distil(pairs.fpn(), pairs.fpn(8)).eval()
    calls = pairs.spy(model)
    single = losses(model)
    with torch.autocast('cpu', dtype=dtype):
        half = losses(model)
    assert [calls['hint'][i][1].dtype for i in (0, -1)] == [torch.float32, dtype]
    for name in LOG_NAMES.values():
        assert half[name].dtype == torch.float32
        assert half[name].isfinite()
    for name in ('loss_kd_cls', 'loss_kd_rpn_cls', 'loss_kd_hint'):
        assert half[name].item() == pytest.approx(single[name].item(), rel=0.03)
        assert half[name].item() != single[name].item()
    total(model, half).backward()
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())


def test_synchronised_batch_norm_is_the_students_alone():
    """sync_bn='torch' replaces the layers of what is trained; the hooks on the others stay."""
    model = distil(pairs.fpn(), pairs.fpn(8)).eval()
    before = losses(model)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(synchronised.backbone.bn1, torch.nn.SyncBatchNorm)
    assert type(synchronised.teacher.network.backbone.bn1) is torch.nn.BatchNorm2d
    assert equal_losses(before, losses(synchronised))


def test_a_hint_at_a_layer_that_is_replaced_later_is_named():
    model = distil(pairs.fpn(), pairs.fpn(8), recipe('hint', hint=dict(pairs=['backbone.bn1'])))
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.eval())
    with pytest.raises(RuntimeError, match=r"hint at 'backbone\.bn1': .* was not run in this step"):
        losses(model)


@pytest.mark.slow
def test_a_compiled_step_is_the_step():
    """MMEngine's ``compile=True`` compiles forward; hooks and the teacher are traced with it."""
    grads, values = [], []
    for compiled in (False, True):
        model = distil(pairs.c4(), distillation=recipe(hint=dict(pairs=['backbone'])))
        if compiled:
            model.forward = torch.compile(model.forward, backend='eager')
        values.append(losses(model))
        total(model, values[-1]).backward()
        grads.append(pairs.gradients(model))
        assert not model.unproven
    torch._dynamo.reset()
    assert equal_losses(*values)
    assert same(*grads)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_without_boxes(kind):
    model = distil(KINDS[kind](), distillation=kind_recipe(kind))
    values = losses(model, batch((0, 0)))
    assert set(LOG_NAMES.values()) <= set(values)
    for name in ('loss_kd_rpn_bbox', 'loss_kd_bbox'):
        assert isinstance(values[name], torch.Tensor)
        assert values[name].item() == 0
    assert values['loss_kd_cls'] > 0  # there is background to agree on
    total(model, values).backward()
    grads = pairs.gradients(model)
    assert all(g.isfinite().all() for g in grads.values())
    assert any(g.any() for g in grads.values())
    # and the terms that had nothing to show are proven at the next batch
    assert 'rcnn_bbox' in model.unproven
    losses(model)
    assert not model.unproven


def test_gradients_accumulate():
    model = distil(pairs.fpn(), pairs.fpn(8)).eval()
    sums = {}
    for seed in (0, 1):
        model.zero_grad()
        total(model, losses(model, batch(seed=seed))).backward()
        for name, grad in pairs.gradients(model).items():
            sums[name] = sums.get(name, 0) + grad
    model.zero_grad()
    for seed in (0, 1):
        total(model, losses(model, batch(seed=seed))).backward()
    assert same(pairs.gradients(model), sums)


def test_images_of_different_sizes():
    model = distil(pairs.fpn(), distillation=recipe('hint', 'rpn_cls'))
    pairs.teach_itself(model)
    data = batch((2,), (64, 96))
    for key, value in batch((1,), (80, 64), seed=1).items():
        data[key] += value
    heard = pairs.spy(model)
    losses(model, data)
    assert torch.equal(heard['rpn_cls'][0][0], heard['rpn_cls'][0][1])


@pytest.mark.parametrize('size', [(64, 96), (96, 64)])
def test_pixels_are_those_of_the_teachers_own_preprocessor(size):
    """Another mean, std, channel order: as if the teacher's preprocessor had made the batch."""
    from mmdet.models import DetDataPreprocessor

    rgb = DetDataPreprocessor(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True,
        pad_size_divisor=32,
    )  # fmt: skip
    # Not the same means in another order: the student's padding would be 0 in the teacher's, too.
    bgr = DetDataPreprocessor(
        mean=[90.0, 110.0, 130.0], std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=32
    )
    data = batch((2,), (50, 70))
    for key, value in batch((1,), size, seed=1).items():
        data[key] += value
    batches = [p(copy.deepcopy(data), True) for p in (rgb, bgr)]
    for own, other, got, want in ((rgb, bgr, *batches), (bgr, rgb, *batches[::-1])):
        convert = TeacherInputs(own, other)
        assert not convert.same
        made, view = convert(got['inputs'], got['data_samples'])
        assert view is None
        torch.testing.assert_close(made, want['inputs'], rtol=1e-5, atol=1e-4)
        assert torch.equal(made == 0, made.double() == 0)
        assert not made[0, :, 50:].any()
        assert not made[0, :, :, 70:].any()
    alike = TeacherInputs(rgb, rgb)
    assert alike(batches[0]['inputs'], None)[0] is batches[0]['inputs']


def test_a_teacher_with_other_pixels_is_heard_as_on_its_own():
    teacher = pairs.fpn(8)
    teacher.data_preprocessor.update(
        mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False
    )
    model = distil(pairs.fpn(), teacher, recipe('hint'))
    seen = []
    network = model.teacher.network
    network.backbone.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    losses(model)
    own = network.data_preprocessor(batch(), False)['inputs']
    torch.testing.assert_close(seen[0], own, rtol=1e-5, atol=1e-4)
    assert 'converted' in startup_table(model)


# ---------------------------------------------------------------- hints


def hint_shapes(model):
    return {
        p.name: (tuple(p.shapes[0][1:]), tuple(p.shapes[1][1:]))
        for p in model.kd_terms['hint'].pairs
    }


def test_every_output_of_the_neck_with_its_counterpart():
    model = distil(pairs.fpn(4, 8), pairs.fpn(8, 12), recipe('hint'))
    sides = (32, 16, 8, 4, 2)
    assert hint_shapes(model) == {f'neck_{i}': ((8, s, s), (12, s, s)) for i, s in enumerate(sides)}
    weights = {k: tuple(v.shape) for k, v in model.kd_terms['hint'].adapters.state_dict().items()}
    assert weights == {
        f'neck_{i}.{k}': shape
        for i in range(5)
        for k, shape in (('weight', (12, 8, 1, 1)), ('bias', (12,)))
    }


def test_error_no_adaptation_layer_where_shapes_agree():
    """The paper's ablation: it is put there even then."""
    model = distil(pairs.fpn(), pairs.fpn(), recipe('hint'))
    assert all(a == b for a, b in hint_shapes(model).values())
    assert {type(a) for a in model.kd_terms['hint'].adapters.values()} == {nn.Conv2d}
    total(model, losses(model)).backward()
    for adapter in model.kd_terms['hint'].adapters.values():
        assert adapter.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ('entry', 'name', 'shapes'),
    [
        ('backbone[1]', 'backbone_1', ((8, 16, 16), (16, 16, 16))),
        ('backbone.layer3', 'backbone_layer3_0', ((16, 8, 8), (32, 8, 8))),
        ('backbone.layer2.1.conv1', 'backbone_layer2_1_conv1_0', ((8, 16, 16), (16, 16, 16))),
        # a ReLU behind each of these works in place
        ('backbone.bn1', 'backbone_bn1_0', ((4, 64, 64), (8, 64, 64))),
        ('roi_head.bbox_head.shared_fcs.1', 'roi_head_bbox_head_shared_fcs_1_0', ((16,), (16,))),
        (
            dict(student='backbone[0]', teacher='backbone[1]'),
            'backbone_0',
            ((4, 32, 32), (16, 16, 16)),
        ),
    ],
)
def test_a_hint_is_the_mean_squared_distance_at_the_named_layers(entry, name, shapes):
    """Against plain hooks on the same layers; a ReLU behind them that works in place, or a map of
    another size, changes nothing."""
    model = distil(pairs.fpn(4), pairs.fpn(8), recipe('hint', hint=dict(pairs=[entry])))
    assert hint_shapes(model) == {name: shapes}
    adapter = model.kd_terms['hint'].adapters[name]
    assert isinstance(adapter, nn.Linear if len(shapes[0]) == 1 else nn.Conv2d)
    heard = {}
    specs = [entry] * 2 if isinstance(entry, str) else [entry['student'], entry['teacher']]
    for network, spec in zip((model, model.teacher.network), specs, strict=True):
        path, _, index = spec.rstrip(']').partition('[')
        network.get_submodule(path).register_forward_hook(
            lambda m, a, out, n=network, i=index: heard.update(
                {n: (out[int(i)] if i else out).clone()}
            )
        )
    got = losses(model)['loss_kd_hint']
    guided, hint = adapter(heard[model]), heard[model.teacher.network]
    if guided.shape != hint.shape:
        hint = nn.functional.interpolate(hint, guided.shape[2:], mode='bilinear')
    expected = 0.5 * ((guided - hint) ** 2).mean()
    torch.testing.assert_close(got, expected)
    got.backward()
    assert model.backbone.conv1.weight.grad.abs().max() > 0


def test_the_sum_over_pairs():
    singles = []
    for path in ('backbone[0]', 'backbone[3]'):
        model = distil(pairs.fpn(), pairs.fpn(8), recipe('hint', hint=dict(pairs=[path])))
        _ones(model.kd_terms['hint'].adapters)
        singles.append(losses(model)['loss_kd_hint'])
    both = recipe('hint', hint=dict(pairs=['backbone[0]', 'backbone[3]']))
    model = distil(pairs.fpn(), pairs.fpn(8), both)
    _ones(model.kd_terms['hint'].adapters)
    torch.testing.assert_close(losses(model)['loss_kd_hint'], sum(singles))


def _ones(adapters):
    for parameter in adapters.parameters():
        nn.init.constant_(parameter, 0.1)


def test_one_guided_layer_for_two_hint_layers():
    entries = [dict(student='neck[0]', teacher=f'neck[{i}]') for i in (0, 1)]
    model = distil(pairs.fpn(), pairs.fpn(8), recipe('hint', hint=dict(pairs=entries)))
    assert [p.name for p in model.kd_terms['hint'].pairs] == ['neck_0', 'neck_0_to_neck_1']
    assert losses(model)['loss_kd_hint'] > 0


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        ('nekc', r"hint at 'nekc': the student has no such submodule; near ones: .*neck"),
        (dict(student='neck', teacher='backbone.layer9'), r'the teacher has no such .*layer[1-4]'),
        (dict(student='neck'), "must be a path, or dict"),
        ('neck[7]', r"hint 'neck\[7\]': neck has 5 outputs"),
        ('neck[x]', r"hint 'neck\[x\]' is no path"),
        (dict(student='neck', teacher='backbone'), 'has 5 outputs there, the teacher 4'),
        (dict(student='neck[0]', teacher='roi_head.bbox_head.fc_cls'), 'no adaptation layer leads'),
        ('roi_head.bbox_head.loss_cls', 'the network does not call this submodule'),
        ('rpn_head.rpn_conv', 'the student runs it 5 times in one step'),
    ],
)  # fmt: skip
def test_a_hint_that_cannot_be_is_refused_by_name(entry, message):
    with pytest.raises(ValueError, match=message):
        distil(pairs.fpn(), pairs.fpn(8), recipe('hint', hint=dict(pairs=[entry])))


def test_a_hint_needs_a_pair_and_a_student_without_neck_another_layer():
    with pytest.raises(ValueError, match='hint.pairs is empty'):
        distil(pairs.fpn(), pairs.fpn(8), recipe('hint', hint=dict(pairs=[])))
    with pytest.raises(ValueError, match="hint at 'neck': the student has no such submodule"):
        distil(pairs.c4(), pairs.c4(), recipe('hint'))
    with pytest.raises(ValueError, match='the student has 3, the teacher 1'):
        distil(
            pairs.cascade(),
            pairs.fpn(),
            recipe(
                'hint',
                hint=dict(
                    pairs=[
                        dict(
                            student='roi_head.bbox_head.0.shared_fcs.1',
                            teacher='roi_head.bbox_head.shared_fcs.1',
                        )
                    ]
                ),
            ),
        )


# ---------------------------------------------------------------- no dead term


def test_a_hint_in_a_frozen_stage_is_dead_and_named():
    student = pairs.fpn()
    student.backbone.frozen_stages = 1
    model = distil(student, pairs.fpn(8), recipe(hint=dict(pairs=['backbone[0]'])))
    with pytest.raises(DeadTermError, match=r'hint at backbone\[0\] is dead: .*frozen_stages'):
        losses(model)
    # Nor can it hide behind a living one.
    model = distil(student, pairs.fpn(8), recipe(hint=dict(pairs=['neck', 'backbone[0]'])))
    with pytest.raises(DeadTermError, match=r'hint at backbone\[0\] is dead'):
        losses(model)
    model = distil(student, pairs.fpn(8), recipe(hint=dict(pairs=['backbone[1]'])))
    losses(model)
    assert not model.unproven


@pytest.mark.parametrize(
    ('part', 'term'),
    [('backbone.conv1', 'hint at neck.0.'), ('rpn_head.rpn_cls', 'rpn_cls'),
     ('roi_head.bbox_head.fc_cls', 'cls')],
)  # fmt: skip
def test_a_term_that_is_not_finite_stops_the_run_and_is_named(part, term):
    model = distil(pairs.fpn(), pairs.fpn(8))
    nn.init.constant_(model.teacher.network.get_submodule(part).weight, float('nan'))
    with pytest.raises(DeadTermError, match=f'loss_kd_{term} is nan at the first step'):
        losses(model)


def test_a_student_without_gradients_is_dead():
    model = distil(pairs.fpn(), pairs.fpn(8), recipe('rcnn_cls'))
    with torch.no_grad(), pytest.raises(DeadTermError, match='loss_kd_cls is dead'):
        losses(model)


def test_a_student_that_is_better_is_wired():
    """Equation (4) is rightly 0: it is the wiring that is tested, not the value."""
    model = distil(pairs.fpn(), distillation=recipe('rcnn_bbox', 'rpn_bbox'))
    pairs.teach_itself(model)
    values = losses(model)
    assert values['loss_kd_bbox'].item() == values['loss_kd_rpn_bbox'].item() == 0
    assert not model.unproven


def test_activation_checkpointing_changes_nothing():
    grads, values = [], []
    for with_cp in (False, True):
        student = pairs.fpn()
        student.backbone.with_cp = with_cp
        model = distil(student, pairs.fpn(8), recipe(hint=dict(pairs=['neck', 'backbone[1]'])))
        values.append(losses(model))
        total(model, values[-1]).backward()
        grads.append(pairs.gradients(model))
        assert not model.unproven
    assert equal_losses(*values)
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_a_hint_within_activation_checkpointing_is_refused():
    student = pairs.fpn()
    student.backbone.with_cp = True
    hint = dict(pairs=['backbone.layer2.0.conv1'])
    model = distil(student, pairs.fpn(8), recipe('hint', hint=hint))
    with pytest.raises(DeadTermError, match='within activation checkpointing.*outside of'):
        losses(model)


def test_a_gradient_arrives_through_every_term():
    far = dict(margin=100.0)  # equation (4) then pushes every box
    for term in TERMS:
        paper = recipe(term, rpn_bbox=far, rcnn_bbox=far)
        model = distil(pairs.fpn(), pairs.fpn(8), paper, seed=1)
        losses(model)[LOG_NAMES[term]].backward()
        assert model.backbone.conv1.weight.grad.abs().max() > 0, term


# ---------------------------------------------------------------- the inheriting start


def test_the_start_copies_neck_and_heads_and_survives_init_weights():
    student, teacher = pairs.fpn(4), pairs.fpn(8)
    model = distil(student, teacher, off(start='teacher'))
    assert model.teacher is None  # it is not needed any more
    assert model.start.left == {
        f'neck.lateral_convs.{i}.conv.weight': (
            f'(8, {4 * 2**i}, 1, 1) here, (8, {8 * 2**i}, 1, 1) in the teacher'
        )
        for i in range(4)
    }
    with_terms = distil(student, teacher, recipe(start='teacher'))
    theirs, plain = with_terms.teacher.network.state_dict(), build(student).state_dict()
    for state in (model.state_dict(), with_terms.state_dict()):
        for key, value in plain.items():
            inherited = key.split('.')[0] != 'backbone' and key not in model.start.left
            assert torch.equal(state[key], theirs[key] if inherited else value)
            assert (key in model.start.taken) == inherited
    for adapter in with_terms.kd_terms['hint'].adapters.values():
        assert torch.equal(adapter.weight.flatten(1), torch.eye(8))
        assert not adapter.bias.any()
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert same(model.state_dict(), before)
    assert 'neck and heads' in startup_table(model)


def test_the_start_by_itself_needs_no_recipe():
    model = distil(pairs.fpn(4), pairs.fpn(8), dict(start='teacher'))
    assert model.start.taken
    assert equal_losses(
        losses(model), losses(distil(pairs.fpn(4), pairs.fpn(8), off(start='teacher')))
    )


def test_error_weights_overwritten_by_init_weights():
    """What was inherited is still there when the runner has initialised the student."""
    model = distil(pairs.fpn(4), pairs.fpn(8), recipe(start='teacher'))
    theirs = model.teacher.network.state_dict()
    for key in ('neck.fpn_convs.0.conv.weight', 'rpn_head.rpn_cls.weight',
                'roi_head.bbox_head.fc_reg.weight'):  # fmt: skip
        assert torch.equal(model.state_dict()[key], theirs[key])


def test_a_start_from_nothing_is_refused():
    teacher = pairs.fpn(8, channels=12, classes=5)
    teacher.rpn_head.anchor_generator.ratios = [1.0]
    with pytest.raises(ValueError, match="distillation.start='teacher': not one tensor"):
        student = pairs.fpn()
        student.roi_head.bbox_head.fc_out_channels = 24
        student.roi_head.bbox_head.roi_feat_size = 4
        distil(student, teacher, off(start='teacher'))
    with pytest.raises(ValueError, match='not one tensor'):
        inherit(build(pairs.fpn()), nn.Linear(2, 2))


# ---------------------------------------------------------------- checkpoints


def test_the_checkpoint_is_the_plain_students_and_the_adapters():
    model = distil(pairs.fpn(), pairs.fpn(8))
    plain = build(plain_student(distilled(pairs.fpn(), pairs.fpn(8), recipe())), seed=5)
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert extra == {
        f'kd_terms.hint.adapters.neck_{i}.{k}' for i in range(5) for k in ('weight', 'bias')
    }
    assert set(plain.state_dict()) == set(model.state_dict()) - extra
    own = {k: v for k, v in model.state_dict().items() if k not in extra}
    plain.load_state_dict(own, strict=True)
    assert equal_losses(losses(plain.eval()), losses(build(pairs.fpn()).eval()))


class Heard(Hook):
    """Detections and metrics of a validation."""

    def __init__(self):
        self.found, self.metrics = [], []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.found += [(s.img_id, s.pred_instances) for s in outputs]

    def after_val_epoch(self, runner, metrics=None):
        self.metrics.append(dict(metrics))


def test_validation_and_the_best_checkpoint_are_the_students_alone(tmp_path, monkeypatch):
    plain = Config.fromfile(tiny_config(tmp_path, 'plain'))
    kd = Config.fromfile(tiny_config(tmp_path, 'kd'))
    kd.model = distilled(kd.model, plain.model, recipe())
    kd.default_hooks.checkpoint = dict(type='CheckpointHook', save_best='coco/bbox_mAP')
    kd.experiment_name, plain.experiment_name = f'kd_{tmp_path.name}', f'plain_{tmp_path.name}'
    asked, extract = [], Teacher.extract

    def counted(teacher, *args, **kwargs):
        asked.append(runner.model.training)
        return extract(teacher, *args, **kwargs)

    monkeypatch.setattr(Teacher, 'extract', counted)
    heard = [Heard(), Heard()]
    runner = DistillationRunner.from_cfg(kd)
    runner.register_hook(heard[0])
    runner.train()
    assert asked == [True] * 4  # once in each iteration, and never by the validation
    (best,) = Path(kd.work_dir).glob('best_coco_bbox_mAP_*.pth')
    plain.load_from = str(best)
    stock = Runner.from_cfg(plain)
    stock.register_hook(heard[1])
    stock.val()
    ours, own = heard
    assert ours.metrics == own.metrics and len(own.metrics) == 1
    assert len(own.found) == 8
    for (i, detections), (j, alone) in zip(ours.found, own.found, strict=True):
        assert i == j and len(alone) == 10
        assert torch.equal(detections.bboxes, alone.bboxes)
        assert torch.equal(detections.scores, alone.scores)


def test_plain_student_is_the_config_without_the_teacher():
    student = pairs.fpn()
    config = distilled(student, pairs.fpn(8), recipe())
    kept = copy.deepcopy(config)
    assert plain_student(config) == {**student, 'type': 'TwoStageDetector'}
    assert config == kept


def test_mmdetections_own_distilled_detectors_are_left_as_they_are():
    """They name a teacher_config too; one that has been trained can be a teacher of mmkd's."""
    cfg = get_config('mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py')
    assert not is_pair(cfg.model) and plain_student(cfg.model) == cfg.model
    cfg.model.backbone.init_cfg = None
    cfg.model.update(teacher_config=dict(model=zoo.tiny('RetinaNet')), teacher_ckpt=None)
    teacher = load_teacher(cfg, 'random', None)
    assert type(teacher.network).__name__ == 'KnowledgeDistillationSingleStageDetector'


def save(path, model, **changes):
    state = {**model.state_dict(), **changes}
    torch.save(dict(state_dict={k: v for k, v in state.items() if v is not None}), path)
    return str(path)


def test_a_teacher_is_loaded_completely(tmp_path):
    teacher = build(pairs.fpn(8), seed=9)
    path = save(tmp_path / 'teacher.pth', teacher)
    model = build(distilled(pairs.fpn(), pairs.fpn(8), recipe(), path))
    assert same(model.teacher.network.state_dict(), teacher.state_dict())
    assert model.teacher.loaded == len(teacher.state_dict())
    assert model.teacher.passed_over == 0
    bare = tmp_path / 'bare.pth'
    torch.save({f'module.{k}': v for k, v in teacher.state_dict().items()}, bare)
    model = build(distilled(pairs.fpn(), pairs.fpn(8), recipe(), str(bare)))
    assert same(model.teacher.network.state_dict(), teacher.state_dict())


def test_a_distilled_student_can_be_a_teacher_in_turn(tmp_path):
    first = distil(pairs.fpn(), pairs.fpn(8), seed=4)
    path = save(tmp_path / 'student.pth', first)
    model = build(distilled(pairs.fpn(), pairs.fpn(), recipe(), path))
    assert model.teacher.passed_over == 10
    own = {k: v for k, v in first.state_dict().items() if not k.startswith('kd_terms.')}
    assert same(model.teacher.network.state_dict(), own)
    assert '10 adaptation tensors in the file passed over' in startup_table(model)
    # The config that it was trained with names it as well as the plain one does.
    itself = distilled(pairs.fpn(), pairs.fpn(8), recipe())
    model = build(distilled(pairs.fpn(), itself, recipe(), path))
    assert same(model.teacher.network.state_dict(), own)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'neck.fpn_convs.0.conv.bias': None, 'rpn_head.rpn_cls.bias': None},
         r'lacks 2 of \d+ keys \(first: neck.fpn_convs.0.conv.bias, rpn_head.rpn_cls.bias\)'),
        ({'mask_head.conv.weight': torch.zeros(1), 'x.y': torch.zeros(1)},
         r'has, beyond the network, 2 of \d+ keys \(first: mask_head.conv.weight, x.y\)'),
        ({'rpn_head.rpn_cls.bias': torch.zeros(7)},
         r'has in another shape 1 of \d+ keys \(first: rpn_head.rpn_cls.bias '
         r'\(\(7,\) in the file, \(3,\) in teacher_config\)\)'),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_its_file_is_refused_with_counts_and_names(
    tmp_path, changes, message
):
    path = save(tmp_path / 'teacher.pth', build(pairs.fpn(8)), **changes)
    with pytest.raises(TeacherError, match=f'teacher checkpoint {path} {message}.*teacher_config'):
        build(distilled(pairs.fpn(), pairs.fpn(8), recipe(), path))


def test_a_teacher_of_another_network_or_other_classes_is_refused(tmp_path):
    path = save(tmp_path / 'teacher.pth', build(pairs.fpn(8)))
    with pytest.raises(TeacherError, match=r'lacks \d+ of \d+ .*in another shape .*beyond'):
        build(distilled(pairs.fpn(), pairs.cascade(), recipe(), path))
    with pytest.raises(TeacherError, match=r'shape 4 of .*fc_cls.weight \(\(4, 16\) in the file'):
        build(distilled(pairs.fpn(), pairs.fpn(8, classes=5), recipe(), path))
    with pytest.raises(ValueError, match='has 5 classes, the student 3'):
        distil(pairs.fpn(), pairs.fpn(classes=5))
    missing = build(distilled(pairs.fpn(), pairs.fpn(), recipe(), str(tmp_path / 'nowhere.pth')))
    with pytest.raises(TeacherError, match='nowhere.pth.*does not exist'):
        losses(missing)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(teacher_ckpt=None), "teacher_ckpt is missing, so the teacher would be random noise"),
        (dict(eval_teacher=False), 'eval_teacher=False is refused: .* BatchNorm'),
        (dict(distillation=dict(hints=dict(loss_weight=1.0))), "no entry 'hints'.* mean hint"),
        (dict(distillation=dict(start='zoo')), "start='zoo' must be None or 'teacher'"),
        (dict(distillation=dict(hint=None)), 'distillation.hint=None must be a loss'),
        (dict(distillation=dict(hint=dict(type='HintL2Loss', schedule=dict(warm=5)))),
         "distillation.hint.schedule has no entry 'warm'; did you mean warmup"),
        (dict(teacher_config='nowhere.py'), "teacher_config 'nowhere.py' cannot be read: the"),
        (dict(teacher_config='mmdet::nowhere.py'), "teacher_config 'mmdet::nowhere.py' cannot be"),
        (dict(teacher_config=dict(backbone=1)), 'defines no model'),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused_in_words(changes, message):
    config = {**distilled(pairs.fpn(), pairs.fpn(), recipe()), **changes}
    with pytest.raises(ValueError, match=message):
        losses(build(config))  # where a file is missing the detector still predicts


def refused(message, student=None, teacher=None, *terms):
    with pytest.raises(ValueError, match=message):
        distil(student or pairs.fpn(), teacher or pairs.fpn(), recipe(*terms))


def test_a_pair_that_cannot_answer_one_question_is_refused():
    other = pairs.fpn()
    other.rpn_head.anchor_generator.scales = [6]
    refused(
        "(?s)no anchor of the student is one of the teacher's.*rpn_cls.loss_weight=0", None, other
    )
    distil(pairs.fpn(), other, recipe('rcnn_cls', 'rcnn_bbox', 'hint'))  # the way out

    other = pairs.fpn()
    other.rpn_head.reg_decoded_bbox = True
    other.rpn_head.loss_bbox = dict(type='GIoULoss')
    refused('an RPN that regresses boxes.*rpn_bbox.loss_weight=0', None, other)
    distil(pairs.fpn(), other, recipe('rpn_cls'))

    other = pairs.fpn()
    del other.rpn_head.bbox_coder['target_means'], other.rpn_head.bbox_coder['target_stds']
    distil(pairs.fpn(), other, recipe('rpn_bbox'))  # the coder's defaults, as a tuple: the same

    one_stage = pairs.get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model
    one_stage.backbone.init_cfg = None
    refused("the teacher's RPN .* has no loss_cls", None, one_stage)
    refused("the teacher's RoI head .* does not score RoIs", None, one_stage, 'rcnn_cls')


# ---------------------------------------------------------------- the table at the start


def test_the_startup_table_says_what_is_trained(tmp_path, monkeypatch):
    student, teacher = build(pairs.fpn()), build(pairs.fpn(8), seed=9)
    path = save(tmp_path / 'teacher.pth', teacher)
    terms = [t for t in TERMS if t != 'rpn_bbox']
    model = build(distilled(pairs.fpn(), pairs.fpn(8), recipe(*terms, start='teacher'), path))
    table = startup_table(model)
    for network in (student, teacher):
        count = sum(p.numel() for p in network.parameters())
        assert f'ResNet, {count / 1e6:.2f} M parameters' in table
    tensors = len(teacher.state_dict())
    assert f'{tensors} tensors, all it has, from {path}' in table
    taken = len(model.start.taken)
    own = len(without_counters(student.state_dict()))
    assert f"{taken} tensors of neck and heads are the teacher's" in table
    assert f'{own - taken} of {own} tensors initialised at random' in table
    rows = {
        cells[1].strip(): cells[2].strip()
        for line in table.splitlines()
        if len(cells := line.split('|')) > 2
    }
    assert rows['loss_kd_rpn_bbox'] == 'off'
    soft = 'WeightedSoftCELoss loss_weight=0.5, hard_weight=0.5, background_weight=1.5'
    assert rows['loss_kd_cls'].startswith(soft)
    assert rows['loss_kd_bbox'].startswith('TeacherBoundedL2Loss loss_weight=0.5, margin=0')
    assert rows['loss_kd_hint'].startswith('HintL2Loss loss_weight=0.5, normalize=0')
    for i, side in enumerate((32, 16, 8, 4, 2)):
        assert f'neck[{i}] 8×{side}×{side} -> neck[{i}] 8×{side}×{side}' in table
    own = {k: v for k, v in model.state_dict().items() if not k.startswith('kd_terms.')}
    own = without_counters(own)
    torch.save(own, tmp_path / 'here.pth')
    here = str(tmp_path / 'here.pth')
    warned = []
    monkeypatch.setattr(
        'mmkd.engine.weight_origins.print_log', lambda said, **kwargs: warned.append(said)
    )
    assert f'{len(own)} of {len(own)} tensors loaded from {here}' in startup_table(model, here)
    assert not warned
    torch.save(dict(list(own.items())[:5]), here)
    said = f'5 of {len(own)} tensors loaded from {here}; THE OTHER {len(own) - 5} ARE NOT IN IT'
    assert said in startup_table(model, here)
    assert f'holds 5 of the {len(own)} tensors that it is for: MOST OF THEM' in ''.join(warned)
    assert 'resumed from there.pth' in startup_table(model, 'here.pth', 'there.pth')
    assert 'RANDOM' in startup_table(distil(pairs.fpn(), pairs.fpn(8)))
    assert 'every term is off' in startup_table(distil(pairs.fpn(), pairs.fpn(8), off()))


def without_counters(state):
    """BatchNorm's fit any network, so they show nothing."""
    return {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}


def test_the_startup_table_counts_pretrained_tensors(tmp_path):
    backbone = build(pairs.fpn(), seed=2).backbone.state_dict()
    path = tmp_path / 'backbone.pth'
    torch.save(dict(state_dict=backbone), path)
    student = pairs.fpn()
    student.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = distil(student, pairs.fpn(8))
    count, own = (len(without_counters(s)) for s in (backbone, build(pairs.fpn()).state_dict()))
    table = startup_table(model)
    assert f'{count} of {count} tensors of backbone from {path}' in table
    assert f'{own - count} of {own} tensors initialised at random' in table


# ---------------------------------------------------------------- kinds of adapters


@pytest.mark.parametrize(
    ('kind', 'shape'),
    [
        ('conv1x1', (8, 8, 1, 1)),
        ('conv3x3', (8, 8, 3, 3)),
        ('identity', None),
        (None, (8, 8, 1, 1)),
    ],
)
def test_a_pair_says_its_adapter(kind, shape):
    pair = dict(student='neck', teacher='neck')
    if kind:
        pair['adapter'] = kind
    model = distil(
        pairs.fpn(), pairs.fpn(8), recipe('hint', start='teacher', hint=dict(pairs=[pair]))
    )
    shapes = {tuple(a.weight.shape) if list(a.parameters()) else None
              for a in model.kd_terms['hint'].adapters.values()}  # fmt: skip
    assert shapes == {shape}
    # From the teacher's start each is the identity.
    feature = torch.rand(1, 8, 6, 6)
    assert all(
        torch.allclose(a(feature), feature) for a in model.kd_terms['hint'].adapters.values()
    )
    pairs.total(model, losses(model)).backward()


@pytest.mark.parametrize(
    ('pair', 'message'),
    [
        (dict(adapter='mlp'), "adapter 'mlp' must be one of conv1x1"),
        (dict(adapter='linear'), "adapter 'linear' cannot lead.*between maps"),
        (dict(student='backbone[1]', adapter='identity'), 'the channels differ'),
        (dict(kind='conv1x1'), "optionally adapter='...'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(pair, message):
    pair = {'student': 'neck[0]', 'teacher': 'neck[0]', **pair}
    if 'backbone' in pair['student']:
        pair['teacher'] = 'neck[1]'
    with pytest.raises(ValueError, match=message):
        distil(pairs.fpn(3), pairs.fpn(8), recipe('hint', hint=dict(pairs=[pair])))


def test_the_l1_hint_is_a_term_like_the_other():
    model = distil(pairs.fpn(), pairs.fpn(8), recipe('hint', hint=dict(type='HintL1Loss')))
    assert losses(model)['loss_kd_hint'] > 0


class DistanceToTruth(nn.Module):
    """A loss of one's own, which needs the ground truth."""

    def __init__(self, loss_weight=1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student, teacher, targets, weight=None, avg_factor=None):
        return ((student - targets).abs() * weight).sum() / avg_factor


@pytest.mark.parametrize('head', ['rpn', 'rcnn'])
def test_a_box_loss_of_ones_own_is_given_the_ground_truth(head):
    """What MMDetection's own loss is given, which is there beside it."""
    config, own = pairs.fpn(), recipe(f'{head}_bbox')
    own[f'{head}_bbox'] = dict(type=DistanceToTruth)
    # Or else the only positive RoIs are the true boxes, of which each delta is 0.
    config.train_cfg.rcnn.assigner.update(pos_iou_thr=0.2, neg_iou_thr=0.2, min_pos_iou=0.2)
    config.train_cfg.rcnn.sampler.add_gt_as_proposals = False
    model = distil(config, pairs.fpn(8), own)
    hard = []
    (model.rpn_head if head == 'rpn' else model.roi_head.bbox_head).loss_bbox.register_forward_hook(
        lambda module, args, kwargs, output: hard.append((*args, kwargs)), with_kwargs=True
    )
    value = losses(model)['loss_kd_rpn_bbox' if head == 'rpn' else 'loss_kd_bbox']
    expected = sum(
        ((student - targets).abs() * weight).sum() / rest['avg_factor']
        for student, targets, weight, rest in hard
    )
    assert sum((targets * weight).abs().sum() for _, targets, weight, _ in hard) > 0.1
    torch.testing.assert_close(value, expected)
