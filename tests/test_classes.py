"""Whose class is whose: lists that differ, heads whose logits mean other things."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pairs
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from pairs import build, distil, distilled, losses, recipe
from tiny import CLASSES, tiny_config

from mmkd.datasets.labels import check_labels, check_same_labels
from mmkd.engine.class_names import apply_classes, class_names
from mmkd.engine.summary import startup_table
from mmkd.options.class_map import ClassMap
from mmkd.options.head_layout import HeadLayout
from mmkd.options.inherit import inherit


def net(classes=3, **head):
    model = pairs.fpn(classes=classes)
    model.roi_head.bbox_head.update(head)
    return model


def seesaw(classes=3):
    return net(classes, loss_cls=dict(type='SeesawLoss', num_classes=classes))


def sigmoid(classes=3):
    return net(classes, loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0))


def heads(student, teacher):
    return [build(model).roi_head.bbox_head for model in (student, teacher)]


def softmax(row):
    powers = [math.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


# --------------------------------------------------------------------------------- names


def test_classes_are_matched_by_name_in_any_order():
    found = ClassMap(['dog', 'cat'], ['bus', 'cat', 'dog'])
    assert found.indices == [2, 1]
    assert not found.same
    assert ClassMap(['a', 'b'], ['a', 'b']).same
    assert "the teacher's other 1 count as background" in str(found)


def test_a_class_may_have_two_names():
    found = ClassMap(['person', 'car'], ['car', 'human'], dict(person='human'))
    assert found.indices == [1, 0]


@pytest.mark.parametrize(
    ('student', 'teacher', 'names', 'message'),
    [
        (['a'], ['b', 'c'], {}, r'\(a\) and teacher \(b, c\) have no class in common.*names='),
        (['car'], ['car'], {'cat': 'car'}, "student has no class 'cat'; near ones: car"),
        (['car'], ['bus'], {'car': 'buss'}, "teacher has no class 'buss'; near ones: bus"),
    ],
)
def test_names_that_cannot_be_are_refused(student, teacher, names, message):
    with pytest.raises(ValueError, match=message):
        ClassMap(student, teacher, names)


def test_counts_without_names_are_refused():
    with pytest.raises(ValueError, match='has 5 classes, the student 3.*names are not known'):
        distil(net(3), net(5))
    classes = dict(student=['a', 'b'], teacher=['a', 'b', 'c', 'd', 'e'])
    with pytest.raises(ValueError, match='classes.student has 2 names, the student 3'):
        distil(net(3), net(5), dict(recipe(), classes=classes))
    with pytest.raises(ValueError, match="no entry 'students'"):
        distil(net(3), net(3), dict(recipe(), classes=dict(students=[])))


def test_hints_alone_need_no_common_class():
    distil(net(3), net(5), recipe('hint', 'rpn_cls', 'rpn_bbox'))
    # Nor where the runner has found the names: the way out that the refusal names leads out.
    names = dict(student=['a', 'b', 'c'], teacher=['u', 'v', 'w', 'x', 'y'])
    distil(net(3), net(5), dict(recipe('hint'), classes=names))
    with pytest.raises(ValueError, match='no class in common.*turn off rcnn_cls and rcnn_bbox'):
        distil(net(3), net(5), dict(recipe(), classes=names))


# ------------------------------------------------------------------------------- answers


def test_other_classes_are_background():
    """Against a loop: each class its own probability, background all the rest."""
    classes = ClassMap(['x', 'y'], ['p', 'y', 'q', 'x'])
    answers = HeadLayout(*heads(net(2), net(4)), classes)
    logits = torch.randn(7, 5) * 3
    got = answers.teacher(logits).softmax(1)
    for row, out in zip(logits.tolist(), got.tolist(), strict=True):
        p = softmax(row)
        assert out == pytest.approx([p[3], p[1], p[4] + p[0] + p[2]], rel=1e-4, abs=1e-7)


def test_a_class_that_the_teacher_does_not_know_is_left_out():
    classes = ClassMap(['x', 'new'], ['p', 'x'])
    answers = HeadLayout(*heads(net(2), net(2)), classes)
    labels = torch.tensor([0, 1, 2, 0])
    assert answers.known(labels).tolist() == [True, False, True, True]
    out = answers.teacher(torch.randn(4, 3)).softmax(1)
    assert torch.equal(out[:, 1], torch.zeros(4))
    assert torch.allclose(out.sum(1), torch.ones(4))
    assert answers.columns(torch.tensor([0])).tolist() == [1]


def test_where_both_agree_logits_pass_untouched():
    logits = torch.randn(4, 4)
    for kind in (net, sigmoid):
        answers = HeadLayout(*heads(kind(), kind()), ClassMap('abc', 'abc'))
        assert answers.teacher(logits) is logits
        assert answers.student(logits) is logits
        assert answers.known(torch.tensor([0])) is None


@pytest.mark.parametrize('student', [net, seesaw, sigmoid])
@pytest.mark.parametrize('teacher', [net, seesaw, sigmoid])
def test_heads_of_other_kinds_speak_of_one_distribution(student, teacher):
    """What each head says at test time is what is compared."""
    pair = heads(student(), teacher())
    answers = HeadLayout(*pair, None)
    columns = [5 if kind is seesaw else 4 for kind in (student, teacher)]
    own, theirs = (torch.randn(6, n) * 2 for n in columns)

    def scores(head, logits):
        if head.custom_activation:
            return head.loss_cls.get_activation(logits)
        return logits.softmax(1)

    if student is sigmoid and teacher is sigmoid:
        assert answers.teacher(theirs) is theirs
    elif student is sigmoid:
        want = scores(pair[1], theirs)
        torch.testing.assert_close(answers.teacher(theirs).sigmoid(), want, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(answers.student(own).softmax(1), scores(pair[0], own))
        torch.testing.assert_close(answers.teacher(theirs).softmax(1), scores(pair[1], theirs))


def test_a_certain_softmax_gives_a_sigmoid_finite_logits():
    answers = HeadLayout(*heads(sigmoid(), net()), None)
    out = answers.teacher(torch.tensor([[500.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 500.0]]))
    assert out.isfinite().all()
    assert out[0, 0] > 10 and out[1, 3] > 10


@pytest.mark.parametrize('student', [net, seesaw, sigmoid])
@pytest.mark.parametrize('teacher', [net, seesaw, sigmoid])
def test_pairs_of_every_kind_train(student, teacher):
    names = dict(student=['a', 'b', 'c'], teacher=['c', 'x', 'a', 'y', 'b'])
    model = distil(student(3), teacher(5), dict(recipe(), classes=names))
    values = losses(model)
    pairs.total(model, values).backward()
    assert values['loss_kd_cls'] > 0
    assert all(g.isfinite().all() for g in pairs.gradients(model).values())


def permuted(student, order):
    """The student's own network as teacher, its classes in another order."""
    names = list('abc')
    classes = dict(student=names, teacher=[names[i] for i in order])
    model = distil(student, None, dict(recipe(), classes=classes))
    pairs.teach_itself(model)
    head = model.teacher.network.roi_head.bbox_head
    with torch.no_grad():
        rows = [*order, 3]
        head.fc_cls.weight.copy_(head.fc_cls.weight[rows])
        head.fc_cls.bias.copy_(head.fc_cls.bias[rows])
        rows = [4 * i + j for i in order for j in range(4)]
        head.fc_reg.weight.copy_(head.fc_reg.weight[rows])
        head.fc_reg.bias.copy_(head.fc_reg.bias[rows])
    return model


def test_another_order_of_classes_is_the_same_answer():
    """Rows equal those of the student itself, to rounding; without the names they do not."""
    model = permuted(net(3), [2, 0, 1])
    heard = pairs.spy(model)
    losses(model)
    own, theirs = heard['rcnn_cls'][0][:2]
    torch.testing.assert_close(own.log_softmax(1), theirs.log_softmax(1), rtol=1e-4, atol=1e-5)
    own, theirs = heard['rcnn_bbox'][0][:2]
    assert len(own)
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    model.sites['rcnn'].layouts[0].indices = None
    heard['rcnn_cls'].clear()
    losses(model)
    own, theirs = heard['rcnn_cls'][0][:2]
    assert (own.log_softmax(1) - theirs.log_softmax(1)).abs().max() > 1e-3


def test_boxes_of_an_unknown_class_teach_nothing():
    classes = dict(student=['a', 'b', 'c'], teacher=['x', 'y', 'a'])
    model = distil(net(3), net(3), dict(recipe('rcnn_bbox', 'rcnn_cls'), classes=classes))
    heard = pairs.spy(model)
    labels = []
    model.roi_head.bbox_head.loss_cls.register_forward_hook(
        lambda module, args, out: labels.append(args[1])
    )
    losses(model, pairs.batch((4, 4)))
    weight = heard['rcnn_cls'][0][2]
    assert torch.equal(weight > 0, (labels[0] == 0) | (labels[0] == 3))
    boxes = heard['rcnn_bbox'][0][3]
    positive = labels[0][labels[0] < 3]
    assert torch.equal((boxes > 0).all(1), positive == 0)


@pytest.mark.parametrize('softmax_side', ['student', 'teacher'])
def test_an_rpn_with_softmax_and_one_with_sigmoid_answer_alike(softmax_side):
    """The foreground of a softmax RPN is column 0; of two logits only their difference counts."""
    other = net()
    other.rpn_head.loss_cls.use_sigmoid = False
    students = (other, net()) if softmax_side == 'student' else (net(), other)
    model = distil(*students, recipe('rpn_cls'))
    # Scores that lie apart, so that only the right one is near.
    torch.nn.init.normal_(model.teacher.network.rpn_head.rpn_cls.weight)
    heard = pairs.spy(model)
    theirs = []
    score = model.teacher.score_anchors
    model.teacher.score_anchors = lambda f: theirs.append(score(f)) or theirs[-1]
    losses(model)
    own, answer = heard['rpn_cls'][0][:2]
    assert own.shape == answer.shape
    given = torch.cat([level[0] for level in theirs[0]])
    if softmax_side == 'teacher':
        foreground = given.softmax(1)[:, 0].sort().values
        # Softmax and sigmoid round differently, and on each processor in their own way.
        near = (answer.sigmoid() - foreground).abs().amin(1)
        assert near.amax() < 1e-6 < foreground.diff().median()
    else:
        assert torch.equal(answer[:, 1], torch.zeros(len(answer)))


# ---------------------------------------------------------------------------- the start


def test_a_start_takes_the_rows_of_the_classes_in_common():
    student, teacher = build(net(3), 0), build(net(5), 1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    classes = ClassMap(['a', 'new', 'b'], ['x', 'b', 'y', 'a', 'z'])
    start = inherit(student, teacher, classes)
    own, theirs = student.roi_head.bbox_head, teacher.roi_head.bbox_head
    for mine, other in ((0, 3), (2, 1), (3, 5)):
        assert torch.equal(own.fc_cls.weight[mine], theirs.fc_cls.weight[other])
        assert torch.equal(own.fc_cls.bias[mine], theirs.fc_cls.bias[other])
    for mine, other in ((0, 3), (2, 1)):
        rows, others = slice(4 * mine, 4 * mine + 4), slice(4 * other, 4 * other + 4)
        assert torch.equal(own.fc_reg.weight[rows], theirs.fc_reg.weight[others])
    old = before['roi_head.bbox_head.fc_cls.weight']
    assert torch.equal(own.fc_cls.weight[1], old[1])
    assert start.by_class['roi_head.bbox_head.fc_cls.weight'] == '2 of 3'


# ----------------------------------------------------------------------- names in configs


def pair_config(tmp_path, teacher_classes=None, **changes):
    base = tiny_config(tmp_path, 'plain')
    teacher = tiny_config(tmp_path, 'teacher')
    if teacher_classes:
        text = teacher.read_text()
        teacher.write_text(text.replace(f'classes = {CLASSES!r}', f'classes = {teacher_classes!r}'))
    distillation = recipe(**changes)
    path = tmp_path / 'pair.py'
    path.write_text(
        f'_base_ = {str(base)!r}\n'
        "model = dict(type='mmkd.KnowledgeDistillationTwoStageDetector',\n"
        f'    teacher_config={str(teacher)!r}, teacher_ckpt="random",\n'
        f'    distillation={distillation!r})\nrunner_type = "mmkd.DistillationRunner"\n'
    )
    return Config.fromfile(path)


def test_the_runner_finds_the_names_in_the_two_configs(tmp_path):
    cfg = pair_config(tmp_path, ('blue', 'grey', 'red', 'pink'))
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = RUNNERS.build(cfg)
    assert runner.model.classes.indices == [2, None, 0]
    table = startup_table(runner.model)
    assert "2 of the student's 3 classes are among the teacher's 4" in table
    assert 'it does not know green' in table
    runner.train()


def test_equal_lists_change_nothing(tmp_path):
    cfg = pair_config(tmp_path)
    assert apply_classes(cfg) is cfg
    assert class_names(cfg) == list(CLASSES)


def test_lists_of_one_length_are_told_apart(tmp_path):
    cfg = pair_config(tmp_path, ('blue', 'red', 'green'))
    assert apply_classes(cfg).model.distillation.classes == dict(
        student=list(CLASSES), teacher=['blue', 'red', 'green']
    )
    cfg = pair_config(tmp_path, ('a', 'b', 'c'))
    with pytest.raises(ValueError, match='no class in common'):
        RUNNERS.build(cfg)


def test_names_come_from_the_checkpoint_where_the_config_has_none(tmp_path):
    cfg = pair_config(tmp_path)
    teacher = Config.fromfile(cfg.model.teacher_config)
    path = tmp_path / 'teacher.pth'
    torch.save(
        dict(meta=dict(dataset_meta=dict(classes=('blue', 'red', 'green'))), state_dict={}), path
    )
    cfg.model.teacher_config = dict(model=teacher.model)
    cfg.model.teacher_ckpt = str(path)
    assert apply_classes(cfg).model.distillation.classes['teacher'] == ['blue', 'red', 'green']


def test_a_config_without_names_of_its_own_has_those_of_its_data_set():
    cfg = Config.fromfile(pairs.ROOT / 'configs/kd/faster_rcnn_r101_to_r50.py')
    assert len(class_names(cfg)) == 80
    assert apply_classes(cfg) is cfg


# ------------------------------------------------------------- heads that see the image


def with_context(name):
    model = pairs.cascade()
    extra = dict(type='SingleRoIExtractor', out_channels=8, featmap_strides=[8],
                 roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=1))  # fmt: skip
    model.roi_head.type = 'HybridTaskCascadeRoIHead'
    model.roi_head.update(
        interleaved=False, mask_info_flow=False, semantic_roi_extractor=extra,
        semantic_head=dict(type='FusedSemanticHead', num_ins=5, fusion_level=1, num_convs=1,
                           in_channels=8, conv_out_channels=8, num_classes=4),
    )  # fmt: skip
    return model


def test_a_teacher_that_adds_the_whole_image_is_asked_with_it():
    """HTC: the semantic branch's features are added to each RoI's."""
    model = distil(pairs.cascade(), with_context('htc'))
    heard = pairs.spy(model)
    values = losses(model)
    assert values['loss_kd_cls'] > 0
    network = model.teacher.network
    data = model.data_preprocessor(pairs.batch(), True)
    with torch.no_grad():
        features = network.extract_feat(data['inputs'])
        semantic = network.roi_head.semantic_head(features)[1]
        rois = torch.tensor([[0.0, 4, 4, 40, 40]])
        want = network.roi_head._bbox_forward(0, features, rois, semantic_feat=semantic)
        got = model.teacher.score_rois(model.teacher.roi_inputs(features), rois, 0)
    assert torch.equal(got[0], want['cls_score'])
    assert len(heard['rcnn_cls']) == 3


def test_a_one_stage_teacher_gives_hints():
    teacher = pairs.get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model
    teacher.backbone.init_cfg = None
    model = build(distilled(net(), teacher, recipe('hint', hint=dict(pairs=['neck']))))
    values = losses(model)
    pairs.total(model, values).backward()
    assert values['loss_kd_hint'] > 0


# --------------------------------------------------------------------------------- labels


def dataset_of(tmp_path, classes):
    config = Config.fromfile(tiny_config(tmp_path))
    config.train_dataloader.dataset.metainfo.classes = classes
    return DATASETS.build(config.train_dataloader.dataset)


def test_mmdetection_numbers_classes_in_the_order_of_the_file(tmp_path):
    """The reason for the check: the names' own order does not count."""
    boxes = [
        [(i.bbox_label, i.bbox) for i in map(ConfigDict, dataset.get_data_info(0)['instances'])]
        for dataset in (dataset_of(tmp_path, CLASSES), dataset_of(tmp_path, CLASSES[::-1]))
    ]
    assert boxes[0] == boxes[1]


@pytest.mark.parametrize('wrap', [False, True])
def test_names_in_another_order_than_the_file_are_refused(tmp_path, wrap):
    def given(dataset):
        return SimpleNamespace(datasets=[dataset]) if wrap else dataset

    check_labels(given(dataset_of(tmp_path, CLASSES)))
    check_labels(given(dataset_of(tmp_path, CLASSES[1:])))
    order = ', '.join(map(repr, CLASSES))
    with pytest.raises(ValueError, match='in the order of the file. Write classes=') as error:
        check_labels(given(dataset_of(tmp_path, CLASSES[::-1])))
    assert f'({order})' in str(error.value)
    with pytest.raises(ValueError, match='has no category purple, .* and as many num_classes'):
        check_labels(given(dataset_of(tmp_path, ('purple', *CLASSES))))
    names = f'It has {", ".join(CLASSES)}: write these names, or classes=({CLASSES[0]!r},) '
    with pytest.raises(ValueError, match=re.escape(names)):
        check_labels(given(dataset_of(tmp_path, (CLASSES[0], 'bleu'))))


def reversed_categories(path):
    content = json.loads(Path(path).read_text())
    content['categories'].reverse()
    Path(path).write_text(json.dumps(content))


def test_validation_numbers_classes_as_training_does(tmp_path):
    config = Config.fromfile(tiny_config(tmp_path))
    config.runner_type = 'mmkd.DistillationRunner'
    data = [config[f'{split}_dataloader'].dataset for split in ('train', 'val')]
    check_same_labels(*map(DATASETS.build, data))
    check_same_labels(DATASETS.build(data[0]), None)
    val = tmp_path / 'data/val.json'
    reversed_categories(val)
    train, other = map(DATASETS.build, data)
    # The reason for the check: one box, two numbers.
    assert train.cat2label[1] == 0 and other.cat2label[1] == 2
    said = 'in the order red, green, blue, and .*val.json in the order blue, green, red'
    with pytest.raises(ValueError, match=said):
        check_same_labels(train, other)
    with pytest.raises(ValueError, match=said):
        RUNNERS.build(config).train()
    # Other names for the same classes, and a file with the first few, are numbered alike.
    data[1].metainfo.classes = ('Red', 'Green', 'Blue')
    check_same_labels(train, DATASETS.build(data[1]))
    data[0].metainfo.classes = data[1].metainfo.classes = ('green', 'blue')
    with pytest.raises(ValueError, match='in the order green, blue'):
        check_same_labels(*map(DATASETS.build, data))
    data[1].metainfo.classes = ('green',)
    check_same_labels(*map(DATASETS.build, data))


def test_a_test_with_another_order_is_warned_about(tmp_path, capfd):
    config = Config.fromfile(tiny_config(tmp_path))
    config.runner_type = 'mmkd.DistillationRunner'
    for what in ('', 'in the order of the file. Write classes='):
        config.experiment_name = f'{tmp_path.name}{len(what)}'
        RUNNERS.build(config).test()
        said = ''.join(capfd.readouterr())
        assert what in said and ('scored as others' in said) == bool(what)
        reversed_categories(tmp_path / 'data/val.json')


def test_one_class_without_its_comma(tmp_path):
    config = Config.fromfile(tiny_config(tmp_path))
    config.runner_type = 'mmkd.DistillationRunner'
    for split in ('train', 'val'):
        config[f'{split}_dataloader'].dataset.metainfo.classes = 'red'
    with pytest.raises(ValueError, match=r"classes='red' of the train .* classes=\('red',\)"):
        RUNNERS.build(config).train()


def test_a_run_with_such_names_stops_before_its_first_step(tmp_path):
    plain = tiny_config(tmp_path)
    config = Config.fromfile(plain)
    for split in ('train', 'val', 'test'):
        config[f'{split}_dataloader'].dataset.metainfo.classes = CLASSES[::-1]
    config.model = distilled(config.model, str(plain), recipe())
    config.runner_type = 'mmkd.DistillationRunner'
    with pytest.raises(ValueError, match='in the order of the file'):
        RUNNERS.build(config).train()
